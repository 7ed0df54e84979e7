"""X-VLA: a Florence-2 encoder whose states condition a soft-prompted flow-matching transformer."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ptr_hf.policies.base import AdapterBase, part
from ptr_hf.policies.batches import action_mask, belief_token_mask, per_sample_mean
from ptr_hf.policies.hooks import Call, edited_call, patched, preserved_modes, recorded_calls
from ptr_hf.policies.tower import VisionTower, flatten_map
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, Views

SEPARABLE_ACTION_SPACES = ("ee6d", "joint", "agibot_ee6d", "franka_joint7", "auto", "so101_bimanual")
"""Action spaces whose every loss component is a mean over rows and steps: all that lerobot 0.6.1 registers."""

ActionLoss = Callable[[Tensor, Tensor], dict[str, Tensor]]


class XVLAAdapter(AdapterBase):
    """Reads an `XVLAPolicy` (lerobot 0.6.1).

    H_t is what the transformer is conditioned on: the Florence-2 encoder's states of the first camera and the
    instruction, then the projected tokens of the other cameras, which bypass the encoder. A_t is the clean chunk through
    `transformer.action_encoder`, as the action space preprocesses it (three spaces hide the gripper there), with zeros
    where the encoder also takes proprioception and time, so that A_t speaks of the action alone. C_t is the input of
    `transformer.action_decoder`.

    Belief tokens are appended to the encoder's sequence, and cut out of its output again: the transformer attends
    without a mask and numbers its positions, so the belief steers it through H_t. In the transformer's own sequence H_t
    would have to be read after the noised chunk has been mixed in.

    The per-sample loss is the action space's own `compute_loss`, evaluated at every (row, step) with `torch.func.vmap`.
    `forward_vlm` reads one count back from the device, in LeRobot's training as in a trace.

    The consequence tower is the DaViT up to one of its stages.

    Raises:
        ValueError: the policy's action space is not one of `SEPARABLE_ACTION_SPACES`.
    """

    family = "xvla"
    preprocesses_rows = True
    needs_every_camera = False
    reads_features = True
    action_dim = part("config.hidden_size")
    _action_out = part("model.transformer.action_decoder")
    _vlm = part("model.vlm")

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        space = self.base.model.action_space
        if space.name not in SEPARABLE_ACTION_SPACES:
            raise ValueError(
                f"PTR cannot tell whether the loss of the action space {type(space).__name__} is a mean over rows and "
                f"steps, so it has no per-sample loss: set action_mode to one of {', '.join(SEPARABLE_ACTION_SPACES)}."
            )

    @property
    def context_dim(self) -> int:
        """Width of H_t: that of the Florence-2 encoder."""
        return int(self._vlm.config.text_config.d_model)

    @property
    def tower(self) -> VisionTower:
        """The DaViT, whose layers are its stages."""
        root = self._vlm.vision_tower
        layers = tuple(
            (f"convs.{stage}", *(f"blocks.{stage}.{index}" for index in range(len(blocks))))
            for stage, blocks in enumerate(root.blocks)
        )
        return VisionTower(root, (), layers, tuple(root.config.embed_dim), head=())

    @property
    def observations(self) -> tuple[str, ...]:
        """The instruction, and the state where the policy takes proprioception."""
        return (OBS_STATE, OBS_LANGUAGE_TOKENS) if self.base.config.use_proprio else (OBS_LANGUAGE_TOKENS,)

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of `XVLAPolicy.model`, without the waits of the policy's own logging."""
        policy, model = self.base, self.base.model
        action = batch[ACTION]
        with ExitStack() as scope:
            if views is not None:
                self._enter_views(scope, views)
            scope.enter_context(belief)
            seen = scope.enter_context(
                recorded_calls(
                    model.transformer, lambda _args, kwargs: (kwargs["vlm_features"], kwargs["aux_visual_inputs"])
                )
            )
            hidden = scope.enter_context(self._captured_hidden())
            scope.enter_context(patched(model.action_space, "compute_loss", _per_step(model.action_space.compute_loss)))
            inputs = policy._build_model_inputs(batch)
            losses = model(action=policy._prepare_action_targets(batch), **inputs)["loss"]
        encoded, others = seen[0]
        mask = action_mask(batch, action)
        return PolicyTrace(
            loss=per_sample_mean(losses.unsqueeze(-1), mask),
            context=torch.cat([encoded, others], dim=1).float(),
            context_mask=self._context_mask(batch, inputs["image_mask"], encoded.shape[1], others.shape[1]),
            action_tokens=self._action_tokens(action, batch),
            action_hidden=hidden.value.float(),
            action_mask=mask,
        )

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the Florence-2 encoder's layers in the backward pass; DaViT and transformer have no such switch."""
        self._vlm.gradient_checkpointing_enable({"use_reentrant": False})
        self._vlm.disable_input_require_grads()  # a hook that only reentrant checkpointing needs

    def compilable(self) -> Iterable[nn.Module]:
        """The encoder's layers, the transformer's blocks, and the DaViT's but for the last of a stage, which is read."""
        yield from self._vlm.language_model.encoder.layers
        yield from self.base.model.transformer.blocks
        for stage in self._vlm.vision_tower.blocks:
            yield from stage[:-1]

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Projected image tokens of all rows, one tower call per camera; see `AdapterBase.encode_views`.

        With `layer` the frozen tower runs in eval mode, without the stochastic depth that LeRobot leaves on.
        """
        tower = self._vlm.vision_tower
        with nullcontext() if layer is None else preserved_modes(tower, training=False):
            return super().encode_views(batch, layer)

    def _images_of(self, batch: Batch) -> Iterable[tuple[str, Tensor, Bool[Tensor, " rows"]]]:
        images, masks = self.base._prepare_images(batch)
        keys = [key for key in self.base.config.image_features if key in batch]
        images = images.to(self.base.model._get_target_dtype())
        return ((key, images[:, index], masks[:, index]) for index, key in enumerate(keys))

    def _embed_image(self, key: str, image: Float[Tensor, "rows 3 _ _"]) -> Float[Tensor, "rows patches dim"]:
        return self._vlm.get_image_features(image).pooler_output

    def _tokens(self, states: Float[Tensor, "rows channels _ _"], rows: int) -> Float[Tensor, "rows patches channels"]:
        return flatten_map(states)

    def _tower_tokens(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Of images that are resized and padded by the policy itself."""
        with preserved_modes(tower, training=False):
            return flatten_map(tower(self.base._prepare_images({key: image})[0][:, 0]).last_hidden_state)

    def _enter_belief(self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None) -> None:
        """Append the belief to the encoder's sequence, and leave it out of what `forward_vlm` returns."""
        if belief is None:
            return
        model, encoder, tokens = self.base.model, self._vlm.language_model.encoder, belief.shape[1]
        original = model.forward_vlm
        readable = belief_token_mask(belief, mask)

        def append(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            embeddings, attention = kwargs["inputs_embeds"], kwargs["attention_mask"]
            length = embeddings.shape[1] + tokens
            if length > encoder.max_source_positions:
                raise ValueError(
                    f"With {tokens} belief tokens the Florence-2 encoder would read {length} tokens, and it has "
                    f"{encoder.max_source_positions} positions: use fewer belief tokens or smaller images."
                )
            return args, {
                **kwargs,
                "inputs_embeds": torch.cat([embeddings, belief.to(embeddings.dtype)], dim=1),
                "attention_mask": torch.cat([attention, readable.to(attention.dtype)], dim=1),
            }

        def forward_vlm(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            encoded = original(*args, **kwargs)
            return {**encoded, "vlm_features": encoded["vlm_features"][:, :-tokens]}

        scope.enter_context(edited_call(encoder, append))
        scope.enter_context(patched(model, "forward_vlm", forward_vlm))

    def _enter_views(self, scope: ExitStack, views: Views) -> None:
        """Let the policy take the features for images, and the vision tower return them as they are."""
        features, masks = (torch.stack(list(part.values()), dim=1) for part in (views.features, views.masks))
        missing = max(0, (self.base.config.num_image_views or 0) - features.shape[1])
        rows = len(features)
        blank = features.new_zeros(rows, missing, *features.shape[2:])
        prepared = torch.cat([features, blank], dim=1), torch.cat([masks, masks.new_zeros(rows, missing)], dim=1)
        scope.enter_context(patched(self.base, "_prepare_images", lambda _batch: prepared))
        scope.enter_context(patched(self._vlm, "get_image_features", _as_image_features))

    def _enter_features(self, scope: ExitStack, views: Views) -> Batch:
        self._enter_views(scope, views)
        return {}

    def _context_mask(
        self, batch: Batch, image_mask: Bool[Tensor, "batch views"], encoded: int, others: int
    ) -> Bool[Tensor, "batch context"]:
        """True for image tokens of present views and for the instruction without its padding."""
        text = batch[OBS_LANGUAGE_TOKENS]
        real = batch.get(OBS_LANGUAGE_ATTENTION_MASK, torch.ones_like(text)).bool()
        patches = encoded - text.shape[1]
        shown = image_mask.repeat_interleave(patches, dim=1)
        return torch.cat([shown[:, :patches], real, shown[:, patches : patches + others]], dim=1)

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        policy, model = self.base, self.base.model
        rows, device = action.shape[0], action.device
        proprio = policy._prepare_state(batch, rows, device)
        _, clean = model.action_space.preprocess(proprio, policy._prepare_action_targets({ACTION: action}))
        padding = clean.new_zeros(*clean.shape[:2], model.dim_proprio + model.transformer.dim_time)
        inputs = torch.cat([clean, padding], dim=-1).to(model._get_target_dtype())
        return model.transformer.action_encoder(inputs, policy._get_domain_id(batch, rows, device)).float()


def _per_step(compute_loss: ActionLoss) -> ActionLoss:
    """An action space's loss with its components summed, for every (row, step) by itself."""

    def of_one_step(predicted: Float[Tensor, " dim"], target: Float[Tensor, " dim"]) -> Float[Tensor, ""]:
        components = compute_loss(predicted[None, None], target[None, None])
        return torch.stack(list(components.values())).sum()

    def of_all(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.func.vmap(torch.func.vmap(of_one_step))(predicted.float(), target.float())}

    return of_all


def _as_image_features(features: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=features)
