"""Tiny SmolVLA policies, with cameras and without."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from family import CHUNK, TASKS, TOP, WRIST, Family
from lerobot.policies.pretrained import PreTrainedPolicy

from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm


@cache
def vlm_folder() -> Path:
    """A SmolVLM small enough for hundreds of forwards in a minute."""
    return write_tiny_vlm(
        mkdtemp(prefix="tiny_vlm_"),
        image_size=32,
        patch_size=8,
        vision_dim=32,
        text_dim=32,
        text_layers=2,
        texts=TASKS,
    )


def build_smolvla(features: Any, **settings: Any) -> PreTrainedPolicy:
    return tiny_smolvla(features, vlm_folder(), chunk_size=CHUNK, num_steps=2, **settings)


def half_vlm(policy: PreTrainedPolicy) -> None:
    """As LeRobot loads the VLM; the expert and the projections stay in float32."""
    policy.model.vlm_with_expert.vlm.to(torch.bfloat16)


_SMOLVLA = {
    "half": half_vlm,
    "compiles": True,
    "build": build_smolvla,
    "lora": r".*(action_in_proj|action_out_proj|state_proj|lm_expert.*[qv]_proj)",
    "tower": "model.vlm_with_expert.vlm.model.vision_model.embeddings",
}
_STATE = {
    "build": build_smolvla,
    "cameras": (),
    "lora": r".*(action_in_proj|action_out_proj|lm_expert.*[qv]_proj)",
    "half": half_vlm,
    "compiles": True,
}

FAMILIES = (
    Family("smolvla", checkpoints=True, **_SMOLVLA),
    Family("smolvla-two-cameras", cameras=(TOP, WRIST), settings={"empty_cameras": 1}, checkpoints=True, **_SMOLVLA),
    Family("smolvla-frozen", settings={"freeze_vision_encoder": True, "train_expert_only": True}, **_SMOLVLA),
    Family("smolvla_state", **_STATE),
    Family("smolvla_state-frozen", settings={"train_state_proj": False, "expert_width_multiplier": 1.0}, **_STATE),
)
