"""Multi-Task DiT: a diffusion transformer under CLIP image, CLIP text and state conditioning."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from jaxtyping import Float, Float32
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ptr_hf.policies.base import AdapterBase, part
from ptr_hf.policies.batches import require_keys
from ptr_hf.policies.conditioned import ConditionedAdapter
from ptr_hf.policies.hooks import patched
from ptr_hf.policies.tower import VisionTower, transformer_tower
from ptr_hf.policies.trace import Batch


class MultiTaskDiTAdapter(ConditionedAdapter):
    """Reads a `MultiTaskDiTPolicy` (lerobot 0.6.1) with either objective, with cameras or from states alone.

    As `ConditionedAdapter` says: H_t is the conditioning, one token per observation step, and the belief's mean is added to it.

    A_t is the clean chunk through `noise_predictor.input_proj`, C_t the input of `output_proj`. The belief is added to
    the conditioning rather than appended as tokens: the transformer's tokens are action steps, rotary positions reach no
    further than the horizon, and the conditioning already enters every block. A policy straight from initialisation
    ignores its conditioning (AdaLN-zero), belief included, until its modulation has trained.

    The consequence tower is the CLIP vision tower, one per camera where the policy has separate encoders; its tokens
    include the class token. A policy without cameras feeds its state raw, so that state, normalised, is the target.
    """

    family = "multi_task_dit"
    condition = "conditioning_vec"
    state_target = OBS_STATE
    observations = (OBS_STATE,)
    action_dim = part("config.hidden_dim")
    _denoiser = part("noise_predictor")
    _sampler = part("objective")
    _action_out = part("noise_predictor.output_proj")

    @property
    def context_dim(self) -> int:
        """Width of one observation step's conditioning: state, every camera's class token, instruction."""
        return int(self._denoiser.conditioning_dim) // self._steps

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the CLIP vision layers in the backward pass; the transformer has no such switch."""
        if not self._cameras:
            AdapterBase.gradient_checkpointing_enable(self)
        for encoder in self._encoders:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})

    def compilable(self) -> Iterable[nn.Module]:
        """The transformer's blocks, the CLIP text tower, attention and MLP of the vision layers."""
        yield from self._denoiser.transformer_blocks
        yield self.base.observation_encoder.text_encoder.text_encoder
        for encoder in self._encoders:
            for layer in encoder.model.vision_model.encoder.layers:
                yield from (layer.self_attn, layer.mlp)

    @property
    def _image_encoder(self) -> Any:
        observation = self.base.observation_encoder
        separate = self.base.config.use_separate_rgb_encoder_per_camera
        return observation.vision_encoders if separate else observation.vision_encoder

    def _frames(
        self, batch: Batch, steps: int, with_images: bool = True
    ) -> dict[str, Float[Tensor, "batch steps ..."]]:
        frames = super()._frames(batch, steps, with_images)
        # without its tokens the policy would leave the instruction out and fail on the width
        require_keys(batch, [OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK], self.family)
        return frames

    def _enter_views(self, scope: ExitStack) -> None:
        super()._enter_views(scope)
        scope.enter_context(patched(self.base.observation_encoder, "_apply_preprocessing", self._from_features))

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float32[Tensor, "batch steps action_dim"]:
        return self._denoiser.input_proj(action).float()

    def _tower_in(self, encoder: Any) -> VisionTower:
        stem = ("embeddings", "pre_layrnorm")
        return transformer_tower(encoder.model.vision_model, stem, "encoder.layers", ("post_layernorm",))

    def _encode(
        self, encoder: Any, images: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows dim 1 1"]:
        return encoder(self.base.observation_encoder._apply_preprocessing(images))

    def _prepared(self, key: str, image: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *input"]:
        observation = self.base.observation_encoder
        image = observation.resize(image) if observation.do_resize else image
        return observation.center_crop(image) if observation.do_crop else image

    def _crops_at_random(self, encoder: Any) -> bool:
        observation = self.base.observation_encoder
        return observation.training and observation.do_crop and self.base.config.image_crop_is_random
