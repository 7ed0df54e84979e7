"""`weights="auto"`: the data are inspected before anything is trained, and a second run reuses what was found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from demonstrations import write_dataset
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from small_policies import base_policy, tensors_equal

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.cli.score import score
from ptr_hf.cli.score_options import parse
from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, DatasetScores
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER, KEY_FILE, fingerprint, training_weights

POINT = {
    "action": ["right_ee_delta_x", "right_ee_delta_y"],
    "state": ["right_ee_x", "right_ee_y", "environment_1", "environment_2"],
}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("demonstrations") / "points", (12,) * 12)


def trainer_of(folder: Path, data: Any, root: Path, model: str = "act", **settings: Any) -> PTRTrainer:
    options: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    args = PTRTrainingArguments(output_dir=str(folder), **{"preset": "ptr_offline", **options, **settings})
    return PTRTrainer(base_policy(model, root), args, train_dataset=data)


@pytest.mark.full
def test_clean_data_train_as_sft_and_are_inspected_once(
    demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trainer_of(tmp_path / "run", demonstrations, demonstrations)
    assert "0 of 12 episodes weigh less" in capsys.readouterr().out
    assert not first.policy.weighs
    first.train()
    plain = trainer_of(tmp_path / "sft", demonstrations, demonstrations, preset="sft")
    plain.train()
    assert tensors_equal(first.policy.state_dict(), plain.policy.state_dict())
    folder = tmp_path / "run" / INSPECTION_FOLDER
    assert len(DatasetScores.load(folder).episodes) == 12
    # what is there counts where data, settings and code are the same, and is asked anew where they are not
    chunks = DatasetScores.load(folder).chunks
    chunks.loc[chunks["episode_index"] == 3, "weight"] = 0.02
    chunks.to_parquet(folder / CHUNKS_FILE)
    capsys.readouterr()
    again = trainer_of(tmp_path / "run", demonstrations, demonstrations)
    assert "is reused" in capsys.readouterr().out
    assert again.policy.weighs
    assert again.policy.frame_weights.record["episodes_below"] == pytest.approx(1 / 12)
    again.train()
    rows = [row for row in again.state.log_history if "weight_min" in row]
    assert len(rows) == 2
    key = json.loads((folder / KEY_FILE).read_text())
    other = trainer_of(tmp_path / "run", demonstrations, demonstrations, weight_min=0.5)
    assert not other.policy.weighs
    assert json.loads((folder / KEY_FILE).read_text())["settings"] != key["settings"]


@pytest.mark.full
def test_the_episodes_of_an_open_dataset_alone_are_inspected(demonstrations: Path, tmp_path: Path) -> None:
    part = LeRobotDataset("tests/points", root=demonstrations, episodes=[2, 3, 5, 7, 8, 9, 10, 11])
    trainer = trainer_of(tmp_path / "run", part, demonstrations)
    chunks = DatasetScores.load(tmp_path / "run" / INSPECTION_FOLDER).chunks
    assert sorted(set(chunks["episode_index"])) == [2, 3, 5, 7, 8, 9, 10, 11]
    assert len(trainer.policy.frame_weights.values) == 144
    trainer.train()


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    roots = [write_dataset(tmp_path / str(number), (9, 8), seed=seed) for number, seed in enumerate((0, 0, 1))]
    found = [fingerprint_of(root) for root in roots]
    assert found[0] != found[2]
    (path,) = (roots[0] / "data").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"0")
    assert fingerprint_of(roots[1]) == found[1] != fingerprint_of(roots[0])


def fingerprint_of(root: Path) -> str:
    return fingerprint(LeRobotDatasetMetadata("tests/points", root=root))


@pytest.mark.full
def test_a_mixture_is_inspected_source_by_source(demonstrations: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", (10,) * 12, seed=1)
    sources = [{"dataset": str(root), "embodiment": POINT, "name": root.name} for root in (demonstrations, other)]
    config = MixtureConfig.of({"sources": sources})
    assert config is not None
    meta = MixtureMetadata.read(config)
    weights = training_weights(PTRConfig(preset="ptr_offline", device="cpu"), config, meta, folder=tmp_path / "found")
    assert weights is not None
    assert len(weights.values) == 144 + 120
    assert set(DatasetScores.load(tmp_path / "found").chunks["source"]) == {0, 1}


@pytest.mark.full
@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_is_scored_by_its_file_and_trained_with_the_weights(
    demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    other = write_dataset(tmp_path / "other", (10,) * 12, seed=1)
    spoil(other, episode=4)
    sources = [{"dataset": str(root), "embodiment": POINT, "name": root.name} for root in (demonstrations, other)]
    sources[1]["episodes"] = list(range(1, 12))
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump({"sources": sources, "action_space": "compact", "streaming": streaming}))
    out = tmp_path / "out"
    options = ["--dataset", str(file), "--output_dir", str(out), "--questions", "roughness", "--group", "none"]
    assert score(parse(options)) == 0
    assert f"--mixture {file} --weights {out / CHUNKS_FILE}" in capsys.readouterr().out
    scores = DatasetScores.load(out)
    assert scores.excluded[["source", "episode_index"]].to_numpy().tolist() == [[1, 4]]
    assert len(scores.episodes) == 12 + 11
    trainer = trainer_of(tmp_path / "run", str(file), demonstrations, weights=str(out), model="smolvla", max_steps=16)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "weight_min" in row]
    assert {row["weight_max"] for row in rows} == {1.0}
    assert min(row["weight_min"] for row in rows) == pytest.approx(0.02)
    assert trainer.policy.config.weights_record["episodes_below"] == pytest.approx(1 / 23)


def spoil(root: Path, episode: int) -> None:
    """Noise in the actions of one episode."""
    (path,) = (root / "data").rglob("*.parquet")
    table = pd.read_parquet(path)
    rows = table["episode_index"] == episode
    noise = np.random.default_rng(0).normal(0, 1, (int(rows.sum()), 2)).astype(np.float32)
    table.loc[rows, "action"] = pd.Series(list(noise), index=table.index[rows])
    table.to_parquet(path)
