"""Tiny diffusion policies: one and two observation steps, shared and separate encoders, from states alone."""

from dataclasses import dataclass
from typing import Any

import torch
from family import CHUNK, ENV, STATE, TOP, WRIST, Family
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.pretrained import PreTrainedPolicy


@dataclass(frozen=True)
class SteppedFamily(Family):
    """A family whose states keep their time axis when there is one observation step, as LeRobot's datasets give it."""

    def batch(self, policy: PreTrainedPolicy, rows: int = 4, seed: int = 0) -> dict[str, Any]:
        batch = super().batch(policy, rows, seed)
        if self.observation_steps == 1:
            batch |= {key: batch[key].unsqueeze(1) for key in (STATE, ENV) if key in batch}
        return batch


def build_diffusion(features: Any, *, n_obs_steps: int = 2, horizon: int = CHUNK, **settings: Any) -> DiffusionPolicy:
    """A U-Net of one level over LeRobot's ResNet-18; group norm, so that a row's features are its own."""
    inputs, outputs = features
    tiny: dict[str, Any] = {
        "pretrained_backbone_weights": None,
        "use_group_norm": True,
        "use_separate_rgb_encoder_per_camera": False,
        "spatial_softmax_num_keypoints": 8,
        "down_dims": (32,),
        "n_groups": 4,
        "diffusion_step_embed_dim": 16,
        "num_inference_steps": 2,
        "push_to_hub": False,
    }
    config = DiffusionConfig(
        input_features=dict(inputs),
        output_features=dict(outputs),
        n_obs_steps=n_obs_steps,
        horizon=horizon,
        n_action_steps=horizon - n_obs_steps + 1,
        device="cpu",
        **{**tiny, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiffusionPolicy(config)


_DIFFUSION: dict[str, Any] = {
    "build": build_diffusion,
    "lora": r".*(down_modules\.0\.0\.residual_conv|cond_encoder\.1|final_conv\.1)",
    "core": "diffusion.unet",
    "context_reads_belief": False,
    "image_size": 48,
    "checkpoints": True,
    "compiles": True,
}
_SHARED = {**_DIFFUSION, "tower": "diffusion.rgb_encoder.backbone.0"}

FAMILIES = (
    SteppedFamily("diffusion", settings={"n_obs_steps": 1}, masks_padding=False, **_SHARED),
    SteppedFamily(
        "diffusion-history",
        cameras=(TOP, WRIST),
        settings={"do_mask_loss_for_padding": True, "prediction_type": "sample"},
        observation_steps=2,
        **_SHARED,
    ),
    SteppedFamily(
        "diffusion-separate",
        cameras=(TOP, WRIST),
        env_state=True,
        settings={"use_separate_rgb_encoder_per_camera": True, "crop_shape": (40, 40), "crop_is_random": False},
        observation_steps=2,
        reads=(STATE, ENV),
        masks_padding=False,
        **_DIFFUSION,
    ),
    SteppedFamily(
        "diffusion-state",
        cameras=(),
        env_state=True,
        settings={"do_mask_loss_for_padding": True},
        observation_steps=2,
        reads=(STATE, ENV),
        **_DIFFUSION,
    ),
)
