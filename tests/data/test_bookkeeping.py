"""Metadata that disagree with the data: what the data settle is set right in memory, the rest refused by episode and file."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from demonstrations import TASKS, write_dataset
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.bookkeeping import mend_metadata
from ptr_hf.data.datasets import episode_spans, open_dataset
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.data.segments import SegmentLayout

LAYOUT = SegmentLayout(None, (0, 1), 2, 2, 2)
LENGTHS = (8, 6, 9)
STARTS = (0, 8, 14)
EPISODES, DATA, INSTRUCTIONS = "meta/episodes", "data", "meta/tasks.parquet"
Spoil = Callable[[pd.DataFrame], pd.DataFrame]


def light(root: Path, **settings: Any) -> Path:
    """Three episodes without the episodes' statistics, which take most of the time of opening."""
    write_dataset(root, LENGTHS, cameras=(), **settings)
    for path in (root / EPISODES).rglob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.select([name for name in table.column_names if not name.startswith("stats/")]), path)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All in one data file."""
    return light(tmp_path_factory.mktemp("datasets") / "good")


@pytest.fixture(scope="module")
def filed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file for each."""
    return light(tmp_path_factory.mktemp("datasets") / "filed", file_an_episode=True)


def spoiled(root: Path, folder: Path, what: str, spoil: Spoil) -> Path:
    """A copy in which all rows of the data or of meta/episodes are others; the files keep their numbers of rows, if they can."""
    shutil.copytree(root, folder)
    paths = sorted((folder / what).rglob("*.parquet")) if what != INSTRUCTIONS else [folder / what]
    tables = [pq.read_table(path) for path in paths]
    frame = spoil(pd.concat([table.to_pandas() for table in tables], ignore_index=what != INSTRUCTIONS))
    first = 0
    for path, table in zip(paths, tables, strict=True):
        last = first + len(table) if path != paths[-1] else len(frame)
        part = frame.iloc[first:last]
        pq.write_table(
            pa.Table.from_pandas(part, schema=table.schema.remove_metadata() if what != INSTRUCTIONS else None), path
        )
        first = last
    return folder


def column(name: str, values: Sequence[Any]) -> Spoil:
    return lambda frame: frame.assign(**{name: values})


def counted(info: dict[str, int]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "meta" / "info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | info))

    return change


@cache
def right(root: Path, layout: SegmentLayout = LAYOUT, *episodes: int) -> LeRobotDataset:
    """A dataset in order, opened once."""
    return open_dataset(root, layout, episodes=list(episodes) or None)


def assert_reads_as(dataset: Any, expected: Any) -> None:
    """The same at the beginning, in the middle and at the end of every episode, padding and instruction included."""
    assert len(dataset) == len(expected)
    for position in [*range(0, len(expected), 5), len(expected) - 1]:
        mine, theirs = dataset[position], expected[position]
        for key, value in theirs.items():
            assert torch.equal(mine[key], value) if isinstance(value, torch.Tensor) else mine[key] == value, key


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings since it was last asked."""

    def since() -> list[str]:
        ours = [record for record in caplog.records if record.name.startswith("ptr_hf")]
        messages = [record.message for record in ours if record.levelno == logging.WARNING]
        caplog.clear()
        return messages

    return since


MENDED: dict[str, tuple[str, str, Spoil, str]] = {
    "from and to start anew in every file": (
        "filed",
        EPISODES,
        lambda rows: rows.assign(dataset_from_index=[0, 0, 6], dataset_to_index=[8, 6, 15]),
        "dataset_from_index and dataset_to_index .*first at episode 1",
    ),
    "from and to swapped between episodes": (
        "good",
        EPISODES,
        lambda rows: rows.assign(dataset_from_index=[14, 8, 0], dataset_to_index=[22, 14, 9]),
        "first at episode 0",
    ),
    "rows of meta/episodes in another order": (
        "good",
        EPISODES,
        lambda rows: rows.iloc[[2, 0, 1]],
        "not in the order of the episodes",
    ),
    "length": ("good", EPISODES, column("length", [8, 60, 9]), "length of episode 1"),
    "index counts anew in every episode": (
        "filed",
        DATA,
        lambda rows: rows.assign(index=rows["frame_index"]),
        "column 'index' .*first in episode 1",
    ),
    "index shifted": ("good", DATA, lambda rows: rows.assign(index=rows["index"] + 3), "column 'index'"),
    "the file of an episode": (
        "filed",
        EPISODES,
        column("data/file_index", [0, 2, 1]),
        "another data file for episode 1",
    ),
    "tasks.parquet in another order": (
        "good",
        INSTRUCTIONS,
        lambda rows: rows.iloc[::-1],
        "not in the order of their task_index",
    ),
    "tasks of meta/episodes that were renamed since": (
        "good",
        EPISODES,
        column("tasks", [["an older wording"], [TASKS[1]], [TASKS[0]]]),
        "lists other instructions for episode 0",
    ),
}


class TestSetRight:
    @pytest.mark.full
    @pytest.mark.parametrize("fault", MENDED)
    def test_the_frames_are_read_as_from_a_dataset_in_order(
        self, fault: str, request: pytest.FixtureRequest, tmp_path: Path, said: Callable[[], list[str]]
    ) -> None:
        name, what, spoil, sentence = MENDED[fault]
        root = request.getfixturevalue(name)
        folder = spoiled(root, tmp_path / "off", what, spoil)
        whole = open_dataset(folder, LAYOUT)
        (warning,) = said()
        assert pd.Series([warning]).str.contains(sentence).all(), warning
        assert_reads_as(whole, right(root))
        assert [first for _, first, _ in episode_spans(whole)] == list(STARTS)

    @pytest.mark.parametrize(
        "fault", ["from and to start anew in every file", "rows of meta/episodes in another order", "index shifted"]
    )
    def test_some_episodes(
        self, fault: str, request: pytest.FixtureRequest, tmp_path: Path, said: Callable[[], list[str]]
    ) -> None:
        name, what, spoil, _ = MENDED[fault]
        root = request.getfixturevalue(name)
        part = open_dataset(spoiled(root, tmp_path / "off", what, spoil), LAYOUT, episodes=[0, 2])
        assert said()
        assert_reads_as(part, right(root, LAYOUT, 0, 2))

    @pytest.mark.parametrize(
        "info", [{"total_frames": 20}, {"total_frames": 99}, {"total_tasks": 0}, {"total_episodes": 2}]
    )
    def test_counts_of_info_json(self, good: Path, tmp_path: Path, info: dict[str, int]) -> None:
        shutil.copytree(good, tmp_path / "off")
        counted(info)(tmp_path / "off")
        assert_reads_as(open_dataset(tmp_path / "off", LAYOUT), right(good))

    def test_every_way_of_reading(self, filed: Path, tmp_path: Path, said: Callable[[], list[str]]) -> None:
        spoil = MENDED["from and to start anew in every file"][2]
        folder = spoiled(filed, tmp_path / "off", EPISODES, spoil)
        expected = right(filed)
        assert_reads_as(InMemorySegments(open_dataset(folder, LAYOUT), LAYOUT), expected)
        assert len(said()) == 1
        assert_reads_as(open_dataset(LeRobotDataset("tests/points", root=folder), LAYOUT), expected)
        assert len(said()) == 1
        slots = [f"left_arm_joint_{number}" for number in range(1, 5)]
        names = {"action": slots[:2], "state": slots}

        def of(root: Path, **settings: Any) -> MixtureMetadata:
            return MixtureMetadata.read(MixtureConfig([SourceConfig(root, name="one", embodiment=names)], **settings))

        said()
        mixture = Mixture(of(folder), LAYOUT)
        assert len(said()) == 1
        assert_reads_as(mixture, Mixture(of(filed), LAYOUT))
        located = mixture.meta.located(np.array([1, 2]), np.array([0, 3]))
        assert located[-1].tolist() == [8, 17]
        streams = [
            iter(StreamingMixture(of(root, streaming=True, stream_episodes=3), LAYOUT)) for root in (folder, filed)
        ]
        for _ in range(20):
            mine, other = (next(stream) for stream in streams)
            assert torch.equal(mine["action_is_pad"], other["action_is_pad"])
            assert mine["index"] == other["index"]
        assert len([sentence for sentence in said() if "dataset_from_index" in sentence]) == 1

    def test_the_metadata_of_lerobots_own_training(self, filed: Path, tmp_path: Path) -> None:
        folder = spoiled(filed, tmp_path / "off", EPISODES, MENDED["from and to start anew in every file"][2])
        dataset = LeRobotDataset("tests/points", root=folder, delta_timestamps={"action": [0.0, 0.1]})
        assert len(mend_metadata(dataset.meta, fixed_index=True)) == 1
        assert_reads_as(dataset, LeRobotDataset("tests/points", root=filed, delta_timestamps={"action": [0.0, 0.1]}))
        folder = spoiled(filed, tmp_path / "index", DATA, lambda rows: rows.assign(index=rows["frame_index"]))
        with pytest.raises(ValueError, match=r"column 'index' of .*file-001.parquet .* episode 1: convert"):
            mend_metadata(LeRobotDatasetMetadata("tests/points", root=folder), fixed_index=True)


def without(episode: int, frames: Sequence[int]) -> Spoil:
    return lambda rows: rows[~((rows["episode_index"] == episode) & rows["frame_index"].isin(frames))]


def placed(episode: int, name: str, values: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    def change(rows: pd.DataFrame) -> pd.DataFrame:
        changed = rows.copy()
        own = changed["episode_index"] == episode
        changed.loc[own, name] = values(changed.loc[own, name].to_numpy())
        return changed

    return change


REFUSED: dict[str, tuple[str, Spoil, str]] = {
    "last frames missing": (
        DATA,
        without(1, [4, 5]),
        r"Episode 1 .* 6 frames by meta/episodes and 4 in .*file-000.parquet",
    ),
    "a frame missing in the middle": (
        DATA,
        without(2, [3]),
        r"episode 2 .* incomplete: frame 3 is missing in .*file-000",
    ),
    "a frame twice": (
        DATA,
        placed(2, "frame_index", lambda frames: np.maximum(frames, 1)),
        r"episode 2 .* doubled: frame 1 is there 2 times in .*file-000",
    ),
    "frames out of order": (DATA, placed(0, "frame_index", lambda frames: frames[::-1]), r"episode 0 .* out of order"),
    "episodes interleaved": (
        DATA,
        lambda rows: rows.sort_values("frame_index", kind="stable"),
        r"episode \d .* do not lie together",
    ),
    "no frames of an episode": (DATA, without(1, range(6)), r"Episode 1 is of .*no data file has frames of it"),
    "an episode without metadata": (
        EPISODES,
        lambda rows: rows.iloc[:2],
        r"has no row for Episode 2 \(meta/info.json counts 3",
    ),
    "an episode in the middle without metadata": (
        EPISODES,
        lambda rows: rows.iloc[[0, 2]],
        r"has no row for Episode 1",
    ),
    "an episode twice": (EPISODES, lambda rows: rows.iloc[[0, 1, 2, 1]], r"has 2 rows for episode 1"),
    "an unknown instruction": (
        DATA,
        placed(1, "task_index", lambda task: task + 6),
        r"Episode 1 .* task_index 7 in .*file-000",
    ),
    "no instruction at all": (DATA, placed(1, "task_index", lambda task: task - 2), r"Episode 1 .* task_index -1"),
    "instructions swapped": (
        INSTRUCTIONS,
        lambda rows: rows.assign(task_index=[1, 0]),
        r"Episode 0 .* is 'push the puck to the goal' by meta/episodes and 'reach the goal' by task_index",
    ),
    "numbers of instructions with a hole": (
        INSTRUCTIONS,
        lambda rows: rows.assign(task_index=[0, 2]),
        r"numbers its 2 instr.* 0, 2",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("fault", REFUSED)
    def test_episode_and_file_are_named(self, good: Path, tmp_path: Path, fault: str) -> None:
        what, spoil, sentence = REFUSED[fault]
        folder = spoiled(good, tmp_path / "off", what, spoil)
        with pytest.raises(ValueError, match=sentence):
            open_dataset(folder, LAYOUT)

    def test_an_episode_of_the_data_that_no_metadata_know(self, good: Path, tmp_path: Path) -> None:
        folder = spoiled(good, tmp_path / "off", EPISODES, lambda rows: rows.iloc[:2])
        counted({"total_episodes": 2, "total_frames": 14})(folder)
        with pytest.raises(
            ValueError, match=r"file-000.parquet has frames of episode 2, and meta/episodes .* knows 0 to 1"
        ):
            open_dataset(folder, LAYOUT)
        assert len(open_dataset(folder, LAYOUT, episodes=[0, 1])) == 14

    def test_the_broken_episode_can_be_left_out(self, good: Path, tmp_path: Path) -> None:
        folder = spoiled(good, tmp_path / "off", DATA, without(1, [4, 5]))
        dataset = open_dataset(folder, LAYOUT, episodes=[0, 2])
        assert_reads_as(dataset, right(good, LAYOUT, 0, 2))


@pytest.mark.full
def test_datasets_in_order_pass_without_a_word(
    good: Path, filed: Path, point_videos: Path, said: Callable[[], list[str]]
) -> None:
    bundled = Path(__file__).parents[2] / "src" / "ptr_hf" / "data" / "bundled"
    for root in (good, filed, point_videos, *sorted(path for path in bundled.iterdir() if (path / "meta").is_dir())):
        open_dataset(root, LAYOUT)
        open_dataset(root, LAYOUT, episodes=[2, 0])
    assert said() == []
