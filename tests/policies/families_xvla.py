"""Tiny X-VLA policies."""

from typing import Any

import torch
from families_smolvla import vlm_folder
from family import ACTION_DIM, CHUNK, STATE_DIM, TOP, WRIST, Family
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

FLORENCE = {
    "vision_config": {
        "depths": [1, 2],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "drop_path_rate": 0.0,  # a tower that draws random numbers cannot run once for several chunks and equal them
        "projection_dim": 32,
        "max_position_embeddings": 8,
        "max_temporal_embeddings": 4,
    },
    "text_config": {
        "vocab_size": 512,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    },
}


def build_xvla(features: Any, **settings: Any) -> PreTrainedPolicy:
    """Sizes as small as they go; the action space pads this robot's actions from 14 to 16 unless told otherwise."""
    sizes: dict[str, Any] = {
        "florence_config": FLORENCE,
        "action_mode": "auto",
        "max_action_dim": ACTION_DIM + 2,
        "max_state_dim": STATE_DIM + 2,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "num_domains": 3,
        "len_soft_prompts": 2,
        "dim_time": 8,
        "max_len_seq": 128,
        "num_denoising_steps": 2,
        "tokenizer_max_length": 12,
    }
    config = XVLAConfig(
        input_features=dict(features[0]),
        output_features=dict(features[1]),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        tokenizer_name=str(vlm_folder()),
        device="cpu",
        push_to_hub=False,
        **{**sizes, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return XVLAPolicy(config)


def half(policy: PreTrainedPolicy) -> None:
    """As `dtype="bfloat16"` does: all of the policy, heads included."""
    policy.config.dtype = "bfloat16"
    policy.model._apply_dtype()


_XVLA = {
    "build": build_xvla,
    "lora": r".*(action_encoder\.fc|action_decoder\.fc|encoder.*[qv]_proj|transformer\.blocks.*qkv)",
    "tower": "model.vlm.vision_tower.convs.0",
    "masks_padding": False,
    "waits": True,
    "half": half,
    "checkpoints": True,
    "compiles": True,
}

FAMILIES = (
    Family("xvla", **_XVLA),
    Family("xvla-two-cameras", cameras=(TOP, WRIST), settings={"num_image_views": 3, "action_mode": "joint"}, **_XVLA),
    Family(
        "xvla-frozen",
        settings={"freeze_vision_encoder": True, "freeze_language_encoder": True, "use_hetero_proj": True},
        **_XVLA,
    ),
)
