"""LeRobot's own sample weighter gives back our weights, read from the file that `ptr-score --export_lerobot` writes."""

import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.rewards.sarm.rabc import RABCWeights
from lerobot.scripts import lerobot_train
from small_policies import base_policy, stats_of

from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.lerobot_weights import export_lerobot, lerobot_options, progress_table


def weigher(table: pd.DataFrame, folder: Path, chunk_size: int) -> RABCWeights:
    table.to_parquet(folder / "progress.parquet")
    return RABCWeights(folder / "progress.parquet", chunk_size=chunk_size, device=torch.device("cpu"))


def lerobot_weighs(rabc: RABCWeights, index: np.ndarray) -> np.ndarray:
    """Before LeRobot scales a batch's weights to a mean of 1."""
    return rabc._compute_weights(np.array([rabc._compute_delta(frame) for frame in index], dtype=np.float32))


def two_values(frames: int) -> np.ndarray:
    weight = np.ones(frames, np.float32)
    weight[10:40] = weight[55:56] = weight[90:] = 0.02
    return weight


def many_values(frames: int) -> np.ndarray:
    draws = np.random.default_rng(0)
    weight = draws.uniform(0.1, 1, frames).astype(np.float32)
    weight[draws.random(frames) < 0.4] = 1
    weight[20:45] = 0.1
    return weight


def mild(frames: int) -> np.ndarray:
    return np.where(np.arange(frames) % 7 < 3, 0.8, 1).astype(np.float32)


@pytest.mark.parametrize("chunk_size", [8, 50, 100])
@pytest.mark.parametrize("weights", [two_values, many_values, mild, np.ones, lambda frames: np.zeros(frames)])
def test_every_frame_weighs_what_it_should(weights: object, chunk_size: int, tmp_path: Path) -> None:
    index = np.arange(1000, 1120)
    weight = weights(120)  # type: ignore[operator]
    rabc = weigher(progress_table(index, weight), tmp_path, chunk_size)
    np.testing.assert_allclose(lerobot_weighs(rabc, index), weight, atol=2e-6)


def test_a_batch_is_weighed_by_its_share(tmp_path: Path) -> None:
    weight = two_values(120)
    rabc = weigher(progress_table(np.arange(120), weight), tmp_path, 50)
    batch = torch.tensor([0, 12, 39, 40, 119])
    found, _ = rabc.compute_batch_weights({"index": batch})
    np.testing.assert_allclose(found.numpy(), weight[batch.numpy()] * 5 / weight[batch.numpy()].sum(), rtol=1e-4)


def test_lerobot_train_runs_with_the_file(points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = two_values(112)
    chunks = pd.DataFrame({"index": np.arange(112), "weight": weight})
    path = export_lerobot(DatasetScores(chunks, pd.DataFrame(), {}), tmp_path / "weights.parquet")
    policy = base_policy("smolvla", points, chunk_size=8, n_action_steps=8)
    policy.save_pretrained(tmp_path / "policy")
    for pipeline in make_pre_post_processors(policy.config, dataset_stats=stats_of(points)):
        pipeline.save_pretrained(tmp_path / "policy")
    arguments = [
        f"--policy.path={tmp_path / 'policy'} --policy.device=cpu --policy.push_to_hub=false",
        f"--dataset.repo_id=tests/points --dataset.root={points}",
        f"--output_dir={tmp_path / 'run'} --steps=3 --save_checkpoint=false --log_freq=1 --batch_size=4 --num_workers=0",
        f"--env_eval_freq=0 {lerobot_options(path)}",
    ]
    batches = []
    plain = RABCWeights.compute_batch_weights

    def watched(self: RABCWeights, batch: dict) -> tuple[torch.Tensor, dict]:
        found = plain(self, batch)
        batches.append((batch["index"].numpy(), found[0].numpy()))
        return found

    monkeypatch.setattr(RABCWeights, "compute_batch_weights", watched)
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *" ".join(arguments).split()])
    handlers = logging.getLogger().handlers[:]
    try:
        lerobot_train.main()
    finally:
        logging.getLogger().handlers[:] = handlers
    assert len(batches) == 3
    for index, found in batches:
        np.testing.assert_allclose(found, weight[index] * len(index) / weight[index].sum(), rtol=1e-3)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    chunks = pd.DataFrame({"index": [0], "weight": [1.0]})
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        export_lerobot(DatasetScores(chunks, pd.DataFrame(), {}), tmp_path / "weights.csv")
