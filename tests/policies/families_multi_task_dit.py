"""Tiny multi-task DiT policies with both objectives over a tiny CLIP."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from families_diffusion import SteppedFamily
from family import CHUNK, TOP, WRIST
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS, IMAGE_SIZE = 32, 32


@cache
def clip_folder() -> Path:
    """Weights and tokenizer of a CLIP with one letter a token; LeRobot wants "clip" in the name."""
    folder = Path(mkdtemp(prefix="tiny_clip_"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**size, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder


def build_multi_task_dit(features: Any, *, n_obs_steps: int = 2, **settings: Any) -> MultiTaskDiTPolicy:
    """Two blocks whose AdaLN-zero modulation is drawn away from zero, as training would leave it."""
    inputs, outputs = features
    tiny: dict[str, Any] = {
        "hidden_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "timestep_embed_dim": 16,
        "image_crop_shape": None,
        "num_inference_steps": 2,
        "num_integration_steps": 2,
        "push_to_hub": False,
    }
    config = MultiTaskDiTConfig(
        input_features=dict(inputs),
        output_features=dict(outputs),
        n_obs_steps=n_obs_steps,
        horizon=CHUNK,
        n_action_steps=CHUNK - n_obs_steps + 1,
        vision_encoder_name=str(clip_folder()),
        text_encoder_name=str(clip_folder()),
        tokenizer_max_length=MAX_TOKENS,
        device="cpu",
        **{**tiny, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = MultiTaskDiTPolicy(config)
        for block in policy.noise_predictor.transformer_blocks:
            nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.05)
            nn.init.normal_(block.adaLN_modulation[-1].bias, std=0.05)
    return policy


@torch.no_grad()
def generate(policy: MultiTaskDiTPolicy, batch: dict[str, Any]) -> Tensor:
    """The sampling behind `predict_action_chunk`, which reads nothing but queues that `select_action` fills."""
    return policy._generate_actions(policy._prepare_batch(batch))


_DIT: dict[str, Any] = {
    "build": build_multi_task_dit,
    "lora": r".*(input_proj|output_proj|qkv_proj|blocks\.\d\.mlp\.0)",
    "core": "noise_predictor",
    "context_reads_belief": False,
    "predict": generate,
    "image_size": IMAGE_SIZE,
    "checkpoints": True,
    "compiles": True,
}
_SHARED = {**_DIT, "tower": "observation_encoder.vision_encoder.model.vision_model.embeddings"}

FAMILIES = (
    SteppedFamily("multi_task_dit", settings={"n_obs_steps": 1}, masks_padding=False, **_SHARED),
    SteppedFamily(
        "multi_task_dit-flow",
        cameras=(TOP, WRIST),
        settings={"objective": "flow_matching", "do_mask_loss_for_padding": True},
        observation_steps=2,
        **_SHARED,
    ),
    SteppedFamily(
        "multi_task_dit-separate",
        cameras=(TOP, WRIST),
        settings={
            "objective": "flow_matching",
            "use_separate_rgb_encoder_per_camera": True,
            "use_rope": False,
            "use_positional_encoding": True,
            "integration_method": "rk4",
            "timestep_sampling_strategy": "uniform",
        },
        observation_steps=2,
        masks_padding=False,
        **_DIT,
    ),
    SteppedFamily(
        "multi_task_dit-state",
        cameras=(),
        settings={"do_mask_loss_for_padding": True, "prediction_type": "sample"},
        observation_steps=2,
        **{**_DIT, "checkpoints": False},
    ),
)
