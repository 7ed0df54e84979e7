"""Tiny pi0-FAST policies: LeRobot's class with a FAST tokenizer without merges, so that every chunk has as many tokens."""

from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from families_openpi import half_openpi, small_gemma, small_paligemma
from families_smolvla import vlm_folder
from family import ACTION_DIM, CHUNK, TOP, WRIST, Family
from lerobot.policies.pi0_fast import modeling_pi0_fast, processor_pi0_fast
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import ActionTokenizerProcessorStep
from scipy.fftpack import dct
from torch import Tensor, nn
from transformers import AutoTokenizer

LEVELS = 64
TOKENS = CHUNK * ACTION_DIM + 24  # and the frame around them


class Letters:
    """The last stage of FAST: integers as letters, here without byte-pair merges."""

    def decode(self, tokens: Tensor) -> str:
        return "".join(chr(int(token)) for token in tokens.clamp(0, LEVELS - 1))


class TinyFast:
    """FAST as its paper defines it: the rounded discrete cosine transform of a normalised chunk."""

    scale, min_token = 6.0, -LEVELS // 2
    bpe_tokenizer = Letters()

    def __call__(self, actions: Tensor) -> list[list[int]]:
        coefficients = np.round(dct(actions.numpy(), axis=1, norm="ortho") * self.scale) - self.min_token
        return [row.clip(0, LEVELS - 1).astype(int).tolist() for row in coefficients.reshape(len(actions), -1)]


@cache
def text_folder() -> Path:
    """The byte-level tokenizer of the tiny VLM, with the begin token that pi0-FAST wants."""
    tokenizer = AutoTokenizer.from_pretrained(vlm_folder())
    tokenizer.bos_token = tokenizer.eos_token
    folder = Path(mkdtemp(prefix="tiny_fast_"))
    tokenizer.save_pretrained(folder)
    return folder


def local_action_tokenizer(action_tokenizer_name: str, **settings: Any) -> ActionTokenizerProcessorStep:
    return ActionTokenizerProcessorStep(action_tokenizer_input_object=TinyFast(), **settings)


# LeRobot loads FAST as code from its hub page.
processor_pi0_fast.ActionTokenizerProcessorStep = local_action_tokenizer


def build_pi0_fast(features: Any, **settings: Any) -> PreTrainedPolicy:
    """A policy small enough for hundreds of forwards in a minute."""
    inputs, outputs = features
    config = PI0FastConfig(
        input_features=dict(inputs),
        output_features=dict(outputs),
        **{
            "chunk_size": CHUNK,
            "n_action_steps": CHUNK,
            "max_state_dim": 16,
            "max_action_dim": 16,
            "max_action_tokens": TOKENS,
            "max_decoding_steps": 12,
            "fast_skip_tokens": 0,
            "validate_action_token_prefix": False,
            "text_tokenizer_name": str(text_folder()),
            "image_resolution": (32, 32),
            "tokenizer_max_length": 128,
            "device": "cpu",
            "push_to_hub": False,
            "optimizer_lr": 1e-3,
            **settings,
        },
    )

    def paligemma(config: Any) -> nn.Module:
        config.vision_config.image_size = 32
        return small_paligemma(config)

    processor = SimpleNamespace(from_pretrained=lambda *_, **__: TinyFast())
    with (
        torch.random.fork_rng(devices=[]),
        patch.multiple(
            modeling_pi0_fast,
            AutoProcessor=processor,
            get_gemma_config=partial(small_gemma, modeling=modeling_pi0_fast),
            PaliGemmaForConditionalGenerationWithPiGemma=paligemma,
        ),
    ):
        torch.manual_seed(0)
        policy = modeling_pi0_fast.PI0FastPolicy(config)
        for module in policy.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return policy


_FAST = {
    "build": build_pi0_fast,
    "lora": r".*(language_model.*[qv]_proj|embed_tokens)",
    "tower": "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings",
    "masks_padding": False,
    "reads": (),
    "targets": ("action.tokens", "action.token_mask"),
    "action_tokens": TOKENS,
    "pickles": False,
    "half": half_openpi,
    "checkpoints": True,
    "compiles": True,
}

FAMILIES = (
    Family("pi0_fast", **_FAST),
    Family(
        "pi0_fast-two-cameras",
        cameras=(TOP, WRIST),
        settings={"use_kv_cache": False, "empty_cameras": 1},
        **_FAST,
    ),
)
