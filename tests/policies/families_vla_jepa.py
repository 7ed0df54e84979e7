"""Tiny VLA-JEPA policies."""

from typing import Any

import torch
from family import CHUNK, TOP, WRIST, Family
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.vla_jepa import modeling_vla_jepa
from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig
from lerobot.policies.vla_jepa.modeling_vla_jepa import VLAJEPAPolicy
from tiny_qwen3vl import DIM, qwen_folder

# LeRobot runs the backbone under bfloat16 autocast where a device has it: without, as on Apple's, numbers can be compared.
modeling_vla_jepa.is_amp_available = lambda _device: False


def build_vla_jepa(features: Any, **settings: Any) -> PreTrainedPolicy:
    inputs, outputs = features
    config = VLAJEPAConfig(
        input_features=inputs,
        output_features=outputs,
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        qwen_model_name=str(qwen_folder()),
        torch_dtype="float32",
        action_model_type="DiT-test",
        action_hidden_size=DIM,
        action_num_layers=2,
        num_action_tokens_per_timestep=2,
        num_embodied_action_tokens_per_instruction=3,
        num_inference_timesteps=2,
        num_video_frames=4,
        device="cpu",
        push_to_hub=False,
        **{"enable_world_model": False, "repeated_diffusion_steps": 2, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VLAJEPAPolicy(config)


_VLA_JEPA: dict[str, Any] = {
    "build": build_vla_jepa,
    "lora": r".*(action_encoder\.layer[123]|action_decoder\.layer[12]|attn1\.to_[qv]|language_model.*[qv]_proj)",
    "tower": "model.qwen.model.model.visual.patch_embed",
    "waits": True,
    "checkpoints": True,
    "compiles": True,
}

FAMILIES = (
    Family("vla_jepa", **_VLA_JEPA),
    Family("vla_jepa-two-cameras", cameras=(TOP, WRIST), settings={"repeated_diffusion_steps": 1}, **_VLA_JEPA),
    Family("vla_jepa-frozen", settings={"freeze_qwen": True}, **_VLA_JEPA),
)
