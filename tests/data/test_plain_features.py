"""Actions and states of one number, observations that no policy reads, depth, and segments that no episode holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_frames import arguments
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf import PTRTrainer, score_dataset
from ptr_hf.data.datasets import dataset_metadata, open_dataset
from ptr_hf.policies.tiny import tiny_act

NAMES = ["height", "width", "channels"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State and action of one number each, beside a text, flags and a depth map."""
    root = tmp_path_factory.mktemp("datasets") / "plain"
    features = {
        "observation.state": {"dtype": "float32", "shape": (1,), "names": None},
        "observation.note": {"dtype": "string", "shape": (1,), "names": None},
        "observation.flag": {"dtype": "bool", "shape": (1,), "names": None},
        "observation.flags": {"dtype": "bool", "shape": (3,), "names": None},
        "observation.depth": {"dtype": "image", "shape": (16, 16, 1), "names": NAMES, "info": {"is_depth_map": True}},
        "observation.image": {"dtype": "image", "shape": (32, 32, 3), "names": NAMES},
        "action": {"dtype": "float32", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("tests/plain", 10, features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for length in (20, 17):
        for frame in range(length):
            dataset.add_frame(
                {
                    "observation.state": np.array([frame / 10], dtype=np.float32),
                    "observation.note": f"frame {frame}",
                    "observation.flag": np.array([frame % 2 == 0]),
                    "observation.flags": np.array([True, False, frame > 9]),
                    "observation.depth": np.full((16, 16, 1), 500 + frame, dtype=np.uint16),
                    "observation.image": random.integers(0, 255, (32, 32, 3), dtype=np.uint8),
                    "action": random.normal(size=1).astype(np.float32),
                    "task": "move",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def policy(root: Path, *left_out: str) -> Any:
    features = LeRobotDatasetMetadata("tests/plain", root=root).features
    return tiny_act({key: value for key, value in features.items() if key not in left_out}, chunk_size=4, dim_model=32)


@pytest.mark.full
@pytest.mark.parametrize("preset", ["ptr", "sft"])
def test_vectors_of_one_number_train_and_score(plain: Path, tmp_path: Path, preset: str) -> None:
    args = arguments(tmp_path, preset, max_steps=2, logging_steps=1, per_device_train_batch_size=4)
    trainer = PTRTrainer(policy(plain, "observation.depth"), args, train_dataset=plain)
    trainer.train()
    item = trainer.train_dataset[0]
    assert not {"observation.note", "observation.flag", "observation.flags"} & set(item)
    if preset == "ptr":
        scores = score_dataset(trainer.policy, trainer.train_dataset, preprocessor=trainer.preprocessor, progress=False)
        assert len(scores.index) == 10
        assert np.isfinite(scores.loss).all()


def test_their_rows_are_vectors(plain: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, in_memory=False)
    trainer = PTRTrainer(policy(plain, "observation.depth"), args, train_dataset=plain)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in (0, 1)])
    rows = trainer._prepare_inputs(batch)
    assert rows["observation.state"].shape == (rows["action"].shape[0], 1)
    assert rows["action"].shape[1:] == (4, 1)
    # as LeRobot normalises the same numbers
    state = torch.tensor([[0.0], [0.1]])
    stats = trainer.train_dataset.meta.stats["observation.state"]
    expected = (state - torch.tensor(stats["mean"])) / (torch.tensor(stats["std"]) + 1e-8)
    assert torch.allclose(rows["observation.state"][:2], expected.float(), atol=1e-4)


def test_what_no_policy_reads_is_not_read(plain: Path) -> None:
    assert {"observation.note", "observation.flag", "observation.flags"}.isdisjoint(dataset_metadata(plain).features)
    given = LeRobotDataset("tests/plain", root=plain)
    assert "observation.note" not in open_dataset(given, arguments_layout()).hf_dataset.column_names
    assert "observation.note" in given.meta.features, "the user's own dataset stays as it is"


def arguments_layout() -> Any:
    from ptr_hf.data.segments import SegmentLayout

    return SegmentLayout(None, (0, 1), 2, 2, 2)


def test_a_depth_map_among_the_policys_cameras(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"observation.depth has 1 channels \(a depth map\?\), .* act policy .*input_features"
    ):
        PTRTrainer(policy(plain), arguments(tmp_path), train_dataset=plain)


def test_a_segment_longer_than_every_episode(points: Path, tmp_path: Path) -> None:
    from small_policies import base_policy

    args = arguments(tmp_path, segment_length=11)
    with pytest.raises(
        ValueError, match=r"segment of 11 chunks, 4 frames apart, .*longest has 40.*segment_length to at most 10"
    ):
        PTRTrainer(base_policy("act", points), args, train_dataset=points)
