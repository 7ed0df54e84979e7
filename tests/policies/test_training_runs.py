"""Every family trains: thirty steps of PTR in which identification rises above chance and the policy's own loss falls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from family import Family
from lerobot.configs import FeatureType
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.feature_utils import dataset_to_policy_features
from policy_families import FAMILIES
from torch import Tensor
from torch.utils.data import default_collate

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.data.datasets import open_dataset
from ptr_hf.processor_ptr import preprocess
from ptr_hf.report.dynamics import read_dynamics

STEPS, WINDOW = 30, 5
LONG = ("act", "smolvla", "pi0", "pi05", "pi0_fast", "diffusion", "multi_task_dit", "xvla", "evo1", "vla_jepa", "groot")
"""Families whose runs CI leaves out: 8 to 22 seconds each."""
EPISODES = [24] * 24
FIRST_OF_EACH = tuple({family.name.split("-")[0]: family for family in reversed(FAMILIES)}.values())[::-1]


def dataset_for(family: Family, folder: Path) -> Path:
    cameras = ("observation.image",) if family.cameras else ()
    return write_dataset(folder / "points", EPISODES, cameras=cameras, size=family.image_size, vivid=True)


def policy_for(family: Family, root: Path) -> Any:
    features = dataset_to_policy_features(LeRobotDatasetMetadata("tests/points", root=root).features)
    outputs = {key: feature for key, feature in features.items() if feature.type is FeatureType.ACTION}
    inputs = {key: feature for key, feature in features.items() if key not in outputs}
    return family.build((inputs, outputs), **family.settings)


def base_losses(policy: PTRPolicy, root: Path) -> Tensor:
    """The policy's own loss of segments from all over the data, under four fixed draws of noise."""
    layout = policy.config.layout
    dataset = open_dataset(root, layout)
    batch = default_collate([dataset[frame] for frame in range(0, sum(EPISODES), 13)])
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats)
    policy.eval()
    torch.manual_seed(11)
    with torch.no_grad():
        segment = policy.split(preprocess(batch, preprocessor, layout))
        losses = [policy.chunk_losses(segment) for _ in range(4)]
    policy.train()
    return torch.cat(losses)[segment.chunk_valid.repeat(4)]


@pytest.mark.capability("training")
@pytest.mark.full
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.full if family.name.split("-")[0] in LONG else (), id=family.name)
        for family in FIRST_OF_EACH
    ],
)
def test_a_short_run_learns(family: Family, tmp_path: Path, record_property: Any) -> None:
    root = dataset_for(family, tmp_path)
    args = PTRTrainingArguments(
        preset="ptr",
        output_dir=str(tmp_path / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=3,
        logging_steps=WINDOW,
        segment_length=2,
        num_belief_tokens=2,
        queue_size=0,
        queue_negatives=0,
        scorer_warmup_steps=0,
        temperature=0.05,
        in_memory=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    trainer = PTRTrainer(policy_for(family, root), args, root)
    before = base_losses(trainer.policy, root)
    trainer.train()
    after = base_losses(trainer.policy, root)
    rows = read_dynamics(tmp_path / "run" / "ptr_dynamics.parquet").table.to_pylist()
    assert len(rows) == STEPS // WINDOW
    late = rows[len(rows) // 2 :]
    accuracy = sum(row["accuracy"] for row in late) / len(late)
    chance = sum(1 / row["candidates"] for row in late) / len(late)
    figures = {
        "accuracy": accuracy,
        "chance": chance,
        "loss_before": before.mean().item(),
        "loss_after": after.mean().item(),
    }
    for name, value in figures.items():
        record_property(name, round(value, 3))
    assert accuracy > 1.5 * chance
    assert after.mean() < before.mean()
    assert all(row["weight_mean"] > 0 for row in rows)
    assert late[-1]["weight_max"] > late[-1]["weight_min"], "the score does weigh the loss"
