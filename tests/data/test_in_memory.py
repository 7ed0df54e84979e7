"""A data set read into memory gives the batches that LeRobot gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demonstrations import write_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.in_memory import InMemorySegments, collate_segments
from ptr_hf.data.segments import SegmentLayout, split_segment

CHUNK = (0, 1, 2, 3)
LAYOUTS = {
    "futures": SegmentLayout(None, CHUNK, 4, 4, 4),
    "history": SegmentLayout((-1, 0), CHUNK, 2, 3, 5),
    "no-future": SegmentLayout(None, CHUNK, 2, 4, None),
    "plain": SegmentLayout(None, CHUNK, 1, 4, None),
    "plain-with-time": SegmentLayout((0,), CHUNK, 1, 4, None),
}
# first and last frames of episodes of 30, 24, 40 and 18 frames, and some between; not in order, one of them twice
POSITIONS = [111, 0, 29, 30, 52, 53, 54, 93, 94, 17, 17, 70]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("datasets") / "states", cameras=())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of every kind LeRobot writes, and episodes whose tasks do not begin with the first."""
    root = tmp_path_factory.mktemp("datasets") / "mixed"
    features = {
        "observation.state": {"dtype": "float64", "shape": (3,), "names": None},
        "observation.grid": {"dtype": "float32", "shape": (2, 3), "names": None},
        "observation.gripper": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "phase": {"dtype": "int32", "shape": (1,), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create("tests/mixed", 10, features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for length in (9, 5):
        for frame in range(length):
            dataset.add_frame(
                {
                    "observation.state": random.normal(size=3),
                    "observation.grid": random.normal(size=(2, 3)).astype(np.float32),
                    "observation.gripper": random.normal(size=1).astype(np.float32),
                    "next.done": np.array([frame == length - 1]),
                    "phase": np.array([frame // 3], dtype=np.int32),
                    "note": f"frame {frame}",
                    "action": random.normal(size=2).astype(np.float32),
                    "task": f"task {length}",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def assert_same(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(batch) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[key].dtype == value.dtype, key
            assert torch.equal(batch[key], value), key
        else:
            assert batch[key] == value, key


def collated(dataset: Any, positions: list[int]) -> dict[str, Any]:
    return default_collate([dataset[position] for position in positions])


class TestEquality:
    @pytest.mark.parametrize(
        ("kind", "layout"),
        [
            # cameras in the default run with one layout
            pytest.param(kind, layout, id=f"{kind}-{name}", marks=() if here else pytest.mark.full)
            for kind in ("states", "points", "point_videos")
            for name, layout in LAYOUTS.items()
            for here in (kind == "states" or name == "futures",)
        ],
    )
    def test_with_lerobot(self, kind: str, layout: SegmentLayout, request: pytest.FixtureRequest) -> None:
        dataset = open_dataset(request.getfixturevalue(kind), layout)
        memory = InMemorySegments(dataset, layout)
        assert len(memory) == len(dataset)
        assert_same(memory.__getitems__(POSITIONS), collated(dataset, POSITIONS))
        for position in (0, 29, -1):
            assert_same(memory[position], dataset[position])

    def test_with_features_of_every_kind(self, mixed: Path) -> None:
        layout = LAYOUTS["futures"]
        dataset = open_dataset(mixed, layout)
        positions = list(range(len(dataset)))
        assert_same(InMemorySegments(dataset, layout).__getitems__(positions), collated(dataset, positions))

    @pytest.mark.full
    @pytest.mark.parametrize("kind", ["states", "point_videos"])
    @pytest.mark.parametrize("episodes", [[1, 3], [2], [3, 0]])
    def test_of_some_episodes(self, kind: str, episodes: list[int], request: pytest.FixtureRequest) -> None:
        layout = LAYOUTS["history"]
        dataset = open_dataset(request.getfixturevalue(kind), layout, episodes=episodes)
        memory = InMemorySegments(dataset, layout)
        positions = [0, *range(15, len(dataset), 6), len(dataset) - 1]
        assert_same(memory.__getitems__(positions), collated(dataset, positions))
        assert set(memory.__getitems__(positions)["episode_index"].tolist()) == set(episodes)

    def test_image_transforms(self, point_videos: Path) -> None:
        layout = LAYOUTS["futures"]
        source = LeRobotDataset("tests/points", root=point_videos, image_transforms=lambda frames: 255 - frames)
        dataset = open_dataset(source, layout)
        assert_same(InMemorySegments(dataset, layout).__getitems__([3, 60]), collated(dataset, [3, 60]))

    def test_a_position_outside(self, states: Path) -> None:
        layout = LAYOUTS["plain"]
        memory = InMemorySegments(open_dataset(states, layout), layout)
        for position in (112, -113):
            with pytest.raises(IndexError, match=rf"has positions 0 to 111; the batch asks for \[0, {position}\]"):
                memory.__getitems__([0, position])


class TestLoading:
    def test_a_shuffled_loader_gives_every_segment_once(self, states: Path) -> None:
        layout = LAYOUTS["futures"]
        dataset = open_dataset(states, layout)

        def batches(source: Dataset[Any], collate: Any) -> list[dict[str, Any]]:
            order = torch.Generator().manual_seed(5)
            return list(DataLoader(source, batch_size=16, shuffle=True, generator=order, collate_fn=collate))

        found = batches(InMemorySegments(dataset, layout), collate_segments)
        for batch, expected in zip(found, batches(dataset, default_collate), strict=True):
            assert_same(batch, expected)
        seen = torch.cat([batch["index"] for batch in found])
        assert seen.sort().values.tolist() == list(range(112))
        assert seen.tolist() != list(range(112))
        segment = split_segment(found[0], layout)
        assert (segment.length, segment.batch_size) == (4, 16)

    def test_a_subset(self, states: Path) -> None:
        layout = LAYOUTS["futures"]
        memory = InMemorySegments(open_dataset(states, layout), layout)
        batch = next(iter(DataLoader(Subset(memory, [40, 50, 60]), batch_size=3, collate_fn=collate_segments)))
        assert batch["index"].tolist() == [40, 50, 60]

    def test_lists_of_samples_are_collated(self, states: Path) -> None:
        layout = LAYOUTS["futures"]
        dataset = open_dataset(states, layout)
        memory = InMemorySegments(dataset, layout)
        assert_same(collate_segments([memory[3], memory[4]]), collated(dataset, [3, 4]))


class TestRefusals:
    def test_more_than_the_memory_granted(self, points: Path) -> None:
        layout = LAYOUTS["futures"]
        dataset = open_dataset(points, layout)
        with pytest.raises(
            ValueError, match=r"takes 0.000351 GB in memory \(112 frames\), more than max_gigabytes=0.0003"
        ):
            InMemorySegments(dataset, layout, max_gigabytes=0.0003)
        assert len(InMemorySegments(dataset, layout, max_gigabytes=0.0004)) == 112
