"""The policy that `ptr-train` starts from: a pretrained one with settings changed, a new one, or a tiny one to try data out."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class
from torch import nn

from ptr_hf import PTRTrainingArguments
from ptr_hf.artifacts.checkpoint import is_ptr_source, widest_vector
from ptr_hf.configuration_ptr import chunk_settings
from ptr_hf.constants import CAMERA_MASK_SUFFIX
from ptr_hf.data.fit import renamed_features
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.files.base_source import check_base
from ptr_hf.policies import supported_policies
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.training.data_sources import DataSource, read_metadata
from ptr_hf.training.policy_sources import fit_to_robot

PLAIN = SegmentLayout(None, (0,), 1, 1, None)


def adapted_policy(path: str, overrides: list[str], data: DataSource, args: PTRTrainingArguments) -> nn.Module:
    """A pretrained LeRobot policy loaded with some of its settings changed, at this robot's action and state sizes."""
    if is_ptr_source(path, args.model_revision):
        raise ValueError(
            f"{path} is a PTR checkpoint, whose settings are fixed: leave policy_overrides out, or give a LeRobot policy."
        )
    check_base(path, args.model_revision, trusted=[setting.partition("=")[2] for setting in overrides])
    saved = PreTrainedConfig.from_pretrained(path, revision=args.model_revision)
    check_overrides(overrides, vars(saved), f"the policy {path}")
    # on the CPU first, so that the processes of a node do not all load onto its first GPU
    settings = [*overrides, "device=cpu"]
    if args.chunk_size is not None:
        settings += [
            f"{name}={value}" for name, value in chunk_settings(type(saved), args.chunk_size, vars(saved)).items()
        ]
    try:
        config = PreTrainedConfig.from_pretrained(
            path, revision=args.model_revision, cli_overrides=[f"--{setting}" for setting in settings]
        )
    except draccus.ParsingError as error:
        raise ValueError(f"policy_overrides={overrides} do not fit the policy {path}: {error}.") from error
    described = read_metadata(data, args, widest=widest_vector(saved)).features
    fit_to_robot(config, renamed_features(described, args.observation_renames))
    # a record of where it came from
    config.pretrained_path, config.pretrained_revision = Path(path), args.model_revision
    return get_policy_class(config.type).from_pretrained(path, config=config, revision=args.model_revision)


def new_policy(kind: str, overrides: list[str], args: PTRTrainingArguments) -> PreTrainedConfig:
    """The configuration of a policy that is trained from scratch; its sizes are taken from the data."""
    if kind not in supported_policies():
        raise ValueError(
            f"policy_type={kind} is none that can be trained here: choose one of {', '.join(supported_policies())}."
        )
    config_class = PreTrainedConfig.get_choice_class(kind)
    check_overrides(overrides, [item.name for item in fields(config_class) if item.init], f"a policy of type {kind}")
    settings = [*overrides, "device=cpu", "push_to_hub=false"]
    if args.chunk_size is not None:
        settings += [f"{name}={value}" for name, value in chunk_settings(config_class, args.chunk_size, {}).items()]
    try:
        return draccus.parse(config_class, args=[f"--{setting}" for setting in settings])
    except draccus.ParsingError as error:
        raise ValueError(f"policy_overrides={overrides} do not fit a policy of type {kind}: {error}.") from error


def check_overrides(overrides: list[str], known: Iterable[str], of: str) -> None:
    """Refuse what is not name=value, or names no setting of the policy."""
    names = [setting.partition("=")[0] for setting in overrides if "=" in setting]
    if len(names) < len(overrides) or not set(names) <= set(known):
        raise ValueError(
            f"policy_overrides={overrides} do not fit {of}: each is name=value, the name one of {', '.join(sorted(known))}."
        )


def tiny_policy(folder: Path, data: DataSource, args: PTRTrainingArguments) -> nn.Module:
    """A tiny SmolVLA with random weights, its vision features centred on a few frames of the data."""
    meta = read_metadata(data, args)
    vlm = write_tiny_vlm(folder / "tiny_vlm", texts=list(meta.tasks.index))
    widths: dict[str, Any] = {}
    if isinstance(meta, MixtureMetadata):
        frames: Any = Mixture(meta, PLAIN)
        widths = {"max_action_dim": len(meta.space), "max_state_dim": len(meta.state_space)}
    else:
        frames = LeRobotDataset(meta.repo_id, root=meta.root, video_backend="pyav")
    shown = [frames[i] for i in torch.linspace(0, len(frames) - 1, 32).long().tolist()]
    images = {}
    for key in meta.camera_keys:
        # a robot of a mixture may lack the camera
        seen = [frame[key] for frame in shown if frame.get(key + CAMERA_MASK_SUFFIX, True)]
        images[key] = torch.stack([image / 255 if image.dtype == torch.uint8 else image for image in seen])
    return tiny_smolvla(
        meta.features, vlm.resolve(), chunk_size=args.chunk_size or 8, seed=args.seed, frames=images, **widths
    )
