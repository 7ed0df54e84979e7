"""`PTRTrainer` with weights that are known before training: nothing changes where all are 1, and Σ w ℓ / Σ w else."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small_policies import base_policy, ptr_policy, tensors_equal, train_batch

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.scores import FrameWeights

LENGTHS = (30, 24, 40, 18)
FRAMES = sum(LENGTHS)


def weights_file(path: Path, values: np.ndarray) -> Path:
    pd.DataFrame({"index": np.arange(FRAMES), "weight": values}).to_parquet(path)
    return path


def trained(
    folder: Path, points: Path, family: str = "smolvla", base: dict[str, Any] | None = None, **settings: Any
) -> PTRTrainer:
    options: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = PTRTrainingArguments(output_dir=str(folder), **{**options, **settings})
    trainer = PTRTrainer(base_policy(family, points, **(base or {})), args, train_dataset=points)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("family", "accumulation"),
    [
        ("smolvla", 2),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("smolvla", 1), ("act", 1), ("act", 2))),
    ],
)
def test_weights_of_1_train_sft_bit_for_bit(points: Path, tmp_path: Path, family: str, accumulation: int) -> None:
    ones = weights_file(tmp_path / "ones.parquet", np.ones(FRAMES))
    settings = {"family": family, "gradient_accumulation_steps": accumulation}
    plain = trained(tmp_path / "sft", points, preset="sft", **settings)
    weighed = trained(tmp_path / "offline", points, preset="ptr_offline", weights=str(ones), **settings)
    assert tensors_equal(weighed.policy.state_dict(), plain.policy.state_dict())
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (plain, weighed)]
    assert losses[0] == losses[1]
    untrained = base_policy(family, points).state_dict()
    assert not tensors_equal(weighed.policy.base.state_dict(), untrained)


@pytest.mark.parametrize("family", ["smolvla", "act"])
def test_the_loss_is_the_weighted_mean_of_the_chunks_losses(points: Path, family: str) -> None:
    policy = ptr_policy(family, points, preset="ptr_offline")
    values = np.linspace(0.0, 2.0, FRAMES, dtype=np.float32)
    policy.set_weights(FrameWeights.of_array(values))
    batch = train_batch(policy, points, (0, 33, 60, 111))
    torch.manual_seed(0)
    loss, metrics = policy(batch)
    torch.manual_seed(0)
    each = policy.adapter.trace(batch).loss.detach()
    weight = torch.from_numpy(values)[[0, 33, 60, 111]]
    assert weight[0] == 0
    assert loss.item() == pytest.approx(float((weight * each).sum() / weight.sum()), rel=1e-6)
    assert metrics["weight_max"] == pytest.approx(2.0)
    assert metrics["effective_sample_size"] == pytest.approx(float(weight.sum() ** 2 / (4 * weight.square().sum())))


def test_a_chunk_of_weight_0_is_as_if_it_were_not_there(points: Path) -> None:
    policy = ptr_policy("act", points, preset="ptr_offline", base={"use_vae": False, "dropout": 0.0})
    values = np.ones(FRAMES, np.float32)
    values[60] = 0
    policy.set_weights(FrameWeights.of_array(values))
    gradients = []
    for anchors in ((3, 33, 60), (3, 33)):
        policy.zero_grad()
        policy(train_batch(policy, points, anchors))[0].backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    for name, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], value, rtol=1e-4, atol=1e-7)


def test_alpha_pulls_the_weights_to_1() -> None:
    weights = FrameWeights.of_array(np.array([0.0, 1.0, 3.0]), alpha=0.5)
    assert weights.values.tolist() == [0.5, 1.0, 2.0]
    assert weights.of(torch.tensor([2, 0, 7])).tolist() == [2.0, 0.5, 2.0]
    assert not FrameWeights.of_array(np.array([0.0, 3.0]), alpha=0.0).move


@pytest.mark.full
def test_evaluation_and_checkpoints_know_no_weights(points: Path, tmp_path: Path) -> None:
    values = np.where(np.arange(FRAMES) < 30, 0.1, 1.0)
    trainer = trained(tmp_path / "run", points, weights=str(weights_file(tmp_path / "w.parquet", values)))
    policy = trainer.policy
    assert policy.config.preset == "ptr_offline"
    batch = train_batch(policy.eval(), points, (0, 33))
    found = []
    for given in (policy.frame_weights, None):
        policy.frame_weights = given
        torch.manual_seed(0)
        found.append(policy(batch)[0])
    assert torch.equal(*found)
    rows = [row for row in trainer.state.log_history if "weight_mean" in row]
    assert len(rows) == 3
    assert all(0.1 <= row["weight_min"] <= row["weight_mean"] <= 1.0 for row in rows)
    trainer.save_model()
    loaded = PTRPolicy.from_pretrained(trainer.args.output_dir)
    assert loaded.frame_weights is None
    assert loaded.config.weights == "w.parquet"
    record = loaded.config.weights_record
    assert record["file"] == "w.parquet"
    assert record["episodes_below"] == 0.25
    assert record["below"] == pytest.approx(30 / FRAMES)
    assert len(record["sha256"]) == 64
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "known before training" in card
    assert "w.parquet" in card
    assert "scorer's warm-up" not in card


@pytest.mark.parametrize("family", ["smolvla", "act"])
def test_the_losses_alone_are_those_of_the_trace(points: Path, family: str) -> None:
    policy = ptr_policy(family, points, preset="sft")
    batch = train_batch(policy, points, (0, 33, 60))
    found = []
    for read in (lambda: policy.adapter.trace(batch).loss, lambda: policy.adapter.losses(batch)):
        torch.manual_seed(0)
        found.append((read(), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
