"""What the side pathway adds to a policy of real size: parameters, and bytes in memory and in a checkpoint.

    python recipes/benchmarks/scaling/side_pathway.py        # results/side_pathway.json, seconds

Policies are built on PyTorch's meta device, which has shapes but no memory, at the sizes of their published
configurations and with the parts frozen that LeRobot freezes by default.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from rich.table import Table
from torch import Tensor, nn
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.speed.probes import write_real_vlm
from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.report.console import PlainConsole

PARTS = {
    "scorer": "objective.scorer.",
    "queue": "objective.queue.",
    "belief": "belief.",
    "moving average of the tower": "target_encoder.",
}
OPTIMIZER_MOMENTS = 2


@dataclass
class MeasureArguments:
    """Extra parameters and bytes of PTR's side pathway."""

    output: Path = field(default=Path("results/side_pathway.json"), metadata={"help": "Where the figures go."})


def policies(folder: Path) -> dict[str, PreTrainedConfig]:
    """Configurations of the policies at their published sizes; three cameras and 14 joints where they leave it open."""

    def robot(size: int, cameras: int) -> dict[str, Any]:
        image, joints = PolicyFeature(FeatureType.VISUAL, (3, size, size)), PolicyFeature(FeatureType.STATE, (14,))
        keys = [f"{OBS_IMAGES}.camera{number + 1}" for number in range(cameras)]
        return {
            "input_features": {OBS_STATE: joints, **dict.fromkeys(keys, image)},
            "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (14,))},
            # LeRobot's configurations know no meta device; it is set where the policy is built
            "device": "cpu",
        }

    smolvla = {"vlm_model_name": str(folder), "load_vlm_weights": False}
    return {
        "smolvla_base": SmolVLAConfig(**robot(256, 3), **smolvla),
        "smolvla_base, tower trains": SmolVLAConfig(
            **robot(256, 3), **smolvla, freeze_vision_encoder=False, train_expert_only=False
        ),
        "pi0": PI0Config(**robot(224, 3), dtype="bfloat16"),
        "pi0, tower frozen": PI0Config(**robot(224, 3), dtype="bfloat16", freeze_vision_encoder=True),
        "act": ACTConfig(**robot(480, 1), pretrained_backbone_weights=None),
    }


def ptr_policy(base_config: PreTrainedConfig) -> PTRPolicy:
    """The paper's PTR around a policy, on the meta device."""
    config = PTRConfig(device="cpu", preset="ptr")
    config.device = base_config.device = "meta"
    with torch.device("meta"):
        base = get_policy_class(base_config.type)(base_config)
        return PTRPolicy(config, base_policy=base)


def measure(policy: PTRPolicy) -> dict[str, Any]:
    """Parameters and bytes of the base policy and of every part of the side pathway."""
    base = list(policy.base.parameters())
    parts = {name: _sizes(policy, prefix) for name, prefix in PARTS.items()}
    parts["the rest"] = _sizes(policy, "", ("base.", *PARTS.values()))
    trained = sum(
        p.numel() for name, p in policy.named_parameters() if not name.startswith("base.") and p.requires_grad
    )
    extra = sum(part["bytes"] for part in parts.values())
    base_bytes = sum(_bytes(value) for value in base)
    return {
        "base": {
            "parameters": _count(base),
            "trainable": _count([p for p in base if p.requires_grad]),
            "bytes": base_bytes,
        },
        "parts": parts,
        "tower_is_shared": bool(policy.target_encoder is not None and policy.target_encoder.shared),
        "target_layer": policy.target_layer,
        "extra": {
            "parameters": sum(part["parameters"] for part in parts.values()),
            "trainable": trained,
            "checkpoint_bytes": extra,
            # gradients and AdamW's two moments of what trains, all float32
            "training_bytes": extra + (1 + OPTIMIZER_MOMENTS) * 4 * trained,
            "checkpoint_share": extra / base_bytes,
        },
    }


def _sizes(policy: PTRPolicy, prefix: str, other_than: tuple[str, ...] = ()) -> dict[str, int]:
    parameters = {name for name, _ in policy.named_parameters()}
    kept = {
        name: value
        for name, value in policy.state_dict().items()
        if name.startswith(prefix) and not (other_than and name.startswith(other_than))
    }
    learned = [value for name, value in kept.items() if name in parameters]
    return {"parameters": _count(learned), "bytes": sum(_bytes(value) for value in kept.values())}


def _count(tensors: list[Tensor] | list[nn.Parameter]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main() -> None:
    (arguments,) = HfArgumentParser(MeasureArguments, description=__doc__).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        vlm = write_real_vlm(Path(folder) / "vlm", ["a task"])
        measured = {name: measure(ptr_policy(config)) for name, config in policies(vlm).items()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": "python recipes/benchmarks/scaling/side_pathway.py", "preset": "ptr", "policies": measured}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title="The side pathway at real sizes, preset ptr")
    table.add_column("policy", no_wrap=True)
    for column in ("M parameters", "extra M", "MB stored", "MB training", "share"):
        table.add_column(column, justify="right")
    for name, row in measured.items():
        extra = row["extra"]
        table.add_row(
            name,
            f"{row['base']['parameters'] / 1e6:.1f}",
            f"{extra['parameters'] / 1e6:.2f}",
            f"{extra['checkpoint_bytes'] / 1e6:.1f}",
            f"{extra['training_bytes'] / 1e6:.1f}",
            f"{extra['checkpoint_share']:.1%}",
        )
    PlainConsole().print(table)


if __name__ == "__main__":
    main()
