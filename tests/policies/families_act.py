"""Tiny ACT policies: with and without the variational objective, and from states alone."""

from typing import Any

from family import CHUNK, TOP, WRIST, Family
from lerobot.policies.pretrained import PreTrainedPolicy

from ptr_hf.policies.tiny import tiny_act


def build_act(features: Any, **settings: Any) -> PreTrainedPolicy:
    return tiny_act(features, chunk_size=CHUNK, dim_model=32, **settings)


_ACT = {
    "build": build_act,
    "lora": r".*(action_head|linear1|action_input_proj)",
    "tower": "model.backbone.conv1",
    "regression": True,
    "compiles": True,
}

FAMILIES = (
    Family("act", cameras=(TOP, WRIST), **_ACT),
    Family("act-vae", settings={"use_vae": True, "n_decoder_layers": 2}, **_ACT),
    Family("act-state", cameras=(), env_state=True, **{**_ACT, "tower": None}),
)
