"""SmolVLA, with cameras or without: a SmolVLM backbone whose hidden states condition a flow-matching action expert."""

from collections.abc import Iterable

from jaxtyping import Float
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ptr_hf.policies.base import AdapterBase, part
from ptr_hf.policies.flow_vla import FlowVLAAdapter, Images
from ptr_hf.policies.tower import VisionTower, projector_tower
from ptr_hf.policies.trace import Batch


class SmolVLAAdapter(FlowVLAAdapter):
    """Reads a `SmolVLAPolicy` (lerobot 0.6.1) as `FlowVLAAdapter` says; its prefix is images, instruction and state.

    The state has attention flag 1 and ends the prefix: belief tokens appended after it would join the state's block,
    which is why they are prepended. `SmolVLAPolicy.forward` waits for the device four times to log.
    """

    family = "smolvla"
    language_models = ("model.vlm_with_expert.vlm.model.text_model", "model.vlm_with_expert.lm_expert")
    _experts = part("model.vlm_with_expert")
    _vision = part("model.vlm_with_expert.vlm.model.vision_model")

    def gradient_checkpointing_enable(self) -> None:
        """Of the vision tower alone: LeRobot runs the language layers in a loop of its own, which has none."""
        if self.tower_is_frozen():
            raise ValueError(
                "SmolVLA's vision tower, the only part with gradient checkpointing, is frozen and keeps no activations: leave "
                "gradient checkpointing out."
            )
        self._vision.gradient_checkpointing_enable({"use_reentrant": False})

    def _images(self, batch: Batch) -> Images:
        return self.base.prepare_images(batch)

    def _blank_cameras(self, missing: int) -> int:
        return min(missing, int(self.base.config.empty_cameras))

    def _losses(
        self, images: Images, batch: Batch, action: Float[Tensor, "batch steps dim"]
    ) -> Float[Tensor, "batch steps padded_dim"]:
        return self.base.model.forward(
            *images,
            batch[OBS_LANGUAGE_TOKENS],
            batch[OBS_LANGUAGE_ATTENTION_MASK],
            self._state(batch),
            self.base.prepare_action({ACTION: action}),
        )

    def _state(self, batch: Batch) -> Float[Tensor, "batch state_dim"]:
        state = batch[OBS_STATE]
        if self.base.config.adapt_to_pi_aloha:
            state = self.base._pi_aloha_decode_state(state.clone())
        return self.base.prepare_state({OBS_STATE: state})

    def _action(self, action: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps dim"]:
        if self.base.config.adapt_to_pi_aloha:
            return self.base._pi_aloha_encode_actions_inv(action.clone())
        return action


class SmolVLAStateAdapter(SmolVLAAdapter):
    """Reads a `SmolVLAStatePolicy`: as SmolVLA, with a prefix of instruction and state alone.

    The consequence tower is the policy's own state projector: one layer, one token.
    """

    family = "smolvla_state"

    @property
    def tower(self) -> VisionTower:
        """The state projector, as wide as the text model."""
        return projector_tower(self.base.model.state_proj, self.context_dim)

    def target_keys(self) -> tuple[str, ...]:
        """The state."""
        return (OBS_STATE,)

    def gradient_checkpointing_enable(self) -> None:
        """There is no vision tower, the only part of SmolVLA that has it."""
        AdapterBase.gradient_checkpointing_enable(self)

    def compilable(self) -> Iterable[nn.Module]:
        """The MLPs of both language models."""
        return self._language_mlps()

    def _prepared(self, key: str, image: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *input"]:
        """A normalised state (batch, state_dim), padded by the policy itself."""
        return self._state({OBS_STATE: image})

    def _tokens(self, states: Float[Tensor, "rows target_dim"], rows: int) -> Float[Tensor, "rows 1 target_dim"]:
        return states.unsqueeze(1)
