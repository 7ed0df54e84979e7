"""One run of the embodiment benchmark: training on a condition's demonstrations, and evaluation on every arm."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE
from transformers import set_seed

from benchmarks.embodiment.cameras import KEY, SIZE
from benchmarks.embodiment.data import (
    CONDITIONS,
    FIRST_TEST_START,
    Pool,
    condition_mixture,
    instruction,
    shared_camera,
    shared_scene,
)
from benchmarks.quiet import be_quiet
from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.report.dynamics import DYNAMICS_FILE, read_dynamics
from ptr_hf.report.sources import group_shares

_NO_BELIEF = {"num_belief_tokens": 0}
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sft": ("sft", {}),
    "ptr": ("ptr", _NO_BELIEF),
    "ptr_calibrated": ("ptr_calibrated", {}),
    "ptr_offline": ("ptr_offline", {}),
    "small_loss": ("small_loss", {}),
    "random_weights": ("random_weights", {}),
    "oracle": ("oracle", {}),
}
"""What follows ``specialist_`` or ``generalist_`` -> preset of the package, and what is changed in it."""
TEXT: dict[str, Any] = {"text_dim": 64, "text_layers": 2, "text_heads": 2}
LEAST_VISION: dict[str, Any] = {"image_size": 28, "vision_dim": 32, "vision_layers": 1}
"""Without cameras the policy leaves its vision tower out."""
VISION: dict[str, Any] = {"image_size": SIZE, "patch_size": 8, "vision_dim": 64, "vision_layers": 2}


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Args:
        pool: of demonstrations.
        steps: of a generalist; a specialist has its part of them, so that both see as many samples of an arm.
        test_starts: held-out starts of every arm.
        test_steps: after which an episode has failed.
    """

    pool: Pool = field(default_factory=Pool)
    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 2e-3
    chunk_size: int = 8
    test_starts: int = 10
    test_steps: int = 80


@dataclass(frozen=True)
class Cell:
    """One run: a preset such as ``generalist_ptr``, a condition, a seed."""

    preset: str
    condition: str
    seed: int

    @property
    def is_specialist(self) -> bool:
        """A policy for every arm, in place of one for all."""
        return self.preset.startswith("specialist_")

    @property
    def has_cameras(self) -> bool:
        """Whether its policies see the scene."""
        return CONDITIONS[self.condition].cameras

    @property
    def method(self) -> tuple[str, Mapping[str, Any]]:
        """Preset of the package, and what is changed in it."""
        return METHODS[self.preset.split("_", 1)[1]]

    @property
    def command(self) -> str:
        """The command line that repeats the run."""
        return (
            f"python recipes/benchmarks/embodiment/benchmark.py --presets {self.preset} "
            f"--conditions {self.condition} --seeds {self.seed}"
        )


def run(setting: Setting, cell: Cell, workspace: Path) -> list[dict[str, Any]]:
    """Train and evaluate; returns a row of the results for every arm."""
    be_quiet()
    arms = setting.pool.arms
    mixture = condition_mixture(setting.pool, workspace, cell.condition, cell.seed)
    # an arm's own policy, or one for all
    parts = [mixture.only(arm) for arm in arms] if cell.is_specialist else [mixture]
    rows = []
    for part in parts:
        folder = workspace / "runs" / f"{cell.preset}_{cell.condition}_{cell.seed}" / "_".join(part.names)
        trainer = trained(setting, cell, part, folder, workspace)
        share = shares(trainer, folder)
        for arm in part.names:
            success = evaluate(trainer, arm, setting, cell.seed)
            rows.append(
                {
                    "preset": cell.preset,
                    "condition": cell.condition,
                    "arm": arm,
                    "seed": cell.seed,
                    "success": float(success.mean()),
                    "share": share[arm],
                    "command": cell.command,
                }
            )
    return rows


def trained(setting: Setting, cell: Cell, mixture: MixtureConfig, folder: Path, workspace: Path) -> PTRTrainer:
    """Train a small policy from random weights; the mixture may be of one arm."""
    set_seed(cell.seed)
    meta = MixtureMetadata.read(mixture)
    texts = [instruction(arm) for arm in setting.pool.arms]
    vision = VISION if cell.has_cameras else LEAST_VISION
    vlm = write_tiny_vlm(workspace / "vlm" / folder.parent.name, texts=texts, **TEXT, **vision)
    policy = tiny_smolvla(
        meta.features,
        vlm.resolve(),
        chunk_size=setting.chunk_size,
        seed=cell.seed,
        num_steps=5,
        expert_width_multiplier=1.0,
        tokenizer_max_length=16,
        frames=shown(meta) if cell.has_cameras else None,
        max_state_dim=meta.features[OBS_STATE]["shape"][0],
        max_action_dim=meta.features[ACTION]["shape"][0],
    )
    preset, changed = cell.method
    steps = round(setting.steps * len(mixture.sources) / len(setting.pool.arms))
    args = PTRTrainingArguments(
        output_dir=str(folder),
        preset=preset,
        segment_length=1,
        max_steps=steps,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        in_memory=True,
        seed=cell.seed,
        **changed,
    )
    trainer = PTRTrainer(policy, args, mixture)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


def shown(meta: MixtureMetadata, frames: int = 40) -> dict[str, Float[torch.Tensor, "frames 3 height width"]]:
    """Frames of all arms, evenly from all over their demonstrations."""
    found = []
    for source in meta.sources:
        dataset = LeRobotDataset(source.meta.repo_id, root=source.meta.root, video_backend="pyav")
        places = torch.linspace(0, len(dataset) - 1, frames // len(meta.sources)).long().tolist()
        found += [dataset[place][KEY] for place in places]
    return {KEY: torch.stack(found)}


def shares(trainer: PTRTrainer, folder: Path) -> dict[str, float]:
    """q(m), the share of the weight that every arm had over the last half of training; without weights its share of samples."""
    meta = trainer.train_dataset.meta
    given = dict(zip(meta.names, meta.shares, strict=True))
    if not trainer.policy.weighs or len(given) == 1:
        return given
    dynamics = read_dynamics(folder / DYNAMICS_FILE)
    found = {group.name: group.weight_share for group in group_shares(dynamics, dynamics.runs[0], share=0.5)}
    return {arm: found[arm] for arm in given}


def evaluate(trainer: PTRTrainer, arm: str, setting: Setting, seed: int) -> Bool[np.ndarray, " starts"]:
    """Which of the held-out starts the policy solves with an arm, acting in the arm's own convention.

    All episodes advance together, a chunk at a time: one prediction for those that go on, then each carries out its actions.
    """
    scene = shared_scene(arm)
    preprocessor, postprocessor = trainer.processors_for(arm)
    cameras = KEY in trainer.train_dataset.meta.features
    first = FIRST_TEST_START + 1_000 * seed
    snapshots, observed = [], []
    for start in range(first, first + setting.test_starts):
        scene.reset(start)
        snapshots.append(scene.snapshot())
        observed.append(observation(arm, cameras))
    policy = trainer.policy
    policy.eval()
    policy.reset()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        while running := [
            n for n, done in enumerate(snapshots) if not done.success and done.steps < setting.test_steps
        ]:
            batch: dict[str, Any] = {
                key: torch.stack([observed[n][key] for n in running]) for key in observed[running[0]]
            }
            batch["task"] = [instruction(arm)] * len(running)
            chunks = postprocessor(policy.predict_action_chunk(preprocessor(batch))).float().cpu().numpy()
            for n, chunk in zip(running, chunks, strict=True):
                scene.restore(snapshots[n])
                for action in chunk:
                    scene.step_recorded(action)
                    if scene.success or scene.steps >= setting.test_steps:
                        break
                snapshots[n], observed[n] = scene.snapshot(), observation(arm, cameras)
    return np.array([snapshot.success for snapshot in snapshots])


def observation(arm: str, cameras: bool) -> dict[str, torch.Tensor]:
    """What this process's scene of an arm shows now, as LeRobot's datasets hand it out."""
    found = {OBS_STATE: torch.from_numpy(shared_scene(arm).state())}
    if cameras:
        found[KEY] = torch.from_numpy(shared_camera(arm).picture()).permute(2, 0, 1) / 255
    return found
