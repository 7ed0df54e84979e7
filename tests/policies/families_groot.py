"""Tiny GR00T N1.7 policies."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from family import CHUNK, TOP, WRIST, Family
from lerobot.configs import PolicyFeature
from lerobot.policies.groot import processor_groot
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.groot.groot_n1_7 import GR00TN17, CategorySpecificLinear, GR00TN17Config
from lerobot.policies.groot.modeling_groot import GrootPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from tiny_qwen3vl import DIM, qwen_folder
from torch import nn

from ptr_hf.policies.groot import PIXELS, GrootAdapter

MAX_DIM, HORIZON = 16, CHUNK + 2


@cache
def groot_folder() -> Path:
    """A checkpoint laid out like NVIDIA's: model, and a processor that makes 32-pixel images."""
    # LeRobot's preprocessor names the backbone's processor itself.
    processor_groot.GROOT_N1_7_BACKBONE_MODEL = str(qwen_folder())
    folder = Path(mkdtemp(prefix="tiny_groot_"))
    attention = {"positional_embeddings": None, "num_attention_heads": 2, "attention_head_dim": DIM // 2}
    config = GR00TN17Config(
        model_name=str(qwen_folder()),
        backbone_embedding_dim=DIM,
        select_layer=2,
        max_state_dim=MAX_DIM,
        max_action_dim=MAX_DIM,
        action_horizon=HORIZON,
        hidden_size=DIM,
        input_embedding_dim=DIM,
        diffusion_model_cfg={
            **attention,
            "num_layers": 4,
            "norm_type": "ada_norm",
            "dropout": 0.2,
            "final_dropout": True,
            "output_dim": DIM,
            "interleave_self_attention": True,
        },
        vl_self_attention_cfg={**attention, "num_layers": 1, "dropout": 0.2, "final_dropout": True},
        max_seq_len=64,
        num_inference_timesteps=2,
        model_dtype="float32",
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GR00TN17(config, load_backbone_weights=False).save_pretrained(folder)
    sizes = {"image_target_size": [32, 32], "image_crop_size": [28, 28], "max_action_horizon": HORIZON}
    (folder / "processor_config.json").write_text(json.dumps({"processor_kwargs": sizes}))
    return folder


def build_groot(features: Any, **settings: Any) -> PreTrainedPolicy:
    inputs, outputs = features
    config = GrootConfig(
        input_features=inputs,
        output_features=outputs,
        chunk_size=CHUNK,
        max_state_dim=MAX_DIM,
        max_action_dim=MAX_DIM,
        base_model_path=str(groot_folder()),
        device="cpu",
        push_to_hub=False,
        **{"n_action_steps": CHUNK, "use_bf16": False, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = GrootPolicy(config)
        for module in policy.modules():
            # drawn at std 0.02, too faint for widths this small to learn through
            if isinstance(module, CategorySpecificLinear):
                nn.init.normal_(module.W, std=module.W.shape[1] ** -0.5)
        return policy


@dataclass(frozen=True)
class GrootFamily(Family):
    """GR00T's preprocessor turns the cameras into packed patches, which the adapter arranges by row.

    Attributes:
        robot: image features of the policy; `cameras` is where the adapter reads them.
    """

    robot: tuple[str, ...] = (TOP,)

    @property
    def features(self) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
        return Family("robot", self.build, cameras=self.robot).features

    def batch(self, policy: PreTrainedPolicy, rows: int = 4, seed: int = 0) -> dict[str, Any]:
        """With the packed keys beside the arranged one: LeRobot's own forward reads those."""
        batch = Family("robot", self.build, cameras=self.robot).batch(policy, rows, seed)
        return {**batch, **GrootAdapter(policy).arrange(batch)}


def half(policy: PreTrainedPolicy) -> None:
    """As a checkpoint with `load_bf16` and `model_params_fp32=False`: the backbone, not the head."""
    policy._groot_model.backbone.model.to(torch.bfloat16)
    policy.config.use_bf16 = True


_GROOT: dict[str, Any] = {
    "build": build_groot,
    "cameras": (PIXELS,),
    "reads": ("state",),
    "lora": r".*(to_[qv]|language_model.*[qv]_proj)",
    "tower": "_groot_model.backbone.model.model.visual.patch_embed",
    "core": "_groot_model",
    "waits": True,
    "adapts_projector": False,  # its projectors are raw parameters, one set an embodiment
    "pickles": False,
    "half": half,
    "compiles": True,
}

FAMILIES = (
    GrootFamily("groot", **_GROOT),
    GrootFamily(
        "groot-two-cameras",
        robot=(TOP, WRIST),
        settings={"tune_llm": True, "tune_visual": True},
        checkpoints=True,
        **_GROOT,
    ),
)
