"""Files that are cut off are named before a run; one frame that cannot be read does not end it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_frames import arguments, spoiled
from demonstrations import write_dataset
from small_policies import base_policy

from ptr_hf import PTRTrainer, score_dataset
from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.screening import FINE, Screen
from ptr_hf.data.segments import SegmentLayout

LAYOUT = SegmentLayout(None, (0, 1), 2, 2, 2)
VIDEO = "observation.image"
BAD = 40
"""Frame 10 of episode 1."""


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short episodes in one video."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "films", (9, 6, 7), use_videos=True)


@pytest.fixture(scope="module")
def one_bad_picture(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of one picture are no picture."""
    return with_pictures(points, tmp_path_factory.mktemp("bad") / "picture", [BAD])


def with_pictures(root: Path, folder: Path, bad: list[int]) -> Path:
    shutil.copytree(root, folder)
    (path,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index(VIDEO)
    pictures = table[VIDEO].to_pylist()
    for frame in bad:
        pictures[frame] = {"bytes": pictures[frame]["bytes"][:60], "path": None}
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(pictures, table.schema.field(place).type)), path
    )
    return folder


def episodes_changed(root: Path, folder: Path, **columns: Any) -> Path:
    shutil.copytree(root, folder)
    (path,) = (folder / "meta" / "episodes").rglob("*.parquet")
    table = pq.read_table(path)
    rows = table.to_pandas().assign(**{f"videos/{VIDEO}/{name}": values for name, values in columns.items()})
    pq.write_table(pa.Table.from_pandas(rows, schema=table.schema.remove_metadata()), path)
    return folder


def times_changed(root: Path, folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    shutil.copytree(root, folder)
    (path,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("timestamp")
    times = pa.array(change(table["timestamp"].to_numpy().copy()), pa.float32())
    pq.write_table(table.set_column(place, table.schema.field(place), times), path)
    return folder


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200:600] = bytes(400)
    path.write_bytes(content)


class TestDamagedFiles:
    @pytest.mark.full
    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("data/chunk-000/file-000.parquet", halved),
            ("data/chunk-000/file-000.parquet", garbled),
            (f"videos/{VIDEO}/chunk-000/file-000.mp4", halved),
            ("meta/episodes/chunk-000/file-000.parquet", halved),
            ("meta/tasks.parquet", halved),
            ("meta/tasks.parquet", Path.unlink),
            ("meta/info.json", halved),
        ],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )
    def test_they_are_named(self, films: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
        shutil.copytree(films, tmp_path / "off")
        damage(tmp_path / "off" / name)
        with pytest.raises(ValueError, match=rf"{Path(name).name}.*(opy it anew|onvert)"):
            open_dataset(tmp_path / "off", LAYOUT)

    def test_an_older_format(self, films: Path, tmp_path: Path) -> None:
        shutil.copytree(films, tmp_path / "old")
        path = tmp_path / "old" / "meta" / "info.json"
        for version, sentence in (
            ("v2.1", "convert_dataset_v21_to_v30"),
            ("v2.0", "another format than LeRobot reads"),
        ):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"codebase_version": version}))
            with pytest.raises(ValueError, match=sentence):
                open_dataset(tmp_path / "old", LAYOUT)


class TestTimes:
    def test_episodes_that_share_a_part_of_a_video(self, films: Path, tmp_path: Path) -> None:
        folder = episodes_changed(films, tmp_path / "off", from_timestamp=[0.0, 0.0, 1.5], to_timestamp=[0.9, 0.6, 2.2])
        with pytest.raises(ValueError, match=r"gives episodes 0 and 1 the same part of .*file-000.mp4"):
            open_dataset(folder, LAYOUT)
        assert len(open_dataset(folder, LAYOUT, episodes=[2])) == 7

    @pytest.mark.full
    @pytest.mark.parametrize(("begin", "end"), [(9.0, 9.7), (np.nan, 2.2), (1.5, 1.6)])
    def test_an_episode_outside_its_video(self, films: Path, tmp_path: Path, begin: float, end: float) -> None:
        folder = episodes_changed(
            films, tmp_path / "off", from_timestamp=[0.0, 0.9, begin], to_timestamp=[0.9, 1.5, end]
        )
        with pytest.raises(ValueError, match=r"places episode 2 at .* of .*file-000.mp4, which lasts 2.2 s"):
            open_dataset(folder, LAYOUT)

    @pytest.mark.full
    @pytest.mark.parametrize("wrong", [np.nan, 0.3, 7.0])
    def test_one_wrong_timestamp_is_left_out(
        self, films: Path, tmp_path: Path, wrong: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        def change(times: np.ndarray) -> np.ndarray:
            times[11] = wrong
            return times

        dataset = open_dataset(times_changed(films, tmp_path / "off", change), LAYOUT)
        right = open_dataset(films, LAYOUT)
        for reading in (dataset, InMemorySegments(dataset, LAYOUT)):
            for place in range(len(dataset)):
                spoiled_action = bool(reading[place]["action"].isnan().any())
                assert spoiled_action == (place in (9, 11)), place
                if not spoiled_action:
                    assert torch.equal(reading[place][VIDEO], right[place][VIDEO])
        assert "Frame 2 of episode 1 of off cannot be read" in caplog.text

    def test_many_wrong_timestamps(self, films: Path, tmp_path: Path) -> None:
        folder = times_changed(films, tmp_path / "off", lambda times: np.where(np.arange(22) >= 15, times + 0.9, times))
        with pytest.raises(ValueError, match=r"7 of the 22 timestamps .*first in episode 2: frame 0 at 0.9 s"):
            open_dataset(folder, LAYOUT)

    def test_another_rate(self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        open_dataset(times_changed(points, tmp_path / "off", lambda times: times / 3), LAYOUT)
        assert "0.0333 s apart by their timestamps, and fps=10 of meta/info.json says otherwise" in caplog.text


class TestOneBadPicture:
    @pytest.mark.full
    def test_samples_that_show_it_are_left_out_and_name_it(self, one_bad_picture: Path, points: Path) -> None:
        dataset, right = open_dataset(one_bad_picture, LAYOUT), open_dataset(points, LAYOUT)
        memory = InMemorySegments(dataset, LAYOUT)
        screen = Screen(LAYOUT, [VIDEO, "observation.state"])
        for place, memory_names, names in (
            (35, FINE, FINE),
            # a consequence past the last action is named by the segment's first frame
            (36, 36, 36),
            # LeRobot decodes the pictures of the actions' rows too
            (37, FINE, BAD),
            (38, BAD, BAD),
            (40, BAD, BAD),
            (41, FINE, FINE),
        ):
            item = dataset[place]
            assert item["index"] == place
            batch = torch.utils.data.default_collate([item])
            for read, named in ((memory.__getitems__([place]), memory_names), (batch, names)):
                screened, frames = screen.before(read)
                assert frames.tolist() == [named]
                assert bool(screened["action_is_pad"].all()) == (named != FINE)
                if named == FINE:
                    assert torch.equal(read[VIDEO][0], right[place][VIDEO])

    @pytest.mark.full
    def test_a_run_and_a_scoring_pass_go_on(
        self, one_bad_picture: Path, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = arguments(tmp_path / "out", max_steps=14)
        trainer = PTRTrainer(base_policy("act", points), args, train_dataset=one_bad_picture)
        trainer.train()
        record = json.loads((tmp_path / "out" / "ptr_nonfinite.json").read_text())
        assert BAD in {row["index"] for row in record["frames"]}
        assert "Frame 10 of episode 1" in caplog.text
        assert np.isfinite([row["loss"] for row in trainer.state.log_history if "loss" in row]).all()
        caplog.clear()
        scores = score_dataset(trainer.policy, one_bad_picture, preprocessor=trainer.preprocessor, progress=False)
        assert len(scores.index) > 20
        assert np.isfinite(scores.loss).all()
        assert not {38, 42} & set(scores.index.tolist()), "the segment that shows frame 40 has no score"
        assert "cannot be read: segments that need them are left out" in caplog.text

    def test_where_nothing_can_be_read_the_error_is_the_readers(self, points: Path, tmp_path: Path) -> None:
        folder = with_pictures(points, tmp_path / "off", list(range(112)))
        with pytest.raises(OSError, match=r"truncated|cannot identify"):
            open_dataset(folder, LAYOUT)[3]
        with pytest.raises(ValueError, match=r"pictures observation.image of off cannot be read"):
            InMemorySegments(open_dataset(folder, LAYOUT), LAYOUT)


@pytest.mark.full
def test_a_nan_in_what_is_scored(points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = spoiled(points, tmp_path / "nan", {("action", BAD): float("nan")})
    trainer = PTRTrainer(base_policy("act", points), arguments(tmp_path / "out"), train_dataset=points)
    scores = score_dataset(trainer.policy, folder, preprocessor=trainer.preprocessor, progress=False)
    assert np.isfinite(scores.loss).all()
    assert "Dataset indices: 40 (episode 1)" in caplog.text
