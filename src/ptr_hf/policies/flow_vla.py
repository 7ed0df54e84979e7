"""What the openpi-like policies share: a VLM prefix that conditions a flow-matching action expert."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ptr_hf.policies.hooks import (
    AdapterBase,
    Capture,
    captured_input,
    captured_output,
    frozen_copy,
    patched,
    preserved_modes,
)
from ptr_hf.policies.protocol import (
    Batch,
    BeliefMask,
    PolicyTrace,
    RolloutTrace,
    Views,
    action_mask,
    belief_token_mask,
    check_layer,
    per_sample_mean,
    refuse_stacked_frames,
    require_keys,
    unused_dims,
    without_unused,
)

EMPTY_CAMERA = "observation.images.empty_camera_"

Images = tuple[list[Tensor], list[Tensor]]
"""Images or their embeddings, one per camera, and which rows of each are real."""


class FlowVLAAdapter(AdapterBase, ABC):
    """Reads a policy whose `model` embeds a prefix, denoises the chunk in an expert and projects it out.

    H_t is the language model's final norm over the prefix; A_t the clean chunk through `action_in_proj`; C_t the input
    of `action_out_proj`. Belief tokens are prepended to the prefix with attention flag 0, so they belong to the block
    that images and language attend to. Positions are rotary: in front, the tokens leave the distances between the
    policy's own ones as they were trained.

    The policies' own `forward` waits for the device to log, and pi0's averages over padded steps; their models and
    helpers are called instead.

    Raises:
        ValueError: the policy compiles its forward, which hides the modules that PTR reads.
    """

    family: str
    observations: tuple[str, ...] = (OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
    """What the policy reads besides images."""
    masks_action_dims = True

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if self.base.config.compile_model:
            raise ValueError(
                f"PTR cannot read a compiled {self.family} forward: set compile_model=False in the policy's config."
            )

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """Width of H_t: the language model's hidden size."""

    @property
    @abstractmethod
    def action_dim(self) -> int:
        """Width of A_t: the action expert's hidden size."""

    @property
    def hidden_dim(self) -> int:
        """Width of C_t: the action expert's hidden size."""
        return self.action_dim

    @property
    def chunk_size(self) -> int:
        """Steps in one action chunk."""
        return int(self.base.config.chunk_size)

    @property
    @abstractmethod
    def _experts(self) -> Any:
        """The module that holds both language models and embeds images."""

    @property
    @abstractmethod
    def _vision(self) -> Any:
        """The SigLIP transformer."""

    @abstractmethod
    def _captured_context(self) -> AbstractContextManager[Capture]:
        """Capture the language model's final norm over the whole prefix."""

    @abstractmethod
    def _images(self, batch: Batch) -> Images:
        """The policy's own preparation of its cameras, the empty ones last."""

    @abstractmethod
    def _losses(
        self, images: Images, batch: Batch, action: Float[Tensor, "batch steps dim"]
    ) -> Float[Tensor, "batch steps padded_dim"]:
        """The elementwise loss of the policy's model on a chunk in the model's own action space."""

    def trace(
        self,
        batch: Batch,
        belief: Float[Tensor, "batch tokens context_dim"] | None = None,
        belief_mask: BeliefMask | None = None,
        views: Views | None = None,
    ) -> PolicyTrace:
        """One forward of the flow-matching loss; see `PolicyAdapter.trace`."""
        self._check(batch, training=True, with_images=views is None)
        unused = unused_dims(batch, batch[ACTION])
        action = without_unused(self._action(batch[ACTION]), unused)
        with ExitStack() as scope:
            scope.enter_context(self.action_scope(batch))
            images = self._enter_images(scope, batch, views, rows=action.shape[0])
            prefix_pad = scope.enter_context(self._prefix(belief, belief_mask))
            context = scope.enter_context(self._captured_context())
            hidden = scope.enter_context(captured_input(self.base.model.action_out_proj))
            losses = self._losses(images, batch, action)
        mask = action_mask(batch, action.shape[1], action.shape[0], action.device)
        return PolicyTrace(
            loss=per_sample_mean(losses[:, :, : action.shape[-1]], mask, unused),
            context=context.value[:, -prefix_pad[0].shape[1] :].float(),
            context_mask=prefix_pad[0],
            action_tokens=self._action_tokens(action),
            action_hidden=hidden.value.float(),
            action_mask=mask,
        )

    @torch.no_grad()
    def rollout(
        self, batch: Batch, belief: Float[Tensor, "batch tokens context_dim"] | None = None, **kwargs: Any
    ) -> RolloutTrace:
        """Sample a chunk under the belief; `kwargs` (noise, real-time chunking) go to `predict_action_chunk`."""
        self._check(batch, training=False, with_images=True)
        # SmolVLA's Aloha conversion writes into the state, so the policy gets a copy.
        batch = {key: value.clone() if key == OBS_STATE else value for key, value in batch.items()}
        with (
            preserved_modes(self.policy),
            self.action_scope(batch),
            self.belief_scope(belief),
            captured_input(self.base.model.action_out_proj, keep="last") as hidden,
        ):
            actions = self.base.predict_action_chunk(batch, **kwargs)
        unused = unused_dims(batch, actions)
        return RolloutTrace(
            actions=without_unused(actions, unused),
            action_tokens=self._action_tokens(without_unused(self._action(actions), unused)),
            action_hidden=hidden.value.float(),
            action_mask=torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device),
        )

    def compilable(self) -> Iterable[nn.Module]:
        """Attention and MLP of the vision layers, and the MLPs of both language models."""
        for layer in self._vision.encoder.layers:
            yield from (layer.self_attn, layer.mlp)
        for layer in self._language_layers():
            yield layer.mlp

    @abstractmethod
    def _language_layers(self) -> Iterable[Any]:
        """Layers of the backbone's language model and of the action expert."""

    @contextmanager
    def belief_scope(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None = None
    ) -> Iterator[None]:
        """Prepend the belief tokens to every prefix that the policy embeds while the scope is open."""
        with self._prefix(belief, mask):
            yield

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Image embeddings (in the language model's width) of all rows; see `PolicyAdapter.encode_views`."""
        if layer is not None:
            check_layer(layer, self.num_tower_layers())
            if not self.tower_is_frozen():
                raise ValueError("Layer states are shared only while the vision tower is frozen; pass layer=None.")
        self._check_images(batch)
        images, masks = self._images(batch)
        cameras = [key for key in self.base.config.image_features if key in batch]
        names = cameras + [f"{EMPTY_CAMERA}{index}" for index in range(len(images) - len(cameras))]
        features, tower = {}, {}
        for name, image in zip(names, images, strict=True):
            with ExitStack() as scope:
                if layer is not None and name in self.target_keys():
                    state = scope.enter_context(captured_output(self._vision.encoder.layers[layer - 1]))
                features[name] = self._embed_image(image)
                if layer is not None and name in self.target_keys():
                    tower[name] = state.value.detach()
        return Views(features=features, masks=dict(zip(names, masks, strict=True)), tower=tower)

    def target_keys(self) -> tuple[str, ...]:
        """The policy's cameras without the empty ones it fills itself."""
        return tuple(key for key in self.base.config.image_features if not key.startswith(EMPTY_CAMERA))

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the SigLIP tower trains."""
        return not any(parameter.requires_grad for parameter in self._vision.parameters())

    def num_tower_layers(self) -> int:
        """Encoder layers of the SigLIP tower."""
        return len(self._vision.encoder.layers)

    def target_dim(self, layer: int) -> int:
        """Width of the SigLIP tower, the same after every layer."""
        check_layer(layer, self.num_tower_layers())
        return int(self._vision.config.hidden_size)

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The SigLIP tower's first `layer` encoder layers without the final norm; see `PolicyAdapter.build_tower`."""
        check_layer(layer, self.num_tower_layers())
        source = self._vision
        config = copy.deepcopy(source.config)
        config.num_hidden_layers = layer
        # The shell's own weights are never read: on the meta device they cost nothing.
        with torch.device("meta"):
            tower = type(source)(config)
        tower.embeddings = source.embeddings
        tower.encoder.layers = nn.ModuleList(source.encoder.layers[:layer])
        tower.post_layernorm = nn.Identity()
        if share:
            return tower.train(source.training)
        return frozen_copy(tower)

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """The live tower's parameters under the names of `build_tower(layer).state_dict()`."""
        check_layer(layer, self.num_tower_layers())
        kept = ("embeddings.", *(f"encoder.layers.{index}." for index in range(layer)))
        for name, value in self._vision.state_dict().items():
            if name.startswith(kept):
                yield name, value

    @torch.no_grad()
    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Tower tokens of one camera's images, prepared (resized, padded, scaled to [-1, 1]) by the policy itself."""
        if key not in self.target_keys():
            raise ValueError(f"{key!r} is not a camera of this policy, which has {', '.join(self.target_keys())}.")
        pixels = self._images({key: image})[0][0]
        dtype = next(tower.parameters()).dtype
        return tower(pixel_values=pixels.to(dtype)).last_hidden_state

    @contextmanager
    def _prefix(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None
    ) -> Iterator[list[Bool[Tensor, "batch prefix"]]]:
        """Prepend the belief in `embed_prefix`, which training and sampling share; yields the belief-free pad masks."""
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

        with self.exclusive(), patched(model, "embed_prefix", embed_prefix):
            yield pads

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

    def _enter_images(self, scope: ExitStack, batch: Batch, views: Views | None, rows: int) -> Images:
        """The batch's images, or the views' embeddings with what makes the model take them in the images' place."""
        if views is None:
            return self._images(batch)
        features, masks = list(views.features.values()), list(views.masks.values())
        if features and features[0].shape[0] != rows:
            raise ValueError(f"views has {features[0].shape[0]} rows and the batch {rows}.")
        scope.enter_context(self._embedded(features))
        return features, masks

    def _embedded(self, features: list[Float[Tensor, "batch patches context_dim"]]) -> AbstractContextManager[None]:
        """While open, images that the model is given are embedded already."""
        return patched(self._experts, "embed_image", _identity)

    def _embed_image(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches context_dim"]:
        return self._experts.embed_image(image)

    def _check(self, batch: Batch, training: bool, with_images: bool) -> None:
        require_keys(batch, [*self.observations, ACTION] if training else self.observations, self.family)
        refuse_stacked_frames(batch, [OBS_STATE], single_frame_ndim=2)
        if with_images:
            self._check_images(batch)

    def _check_images(self, batch: Batch) -> None:
        # A checkpoint may list cameras that this robot lacks: the policies do without them, but need one.
        cameras = self.target_keys()
        if not any(key in batch for key in cameras):
            require_keys(batch, cameras, self.family)
        refuse_stacked_frames(batch, cameras, single_frame_ndim=4)

    def _action(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps dim"]:
        """The chunk in the model's own action space."""
        return action

    def _action_tokens(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps action_dim"]:
        return self.base.model.action_in_proj(self.base.prepare_action({ACTION: action})).float()


def _identity(image: Tensor) -> Tensor:
    return image
