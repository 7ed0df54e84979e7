"""Tiny EVO1 policies over a tiny InternVL3 in a local folder."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from families_smolvla import vlm_folder
from family import ACTION_DIM, CHUNK, STATE_DIM, TOP, WRIST, Family
from lerobot.policies.evo1.configuration_evo1 import Evo1Config
from lerobot.policies.evo1.modeling_evo1 import Evo1Policy
from lerobot.policies.pretrained import PreTrainedPolicy
from transformers import AutoTokenizer, InternVLConfig, InternVLModel, Qwen2Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

IMAGE_SIZE, PATCH_SIZE = 32, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2


@cache
def internvl_folder() -> Path:
    """Config, random weights and tokenizer of transformers' own InternVL, small."""
    folder = Path(mkdtemp(prefix="tiny_internvl_"))
    tokenizer = AutoTokenizer.from_pretrained(vlm_folder())
    tokenizer.add_tokens(["<IMG_CONTEXT>", "<img>", "</img>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=IMAGE_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        InternVLModel(config).save_pretrained(folder)
    return folder


def build_evo1(features: Any, **settings: Any) -> PreTrainedPolicy:
    """Sizes as small as they go, and as many views as cameras."""
    sizes: dict[str, Any] = {
        "training_stage": "stage2",
        "max_state_dim": STATE_DIM + 2,
        "max_action_dim": ACTION_DIM,
        "max_views": sum("image" in key for key in features[0]),
        "image_resolution": (IMAGE_SIZE, IMAGE_SIZE),
        "vlm_num_layers": 2,
        "vlm_dtype": "float32",
        "use_flash_attn": False,
        "enable_gradient_checkpointing": False,
        "embed_dim": 32,
        "hidden_dim": 32,
        "state_hidden_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "num_inference_timesteps": 2,
    }
    config = Evo1Config(
        input_features=dict(features[0]),
        output_features=dict(features[1]),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        vlm_model_name=str(internvl_folder()),
        device="cpu",
        push_to_hub=False,
        **{**sizes, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Evo1Policy(config)


def half(policy: PreTrainedPolicy) -> None:
    """As `vlm_dtype="bfloat16"` does: the backbone, not the head."""
    policy.model.embedder.model.to(torch.bfloat16)
    policy.model.embedder.model_dtype = torch.bfloat16


_EVO1 = {
    "build": build_evo1,
    "lora": r".*(action_encoder\.W1\.linear|mlp_head\.fc2\.linear|language_model.*[qv]_proj)",
    "tower": "model.embedder.model.vision_tower.embeddings",
    "image_size": IMAGE_SIZE,
    "waits": True,
    "pickles": False,  # transformers' hooks on the layers are closures
    "half": half,
    "checkpoints": True,
    "compiles": True,
}

FAMILIES = (
    Family("evo1", **_EVO1),
    Family("evo1-two-cameras", cameras=(TOP, WRIST), **_EVO1),
    Family("evo1-frozen", settings={"training_stage": "stage1"}, **{**_EVO1, "checkpoints": False}),
)
