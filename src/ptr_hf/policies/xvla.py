"""X-VLA: a Florence-2 encoder whose states condition a soft-prompted flow-matching transformer."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ptr_hf.policies.hooks import (
    AdapterBase,
    captured_input,
    captured_output,
    edited_call,
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
)

EMPTY_CAMERA = "observation.images.empty_camera_"

SEPARABLE_ACTION_SPACES = ("ee6d", "joint", "agibot_ee6d", "franka_joint7", "auto", "so101_bimanual")
"""Action spaces whose every loss component is a mean over rows and steps: all that lerobot 0.6.1 registers."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
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
    def action_dim(self) -> int:
        """Width of A_t: the transformer's."""
        return int(self.base.config.hidden_size)

    hidden_dim = action_dim
    """Width of C_t: the transformer's."""

    @property
    def chunk_size(self) -> int:
        """Steps in one action chunk."""
        return int(self.base.config.chunk_size)

    def trace(
        self,
        batch: Batch,
        belief: Float[Tensor, "batch tokens context_dim"] | None = None,
        belief_mask: BeliefMask | None = None,
        views: Views | None = None,
    ) -> PolicyTrace:
        """One forward of `XVLAPolicy.model`, without the waits of the policy's own logging."""
        policy, model = self.base, self.base.model
        self._check(batch, training=True, with_images=views is None)
        action = batch[ACTION]
        with ExitStack() as scope:
            if views is not None:
                self._enter_views(scope, views, action.shape[0])
            scope.enter_context(self.belief_scope(belief, belief_mask))
            seen = scope.enter_context(_captured_context(model.transformer))
            hidden = scope.enter_context(captured_input(model.transformer.action_decoder))
            scope.enter_context(patched(model.action_space, "compute_loss", _per_step(model.action_space.compute_loss)))
            inputs = policy._build_model_inputs(batch)
            losses = model(action=policy._prepare_action_targets(batch), **inputs)["loss"]
        encoded, others = seen[0]
        mask = action_mask(batch, action.shape[1], action.shape[0], action.device)
        return PolicyTrace(
            loss=per_sample_mean(losses.unsqueeze(-1), mask),
            context=torch.cat([encoded, others], dim=1).float(),
            context_mask=self._context_mask(batch, inputs["image_mask"], encoded.shape[1], others.shape[1]),
            action_tokens=self._action_tokens(batch, action),
            action_hidden=hidden.value.float(),
            action_mask=mask,
        )

    @torch.no_grad()
    def rollout(
        self, batch: Batch, belief: Float[Tensor, "batch tokens context_dim"] | None = None, **kwargs: Any
    ) -> RolloutTrace:
        """Sample a chunk under the belief."""
        self._check(batch, training=False, with_images=True)
        with (
            preserved_modes(self.policy),
            self.belief_scope(belief),
            captured_input(self.base.model.transformer.action_decoder, keep="last") as hidden,
        ):
            actions = self.base.predict_action_chunk(batch, **kwargs)
        return RolloutTrace(
            actions=actions,
            action_tokens=self._action_tokens(batch, actions),
            action_hidden=hidden.value.float(),
            action_mask=torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device),
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

    @contextmanager
    def belief_scope(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None = None
    ) -> Iterator[None]:
        """Append the belief tokens to what the Florence-2 encoder reads while the scope is open."""
        with ExitStack() as scope:
            scope.enter_context(self.exclusive())
            if belief is not None:
                self._inject(scope, belief, mask)
            yield

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Projected image tokens of all rows, one tower call per camera; see `PolicyAdapter.encode_views`.

        With `layer` the frozen tower runs in eval mode, without the stochastic depth that LeRobot leaves on.
        """
        if layer is not None:
            check_layer(layer, self.num_tower_layers())
            if not self.tower_is_frozen():
                raise ValueError("Layer states are shared only while the vision tower is frozen; pass layer=None.")
        self._check_images(batch)
        images, masks = self.base._prepare_images(batch)
        images = images.to(self.base.model._get_target_dtype())
        features, shown, tower = {}, {}, {}
        for index, key in enumerate(key for key in self.base.config.image_features if key in batch):
            with ExitStack() as scope:
                if layer is not None:
                    scope.enter_context(preserved_modes(self._vlm.vision_tower, training=False))
                    stage = scope.enter_context(captured_output(self._vlm.vision_tower.blocks[layer - 1][-1]))
                features[key] = self._vlm.get_image_features(images[:, index]).pooler_output
                shown[key] = masks[:, index]
                if layer is not None and key in self.target_keys():
                    tower[key] = _flatten_map(stage.value.detach())
        return Views(features=features, masks=shown, tower=tower)

    def target_keys(self) -> tuple[str, ...]:
        """The policy's cameras without the empty ones it fills itself."""
        return tuple(key for key in self.base.config.image_features if not key.startswith(EMPTY_CAMERA))

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the DaViT trains."""
        return not any(parameter.requires_grad for parameter in self._vlm.vision_tower.parameters())

    def num_tower_layers(self) -> int:
        """Stages of the DaViT."""
        return len(self._vlm.vision_tower.convs)

    def target_dim(self, layer: int) -> int:
        """Channels of the DaViT's stage."""
        check_layer(layer, self.num_tower_layers())
        return int(self._vlm.vision_tower.config.embed_dim[layer - 1])

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The DaViT's first `layer` stages; see `PolicyAdapter.build_tower`."""
        check_layer(layer, self.num_tower_layers())
        source = self._vlm.vision_tower
        # The shell's own weights are never read: on the meta device they cost nothing.
        with torch.device("meta"):
            tower = type(source)(copy.deepcopy(source.config))
        tower.convs = source.convs[:layer]
        tower.blocks = source.blocks[:layer]
        return tower.train(source.training) if share else frozen_copy(tower)

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """The live tower's parameters under the names of `build_tower(layer).state_dict()`."""
        check_layer(layer, self.num_tower_layers())
        kept = tuple(f"{part}.{index}." for index in range(layer) for part in ("convs", "blocks"))
        for name, value in self._vlm.vision_tower.state_dict().items():
            if name.startswith(kept):
                yield name, value

    @torch.no_grad()
    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Flattened feature map of one camera's normalised images, resized and padded by the policy itself."""
        if key not in self.target_keys():
            raise ValueError(f"{key!r} is not a camera of this policy, which has {', '.join(self.target_keys())}.")
        with preserved_modes(tower, training=False):
            return _flatten_map(tower(self.base._prepare_images({key: image})[0][:, 0]).last_hidden_state)

    @property
    def _vlm(self) -> Any:
        return self.base.model.vlm

    def _inject(self, scope: ExitStack, belief: Float[Tensor, "batch tokens dim"], mask: BeliefMask | None) -> None:
        """Append the belief to the encoder's sequence, and leave it out of what `forward_vlm` returns."""
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

    def _enter_views(self, scope: ExitStack, views: Views, rows: int) -> None:
        """Let the policy take the features for images, and the vision tower return them as they are."""
        features, masks = (torch.stack(list(part.values()), dim=1) for part in (views.features, views.masks))
        if features.shape[0] != rows:
            raise ValueError(f"views has {features.shape[0]} rows and the batch {rows}.")
        missing = max(0, (self.base.config.num_image_views or 0) - features.shape[1])
        blank = features.new_zeros(rows, missing, *features.shape[2:])
        prepared = torch.cat([features, blank], dim=1), torch.cat([masks, masks.new_zeros(rows, missing)], dim=1)
        scope.enter_context(patched(self.base, "_prepare_images", lambda _batch: prepared))
        scope.enter_context(patched(self._vlm, "get_image_features", _as_image_features))

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
        self, batch: Batch, action: Float[Tensor, "batch steps dim"]
    ) -> Float[Tensor, "batch steps action_dim"]:
        policy, model = self.base, self.base.model
        rows, device = action.shape[0], action.device
        proprio = policy._prepare_state(batch, rows, device)
        _, clean = model.action_space.preprocess(proprio, policy._prepare_action_targets({ACTION: action}))
        padding = clean.new_zeros(*clean.shape[:2], model.dim_proprio + model.transformer.dim_time)
        inputs = torch.cat([clean, padding], dim=-1).to(model._get_target_dtype())
        return model.transformer.action_encoder(inputs, policy._get_domain_id(batch, rows, device)).float()

    def _check(self, batch: Batch, training: bool, with_images: bool) -> None:
        self.check_action_dims(batch)
        state = [OBS_STATE] if self.base.config.use_proprio else []
        require_keys(batch, [*state, OBS_LANGUAGE_TOKENS, *([ACTION] if training else [])], self.family)
        refuse_stacked_frames(batch, state, single_frame_ndim=2)
        if with_images:
            self._check_images(batch)

    def _check_images(self, batch: Batch) -> None:
        # A checkpoint may list cameras that this robot lacks: X-VLA skips those, but needs one.
        cameras = self.target_keys()
        if not any(key in batch for key in cameras):
            require_keys(batch, cameras, self.family)
        refuse_stacked_frames(batch, cameras, single_frame_ndim=4)


def _per_step(compute_loss: ActionLoss) -> ActionLoss:
    """An action space's loss with its components summed, for every (row, step) by itself."""

    def of_one_step(predicted: Float[Tensor, " dim"], target: Float[Tensor, " dim"]) -> Float[Tensor, ""]:
        components = compute_loss(predicted[None, None], target[None, None])
        return torch.stack(list(components.values())).sum()

    def of_all(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": torch.func.vmap(torch.func.vmap(of_one_step))(predicted.float(), target.float())}

    return of_all


@contextmanager
def _captured_context(transformer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Encoder states and the other cameras' tokens of each call of the transformer."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        calls.append((kwargs["vlm_features"], kwargs["aux_visual_inputs"]))
        return args, kwargs

    with edited_call(transformer, record):
        yield calls


def _flatten_map(feature_map: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches channels"]:
    return feature_map.flatten(2).transpose(1, 2)


def _as_image_features(features: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=features)
