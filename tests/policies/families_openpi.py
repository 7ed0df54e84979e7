"""Tiny pi0 and pi0.5 policies: LeRobot's classes with sizes, vocabulary and tokenizer that it hard-codes replaced."""

from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from families_smolvla import vlm_folder
from family import CHUNK, TOP, WRIST, Family
from lerobot.policies.pi0 import modeling_pi0, processor_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05, processor_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import TokenizerProcessorStep
from torch import nn
from transformers import AutoTokenizer

WIDTH = 32


def small_paligemma(config: Any) -> nn.Module:
    config.text_config.vocab_size = len(AutoTokenizer.from_pretrained(vlm_folder()))
    config.text_config.max_position_embeddings = 512
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.vision_config.update({**vision, "patch_size": 8, "projection_dim": WIDTH})
    return PaliGemmaForConditionalGenerationWithPiGemma(config=config)


def small_expert(config: Any) -> nn.Module:
    config.vocab_size = 2
    return PiGemmaForCausalLM(config=config)


def small_gemma(variant: str, modeling: ModuleType) -> Any:
    # LeRobot's attention assumes 8 heads.
    return modeling.GemmaConfig(width=WIDTH, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=8)


def local_tokenizer(tokenizer_name: str, **settings: Any) -> TokenizerProcessorStep:
    return TokenizerProcessorStep(tokenizer_name=str(vlm_folder()), **settings)


# The name of the tokenizer is written into both processors.
processor_pi0.TokenizerProcessorStep = processor_pi05.TokenizerProcessorStep = local_tokenizer


def build_openpi(features: Any, version: str, **settings: Any) -> PreTrainedPolicy:
    """A policy small enough for hundreds of forwards in a minute."""
    modeling, config_class = {"pi0": (modeling_pi0, PI0Config), "pi05": (modeling_pi05, PI05Config)}[version]
    inputs, outputs = features
    config = config_class(
        input_features=dict(inputs),
        output_features=dict(outputs),
        **{
            "chunk_size": CHUNK,
            "n_action_steps": CHUNK,
            "max_state_dim": 16,
            "max_action_dim": 16,
            "image_resolution": (32, 32),
            "num_inference_steps": 2,
            "tokenizer_max_length": 48 if version == "pi0" else 128,
            "device": "cpu",
            "push_to_hub": False,
            "optimizer_lr": 1e-3,
            **settings,
        },
    )
    with (
        torch.random.fork_rng(devices=[]),
        patch.multiple(
            modeling,
            get_gemma_config=partial(small_gemma, modeling=modeling),
            PaliGemmaForConditionalGenerationWithPiGemma=small_paligemma,
            PiGemmaForCausalLM=small_expert,
        ),
    ):
        torch.manual_seed(0)
        policy = (modeling.PI0Policy if version == "pi0" else modeling.PI05Policy)(config)
        for module in policy.modules():
            # transformers draws at std 0.02, and adaptive norms at 0: too faint to tell inputs apart.
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return policy


def half_openpi(policy: PreTrainedPolicy) -> None:
    """What `dtype="bfloat16"` does at construction."""
    policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")


_OPENPI = {
    "build": build_openpi,
    "tower": "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings",
    "masks_padding": False,
    "pickles": False,  # PiGemma's layer class is local to a function
    "half": half_openpi,
    "checkpoints": True,
    "compiles": True,
}
_PI0 = {**_OPENPI, "lora": r".*(action_in_proj|action_out_proj|state_proj|gemma_expert.*[qv]_proj)"}
_PI05 = {**_OPENPI, "lora": r".*(action_in_proj|action_out_proj|gemma_expert.*[qv]_proj)", "reads": ()}

FAMILIES = (
    Family("pi0", settings={"version": "pi0"}, **_PI0),
    Family(
        "pi0-two-cameras-checkpointed",
        cameras=(TOP, WRIST),
        settings={"version": "pi0", "empty_cameras": 1, "gradient_checkpointing": True},
        **_PI0,
    ),
    Family(
        "pi0-expert-only", settings={"version": "pi0", "freeze_vision_encoder": True, "train_expert_only": True}, **_PI0
    ),
    Family("pi05", cameras=(TOP, WRIST), settings={"version": "pi05"}, **_PI05),
    Family("pi05-frozen", settings={"version": "pi05", "freeze_vision_encoder": True}, **_PI05),
)
