"""SmolVLA, with cameras or without: a SmolVLM backbone whose hidden states condition a flow-matching action expert."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ptr_hf.policies.hooks import AdapterBase, captured_input, captured_output, frozen_copy, patched, preserved_modes
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


class SmolVLAAdapter(AdapterBase):
    """Reads a `SmolVLAPolicy` (lerobot 0.6.1).

    H_t is the text model's final norm over the prefix (images, instruction, state); A_t the clean chunk through
    `action_in_proj`; C_t the input of `action_out_proj`. Belief tokens are prepended to the prefix with attention
    flag 0, so they belong to the block that images and language attend to; appended, they would join the state block.

    Raises:
        ValueError: the policy compiles its forward, which hides the modules that PTR reads.
    """

    family = "smolvla"

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if self.base.config.compile_model:
            raise ValueError("PTR cannot read a compiled SmolVLA forward: set compile_model=False in its config.")

    @property
    def context_dim(self) -> int:
        """Width of H_t: the text model's hidden size."""
        return int(self._experts.config.text_config.hidden_size)

    @property
    def action_dim(self) -> int:
        """Width of A_t: the action expert's hidden size."""
        return int(self._experts.expert_hidden_size)

    @property
    def hidden_dim(self) -> int:
        """Width of C_t: the action expert's hidden size."""
        return self.action_dim

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
        """One forward of the flow-matching loss; see `PolicyAdapter.trace`.

        `SmolVLAPolicy.forward` waits for the device four times to log; its model and helpers are called instead.
        """
        policy, model = self.base, self.base.model
        self._check(batch, training=True, with_images=views is None)
        state, action = self._state(batch), self._action(batch[ACTION])
        with ExitStack() as scope:
            if views is None:
                images, image_masks = policy.prepare_images(batch)
            else:
                images, image_masks = list(views.features.values()), list(views.masks.values())
                if images and images[0].shape[0] != action.shape[0]:
                    raise ValueError(f"views has {images[0].shape[0]} rows and the batch {action.shape[0]}.")
                scope.enter_context(patched(self._experts, "embed_image", _identity))
            prefix_pad = scope.enter_context(self._prefix(belief, belief_mask))
            context = scope.enter_context(captured_output(self._vlm.text_model.norm))
            hidden = scope.enter_context(captured_input(model.action_out_proj))
            losses = model.forward(
                images,
                image_masks,
                batch[OBS_LANGUAGE_TOKENS],
                batch[OBS_LANGUAGE_ATTENTION_MASK],
                state,
                policy.prepare_action({ACTION: action}),
            )
        mask = action_mask(batch, action.shape[1], action.shape[0], action.device)
        return PolicyTrace(
            loss=per_sample_mean(losses[:, :, : action.shape[-1]], mask),
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
        # The Aloha conversion writes into the state, so it gets a copy.
        batch = {**batch, OBS_STATE: batch[OBS_STATE].clone()}
        with (
            preserved_modes(self.policy),
            self.belief_scope(belief),
            captured_input(self.base.model.action_out_proj, keep="last") as hidden,
        ):
            actions = self.base.predict_action_chunk(batch, **kwargs)
        return RolloutTrace(
            actions=actions,
            action_tokens=self._action_tokens(self._action(actions)),
            action_hidden=hidden.value.float(),
            action_mask=torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device),
        )

    @contextmanager
    def belief_scope(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None = None
    ) -> Iterator[None]:
        """Prepend the belief tokens to every prefix that the policy embeds while the scope is open."""
        with self._prefix(belief, mask):
            yield

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Image embeddings (after the connector) of all rows; see `PolicyAdapter.encode_views`."""
        if layer is not None:
            check_layer(layer, self.num_tower_layers())
            if not self.tower_is_frozen():
                raise ValueError("Layer states are shared only while the vision tower is frozen; pass layer=None.")
        self._check_images(batch)
        images, masks = self.base.prepare_images(batch)
        cameras = [key for key in self.base.config.image_features if key in batch]
        names = cameras + [f"{EMPTY_CAMERA}{index}" for index in range(len(images) - len(cameras))]
        features, tower = {}, {}
        for name, image in zip(names, images, strict=True):
            with ExitStack() as scope:
                if layer is not None and name in self.target_keys():
                    block = self._vlm.vision_model.encoder.layers[layer - 1]
                    state = scope.enter_context(captured_output(block))
                features[name] = self._experts.embed_image(image)
                if layer is not None and name in self.target_keys():
                    tower[name] = state.value.detach()
        return Views(features=features, masks=dict(zip(names, masks, strict=True)), tower=tower)

    def target_keys(self) -> tuple[str, ...]:
        """The policy's cameras without the empty ones it fills itself."""
        return tuple(key for key in self.base.config.image_features if not key.startswith(EMPTY_CAMERA))

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the SigLIP tower trains."""
        return not any(parameter.requires_grad for parameter in self._vlm.vision_model.parameters())

    def num_tower_layers(self) -> int:
        """Encoder layers of the SigLIP tower."""
        return len(self._vlm.vision_model.encoder.layers)

    def target_dim(self, layer: int) -> int:
        """Width of the SigLIP tower, the same after every layer."""
        check_layer(layer, self.num_tower_layers())
        return int(self._vlm.vision_model.config.hidden_size)

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The SigLIP tower's first `layer` encoder layers without the final norm; see `PolicyAdapter.build_tower`."""
        check_layer(layer, self.num_tower_layers())
        source = self._vlm.vision_model
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
        for name, value in self._vlm.vision_model.state_dict().items():
            if name.startswith(kept):
                yield name, value

    @torch.no_grad()
    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Tower tokens of one camera's images, prepared (resized, padded, scaled to [-1, 1]) by the policy itself."""
        if key not in self.target_keys():
            raise ValueError(f"{key!r} is not a camera of this policy, which has {', '.join(self.target_keys())}.")
        pixels = self.base.prepare_images({key: image})[0][0]
        dtype = next(tower.parameters()).dtype
        return tower(pixel_values=pixels.to(dtype), patch_attention_mask=None).last_hidden_state

    @property
    def _experts(self) -> Any:
        return self.base.model.vlm_with_expert

    @property
    def _vlm(self) -> Any:
        return self._experts.get_vlm_model()

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

    def _check(self, batch: Batch, training: bool, with_images: bool) -> None:
        keys = [OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK]
        require_keys(batch, [*keys, ACTION] if training else keys, self.family)
        refuse_stacked_frames(batch, [OBS_STATE], single_frame_ndim=2)
        if with_images:
            self._check_images(batch)

    def _check_images(self, batch: Batch) -> None:
        # A checkpoint may list cameras that this robot lacks: SmolVLA skips those, but needs one.
        cameras = self.target_keys()
        if not any(key in batch for key in cameras):
            require_keys(batch, cameras, self.family)
        refuse_stacked_frames(batch, cameras, single_frame_ndim=4)

    def _state(self, batch: Batch) -> Float[Tensor, "batch state_dim"]:
        state = batch[OBS_STATE]
        if self.base.config.adapt_to_pi_aloha:
            state = self.base._pi_aloha_decode_state(state.clone())
        return self.base.prepare_state({OBS_STATE: state})

    def _action(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps dim"]:
        if self.base.config.adapt_to_pi_aloha:
            return self.base._pi_aloha_encode_actions_inv(action.clone())
        return action

    def _action_tokens(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps action_dim"]:
        return self.base.model.action_in_proj(self.base.prepare_action({ACTION: action})).float()


class SmolVLAStateAdapter(SmolVLAAdapter):
    """Reads a `SmolVLAStatePolicy`: as SmolVLA, with a prefix of instruction and state alone.

    The consequence tower is the policy's own state projector: one layer, one token.
    """

    family = "smolvla_state"

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """Views without images, with the state's token when a layer is asked for; see `PolicyAdapter.encode_views`."""
        require_keys(batch, [OBS_STATE], self.family)
        if layer is None:
            return Views(features={}, masks={})
        check_layer(layer, self.num_tower_layers())
        if not self.tower_is_frozen():
            raise ValueError("Layer states are shared only while the state projector is frozen; pass layer=None.")
        return Views(
            features={}, masks={}, tower={OBS_STATE: self.encode_image(self._tower(), OBS_STATE, batch[OBS_STATE])}
        )

    def target_keys(self) -> tuple[str, ...]:
        """The state."""
        return (OBS_STATE,)

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the state projector trains."""
        return not any(parameter.requires_grad for parameter in self.base.model.state_proj.parameters())

    def num_tower_layers(self) -> int:
        """The state projector."""
        return 1

    def target_dim(self, layer: int) -> int:
        """Width of the state projector, which is that of the text model."""
        check_layer(layer, self.num_tower_layers())
        return self.context_dim

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The state projector; see `PolicyAdapter.build_tower`."""
        check_layer(layer, self.num_tower_layers())
        return self._tower() if share else frozen_copy(self._tower())

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """The live state projector's parameters under the names of `build_tower(layer).state_dict()`."""
        check_layer(layer, self.num_tower_layers())
        return self._tower().state_dict().items()

    @torch.no_grad()
    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """The one token of a normalised state (batch, state_dim), padded by the policy itself."""
        if key != OBS_STATE:
            raise ValueError(f"{key!r} is not a target feature of this policy, which has {OBS_STATE}.")
        state = self._state({OBS_STATE: image})
        return tower(state.to(next(tower.parameters()).dtype)).unsqueeze(1)

    def _tower(self) -> nn.Module:
        return nn.Sequential(OrderedDict(projection=self.base.model.state_proj))

    def _check_images(self, batch: Batch) -> None:
        """There are none to check."""


def _identity(image: Tensor) -> Tensor:
    return image
