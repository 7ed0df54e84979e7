"""`lerobot-train --policy.weights=FILE`: LeRobot's own loop trains with the weights of a file."""

import io
import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.scripts import lerobot_train
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR
from lerobot.utils.import_utils import register_third_party_plugins
from small_policies import base_policy

from ptr_hf import PTRConfig, PTRPolicy

register_third_party_plugins()
BASE = {
    "type": "act",
    "chunk_size": 4,
    "n_action_steps": 4,
    "dim_model": 32,
    "n_heads": 4,
    "dim_feedforward": 64,
    "n_encoder_layers": 1,
    "vision_backbone": "resnet18",
    "pretrained_backbone_weights": None,
}


def lerobot_trains(points: Path, output: Path, weights: Path) -> str:
    arguments = [
        "--policy.type=ptr",
        f"--policy.base={json.dumps(BASE)}",
        f"--policy.weights={weights}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=tests/points",
        f"--dataset.root={points}",
        f"--output_dir={output}",
        *("--steps=2", "--save_freq=2", "--log_freq=1", "--batch_size=4", "--num_workers=0", "--env_eval_freq=0"),
    ]
    log, argv, handlers = io.StringIO(), sys.argv, logging.getLogger().handlers[:]
    try:
        sys.argv = ["lerobot-train", *arguments]
        with redirect_stdout(log), redirect_stderr(log):
            lerobot_train.main()
    finally:
        sys.argv = argv
        logging.getLogger().handlers[:] = handlers
    return log.getvalue()


@pytest.mark.full
def test_a_file_weighs_the_chunks(points: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    pd.DataFrame({"index": np.arange(112), "weight": np.linspace(0.1, 0.9, 112)}).to_csv(path, index=False)
    log = lerobot_trains(points, tmp_path / "run", path)
    assert "weight_mean" in log
    assert "effective_sample_size" in log
    loaded = PTRPolicy.from_pretrained(tmp_path / "run" / CHECKPOINTS_DIR / "000002" / PRETRAINED_MODEL_DIR)
    assert (loaded.config.preset, loaded.config.weights, loaded.frame_weights) == ("ptr_offline", "weights.csv", None)
    assert loaded.config.weights_record["largest"] == pytest.approx(0.9)


@pytest.mark.full
def test_a_file_of_other_data_is_refused_before_training(points: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    pd.DataFrame({"episode_index": range(5), "weight": [1.0] * 5}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"weighs episode_index 4, which tests/points does not have"):
        lerobot_trains(points, tmp_path / "run", path)


def test_without_the_plugin_nothing_reads_weights(points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PTRConfig, "weights_reader", None)
    meta = LeRobotDatasetMetadata("tests/points", root=points)
    with pytest.raises(ValueError, match=r"weights=w.csv are read by .* elsewhere import lerobot_policy_ptr first"):
        PTRPolicy(PTRConfig(device="cpu", weights="w.csv"), base_policy=base_policy("act", points), dataset_meta=meta)
