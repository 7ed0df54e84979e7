"""What the openpi-like policies share: a VLM prefix that conditions a flow-matching action expert."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ptr_hf.constants import EMPTY_CAMERA
from ptr_hf.policies.base import AdapterBase, part
from ptr_hf.policies.batches import action_mask, belief_token_mask, per_sample_mean, unused_dims, without_unused
from ptr_hf.policies.hooks import captured_output, patched
from ptr_hf.policies.tower import VisionTower, transformer_tower
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, Views

Images = tuple[list[Tensor], list[Tensor]]
"""Images or their embeddings, one per camera, and which rows of each are real."""


class FlowVLAAdapter(AdapterBase):
    """Reads a policy whose `model` embeds a prefix, denoises the chunk in an expert and projects it out.

    H_t is the language model's final norm over the prefix; A_t the clean chunk through `action_in_proj`; C_t the input
    of `action_out_proj`. Belief tokens are prepended to the prefix with attention flag 0, so they belong to the block
    that images and language attend to. Positions are rotary: in front, the tokens leave the distances between the
    policy's own ones as they were trained.

    The policies' own `forward` waits for the device to log, and pi0's averages over padded steps; their models and
    helpers are called instead.

    Attributes:
        language_models: where the backbone's language model and the action expert lie.

    Raises:
        ValueError: the policy compiles its forward, which hides the modules that PTR reads.
    """

    masks_action_dims = True
    needs_every_camera = False
    reads_features = True
    preparation = "prepare_images"
    """The policy's own method that prepares its cameras."""
    observations: tuple[str, ...] = (OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
    language_models: tuple[str, ...]
    _experts: Any
    """The module that holds both language models and embeds images."""
    _vision: Any
    """The SigLIP transformer."""
    _action_out = part("model.action_out_proj")

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if self.base.config.compile_model:
            raise ValueError(
                f"PTR cannot read a compiled {self.family} forward: set compile_model=False in the policy's config."
            )

    @property
    def context_dim(self) -> int:
        """Width of H_t: the language model's hidden size."""
        return int(self._language_model.config.hidden_size)

    @property
    def action_dim(self) -> int:
        """Width of A_t: the action expert's hidden size."""
        return int(self.base.get_submodule(self.language_models[-1]).config.hidden_size)

    @property
    def tower(self) -> VisionTower:
        """The SigLIP tower without its final norm."""
        return transformer_tower(self._vision, ("embeddings",), "encoder.layers", ("post_layernorm",))

    @property
    def _language_model(self) -> Any:
        return self.base.get_submodule(self.language_models[0])

    @abstractmethod
    def _images(self, batch: Batch) -> Images:
        """The policy's own preparation of its cameras, the empty ones last."""

    @abstractmethod
    def _losses(
        self, images: Images, batch: Batch, action: Float[Tensor, "batch steps dim"]
    ) -> Float[Tensor, "batch steps padded_dim"]:
        """The elementwise loss of the policy's model on a chunk in the model's own action space."""

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the flow-matching loss."""
        unused = unused_dims(batch, batch[ACTION])
        action = without_unused(self._action(batch[ACTION]), unused)
        with ExitStack() as scope:
            scope.enter_context(self.action_scope(batch))
            images = self._enter_images(scope, batch, views)
            prefix_pad = scope.enter_context(belief)
            context = scope.enter_context(captured_output(self._language_model.norm))
            hidden = scope.enter_context(self._captured_hidden())
            losses = self._losses(images, batch, action)
        mask = action_mask(batch, action)
        return PolicyTrace(
            loss=per_sample_mean(losses[:, :, : action.shape[-1]], mask, unused),
            context=context.value[:, -prefix_pad[0].shape[1] :].float(),
            context_mask=prefix_pad[0],
            action_tokens=self._projected(action),
            action_hidden=hidden.value.float(),
            action_mask=mask,
        )

    def compilable(self) -> Iterable[nn.Module]:
        """Attention and MLP of the vision layers, and the MLPs of both language models."""
        for layer in self._vision.encoder.layers:
            yield from (layer.self_attn, layer.mlp)
        yield from self._language_mlps()

    def _language_mlps(self) -> Iterable[nn.Module]:
        models: list[Any] = [self.base.get_submodule(path) for path in self.language_models]
        return (layer.mlp for layer in chain.from_iterable(model.layers for model in models))

    def _images_of(self, batch: Batch) -> Iterable[tuple[str, Tensor, Bool[Tensor, " rows"]]]:
        images, masks = self._images(batch)
        cameras = [key for key in self.base.config.image_features if key in batch]
        names = cameras + [f"{EMPTY_CAMERA}{index}" for index in range(len(images) - len(cameras))]
        return zip(names, images, masks, strict=True)

    def _kept_views(self, batch: Batch) -> Views:
        """The features that a batch holds, and as many blank cameras as the policy fills in: no token of theirs is read."""
        views = super()._kept_views(batch)
        features = next(iter(views.features.values()))
        missing = len(self.base.config.image_features) - len(views.features)
        for index in range(self._blank_cameras(missing)):
            views.features[f"{EMPTY_CAMERA}{index}"] = torch.zeros_like(features)
            views.masks[f"{EMPTY_CAMERA}{index}"] = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return views

    def _blank_cameras(self, missing: int) -> int:
        """How many of the cameras that a batch lacks the policy fills in."""
        return missing

    def _prepared(self, key: str, image: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *input"]:
        return self._images({key: image})[0][0]

    def _enter_belief(
        self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None
    ) -> list[Bool[Tensor, "batch prefix"]]:
        """Prepend the belief in `embed_prefix`, which training and sampling share; returns the belief-free pad masks."""
        model = self.base.model
        original = model.embed_prefix
        pads: list[Tensor] = []

        def embed_prefix(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            embeddings, pad, attention = original(*args, **kwargs)
            pads.append(pad)
            if belief is None:
                return embeddings, pad, attention
            readable = belief_token_mask(belief, mask)
            return (
                torch.cat([belief.to(embeddings.dtype), embeddings], dim=1),
                torch.cat([readable, pad], dim=1),
                torch.cat([torch.zeros_like(readable), attention], dim=1),
            )

        scope.enter_context(patched(model, "embed_prefix", embed_prefix))
        return pads

    @contextmanager
    def _masked_chunks(self, unused: Bool[Tensor, "batch dims"]) -> Iterator[None]:
        """Clear the noised chunk in `embed_suffix`, which training and sampling share and which is never recomputed."""
        model = self.base.model
        original = model.embed_suffix

        def embed_suffix(*args: Any) -> Any:
            *observation, chunk, time = args
            return original(*observation, without_unused(chunk, unused), time)

        with patched(model, "embed_suffix", embed_suffix):
            yield

    def _enter_images(self, scope: ExitStack, batch: Batch, views: Views | None) -> Images:
        """The batch's images, or the views' embeddings with what makes the model take them in the images' place."""
        if views is None:
            return self._images(batch)
        features = list(views.features.values())
        scope.enter_context(self._embedded(features))
        return features, list(views.masks.values())

    def _embedded(self, features: list[Float[Tensor, "batch patches context_dim"]]) -> AbstractContextManager[None]:
        """While open, images that the model is given are embedded already."""
        return patched(self._experts, "embed_image", _identity)

    def _enter_features(self, scope: ExitStack, views: Views) -> Batch:
        prepared = list(views.features.values()), list(views.masks.values())
        scope.enter_context(patched(self.base, self.preparation, lambda *_: prepared))
        scope.enter_context(self._embedded(prepared[0]))
        return {}

    def _embed_image(self, key: str, image: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch patches context_dim"]:
        return self._experts.embed_image(image)

    def _action(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps dim"]:
        """The chunk in the model's own action space."""
        return action

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        return self._projected(without_unused(self._action(action), unused_dims(batch, action)))

    def _projected(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps action_dim"]:
        return self.base.model.action_in_proj(self.base.prepare_action({ACTION: action})).float()


def _identity(image: Tensor) -> Tensor:
    return image
