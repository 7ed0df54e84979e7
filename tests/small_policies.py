"""Small real policies for the datasets of `demonstrations`, and the batches they are trained on."""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from demonstrations import TASKS
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.import_utils import get_safe_default_video_backend
from torch.utils.data import default_collate

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer
from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.policies.tiny import tiny_act, tiny_smolvla, write_tiny_vlm
from ptr_hf.processor_ptr import preprocess

CHUNK = 4
FAMILIES = ("act", "smolvla")


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


def base_policy(family: str, root: Path, **settings: Any) -> PreTrainedPolicy:
    """An untrained LeRobot policy for the dataset at `root`; the same weights every time."""
    return copy.deepcopy(_built(family, root, tuple(sorted(settings.items()))))


@cache
def _built(family: str, root: Path, settings: tuple[tuple[str, Any], ...]) -> PreTrainedPolicy:
    features = LeRobotDatasetMetadata("tests/points", root=root).features
    if family == "act":
        return tiny_act(features, **{"chunk_size": CHUNK, "dim_model": 32, **dict(settings)})
    return tiny_smolvla(features, vlm_folder(), **{"chunk_size": CHUNK, "num_steps": 2, **dict(settings)})


def ptr_policy(
    family: str, root: Path, base: dict[str, Any] | None = None, seed: int = 0, **settings: Any
) -> PTRPolicy:
    """A `PTRPolicy` in training mode around `base_policy`; PTR's own weights depend on the seed alone."""
    settings = {"device": "cpu", "preset": "ptr", **settings}
    if settings["preset"] != "ptr_offline":
        settings = {"scorer_warmup_steps": 1, **settings}
    config = PTRConfig(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PTRPolicy(config, base_policy=base_policy(family, root, **base or {})).train()


def raw_batch(policy: PTRPolicy, root: Path, anchors: Sequence[int]) -> dict[str, Any]:
    """The collated segments that begin at the given frames, as the dataset gives them."""
    dataset = _opened(root, policy.config.layout)
    return default_collate([dataset[anchor] for anchor in anchors])


@cache
def _opened(root: Path, layout: SegmentLayout) -> LeRobotDataset:
    return open_dataset(root, layout)


def train_batch(policy: PTRPolicy, root: Path, anchors: Sequence[int]) -> dict[str, Any]:
    """`raw_batch` after the policy's preprocessor."""
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(root))
    return preprocess(raw_batch(policy, root, anchors), preprocessor, policy.config.layout)


def observation(policy: PTRPolicy, root: Path, frames: Sequence[int]) -> dict[str, Any]:
    """What a robot would show the policy at the given frames, preprocessed."""
    items = [frames_of(root)[frame] for frame in frames]
    keys = [key for key in items[0] if key.startswith("observation.") or key == "task"]
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(root))
    return preprocessor(default_collate([{key: item[key] for key in keys} for item in items]))


def save_alone(trainer: PTRTrainer) -> None:
    """`save_model` without the card and the report, whose pictures take seconds to draw."""
    trainer.save_model(_internal_call=True)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a module's parameters by name."""
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def settings_id(value: Any) -> str:
    """A readable test id: the settings of a dict, nothing for a message that is expected."""
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items()) or "defaults"
    return "" if " " in str(value) or "=" in str(value) else str(value)


def tensors_equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts hold the same names and, bit for bit, the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@cache
def frames_of(root: Path) -> list[dict[str, Any]]:
    """Every frame of a dataset, read one by one without offsets."""
    dataset = LeRobotDataset(
        "tests/points", root=root, video_backend=get_safe_default_video_backend(), return_uint8=True
    )
    return [dataset[frame] for frame in range(len(dataset))]


@cache
def stats_of(root: Path) -> dict[str, Any]:
    """The dataset's statistics."""
    return LeRobotDatasetMetadata("tests/points", root=root).stats
