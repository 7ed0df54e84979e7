"""Weights files of anyone's: what each kind of row weighs, and one sentence for everything that does not match."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lerobot.datasets import LeRobotDatasetMetadata

from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE
from ptr_hf.scoring.weight_files import FrameTable, read_weights

LENGTHS = (30, 24, 40, 18)
FIRST = (0, 30, 54, 94)
FRAMES = sum(LENGTHS)
EPISODE = np.repeat(range(4), LENGTHS)
FRAME = np.concatenate([np.arange(length) for length in LENGTHS])
VALUES = np.random.default_rng(0).uniform(0.1, 1.0, FRAMES).astype(np.float32)


@pytest.fixture(scope="module")
def meta(points: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("tests/points", root=points)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(name: str = "weights.csv", **columns: Any) -> Path:
        path, rows = tmp_path / name, pd.DataFrame(columns)
        rows.to_parquet(path) if path.suffix == ".parquet" else rows.to_csv(path, index=False)
        return path

    return written


BY_INDEX = {"index": np.arange(FRAMES), "weight": VALUES}
BY_FRAME = {"episode_index": EPISODE, "frame_index": FRAME, "weight": VALUES}


@pytest.mark.parametrize("name", ["weights.csv", "weights.parquet"])
@pytest.mark.parametrize("columns", [BY_INDEX, BY_FRAME, BY_INDEX | BY_FRAME], ids=["index", "frame", "both"])
def test_by_frame_in_any_order(
    meta: LeRobotDatasetMetadata, write: Callable[..., Path], columns: dict[str, Any], name: str
) -> None:
    order = np.random.default_rng(1).permutation(FRAMES)
    shuffled = {key: values[order] for key, values in columns.items()}
    (found,) = read_weights(write(name, **shuffled), [FrameTable.of(meta)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, VALUES, rtol=1e-6)


def test_by_episode(meta: LeRobotDatasetMetadata, write: Callable[..., Path]) -> None:
    (found,) = read_weights(write(episode_index=[3, 0, 2, 1], weight=[0.3, 1, 0, 0.5]), [FrameTable.of(meta)])
    np.testing.assert_allclose(found, np.array([1, 0.5, 0, 0.3])[EPISODE], rtol=1e-6)


def test_a_subset_of_the_episodes_is_matched_by_index(meta: LeRobotDatasetMetadata, write: Callable[..., Path]) -> None:
    table = FrameTable.of(meta, [2, 1])
    read = np.isin(EPISODE, [1, 2])
    for rows in (np.arange(FRAMES), np.flatnonzero(read)):
        (found,) = read_weights(write(index=rows, weight=VALUES[rows]), [table])
        np.testing.assert_allclose(found[read], VALUES[read], rtol=1e-6)


def test_by_chunk_where_every_other_frame_is_missing(meta: LeRobotDatasetMetadata, write: Callable[..., Path]) -> None:
    rows = np.flatnonzero(FRAME % 2 == 0)
    path = write(episode_index=EPISODE[rows], frame_index=FRAME[rows], weight=VALUES[rows])
    with pytest.raises(ValueError, match=r"says nothing of 56 of the 112 chunks.*frame 1 of episode 0.*list them all"):
        read_weights(path, [FrameTable.of(meta)])


@pytest.mark.parametrize("sources", [(0, 1), ("left", "right")], ids=["numbers", "names"])
def test_several_datasets(meta: LeRobotDatasetMetadata, write: Callable[..., Path], sources: tuple[Any, Any]) -> None:
    tables = [FrameTable.of(meta, name="left"), FrameTable.of(meta, [0, 1], name="right")]
    rows = {"episode_index": [0, 1, 2, 3, 0, 1], "weight": [1, 1, 1, 0.5, 0.2, 1]}
    found = read_weights(write(source=[sources[0]] * 4 + [sources[1]] * 2, **rows), tables)
    assert (found[0][FIRST[3] :] == 0.5).all()
    assert found[1][0] == np.float32(0.2)
    with pytest.raises(ValueError, match=r"no column `source`, and training reads 2 datasets: add it"):
        read_weights(write(**rows), tables)
    with pytest.raises(
        ValueError, match=r"weighs the source 7, which is not trained on: sources here are 0 \(left\), 1"
    ):
        read_weights(write(source=[7] * 6, **rows), tables)


FOUR = {"episode_index": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [0]}, r"has the columns index; it needs `weight`"),
        ({"weight": [1.0]}, r"has the columns weight; it needs"),
        ({"weight": [1.0], "frame_index": [0]}, r"it needs `weight` and `index`, `episode_index`"),
        ({"weight": [], "index": []}, r"has no rows"),
        ({**FOUR, "weight": [1, np.nan, 1, 1]}, r"the weight nan in row 1: weights must be finite and 0 or more"),
        ({**FOUR, "weight": [1, 1, -0.5, 1]}, r"the weight -0.5 in row 2"),
        ({**FOUR, "weight": [1, 1, 1, np.inf]}, r"the weight inf in row 3"),
        ({**FOUR, "weight": ["a", "b", "c", "d"]}, r"The column weight .* it must hold numbers"),
        ({"episode_index": [0, 1.5, 2, 3], "weight": [1] * 4}, r"episode_index .* holds 1.5 in row 1.*whole numbers"),
        ({**FOUR, "weight": [0] * 4}, r"gives weight 0 to all that is trained on"),
        ({"episode_index": [0, 1, 2, 4], "weight": [1] * 4}, r"weighs episode_index 4, which tests/points does not.*0 to 3"),
        ({"episode_index": [0, 1, 2, 2], "weight": [1] * 4}, r"weighs episode_index 2 more than once: list it once"),
        ({"episode_index": [0, 1, 2], "weight": [1] * 3}, r"says nothing of 18 of the 112 chunks.*frame 0 of episode 3"),
        ({"index": np.arange(1, 113), "weight": VALUES}, r"weighs index 112, which tests/points does not have .*0 to 111"),
        ({"index": np.zeros(112, int), "weight": VALUES}, r"weighs index 0 more than once"),
        ({"index": np.arange(50), "weight": VALUES[:50]}, r"says nothing of 62 of the 112 chunks.*frame 20 of episode 1"),
        (
            {"episode_index": [0], "frame_index": [30], "weight": [1.0]},
            r"weighs episode_index 0, frame_index 30, which tests/points does not have .*made for other data",
        ),
        (
            {"index": np.arange(112)[::-1], "episode_index": EPISODE, "frame_index": FRAME, "weight": VALUES},
            r"weighs index 111, episode_index 0, frame_index 0, which tests/points does not have .*contradicts itself",
        ),
        (
            {"index": np.arange(112), "episode_index": EPISODE[::-1], "weight": VALUES},
            r"weighs index 0, episode_index 3, which tests/points does not have .*contradicts itself",
        ),
        ({"index": np.arange(112), "weight": VALUES, "source": [1] * 112}, r"weighs the source 1, which is not trained on"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_refused(
    meta: LeRobotDatasetMetadata, write: Callable[..., Path], columns: dict[str, Any], message: str
) -> None:
    path = write(**columns)
    with pytest.raises(ValueError, match=message) as refused:
        read_weights(path, [FrameTable.of(meta)])
    assert str(path) in str(refused.value)


def test_files_that_are_none(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("1")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, message in (
        ("missing.csv", r"There is no weights file .*missing.csv: give"),
        (".", r"holds no ptr_chunks.parquet"),
        ("weights.txt", r"is neither .parquet nor .csv"),
        ("broken.parquet", r"broken.parquet cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name, [FrameTable.of(meta)])


def noted(folder: Path, **changes: Any) -> None:
    note = {"repo_id": "tests/points", "revision": None, "frames": FRAMES, "episodes": 4}
    (folder / SETTINGS_FILE).write_text(json.dumps({"datasets": [note | changes]}))


def test_the_files_of_an_inspection_are_of_its_dataset(
    meta: LeRobotDatasetMetadata, write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(CHUNKS_FILE, **BY_INDEX, **{key: BY_FRAME[key] for key in ("episode_index", "frame_index")})
    write(EPISODES_FILE, **FOUR, weight=[1, 1, 0.5, 1], frames=LENGTHS)
    tables = [FrameTable.of(meta)]
    noted(tmp_path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(read_weights(tmp_path, tables)[0], VALUES, rtol=1e-6)
        assert read_weights(tmp_path / EPISODES_FILE, tables)[0][FIRST[2]] == 0.5
    assert not [record for record in caplog.records if record.name.startswith("ptr_hf")]
    noted(tmp_path, repo_id="someone/else")
    with caplog.at_level(logging.WARNING):
        read_weights(tmp_path, tables)
    assert "was made for repo_id someone/else, not tests/points; its frames match" in caplog.text
    with pytest.raises(ValueError, match=r"no column `source`, and training reads 2 datasets"):
        read_weights(tmp_path, [*tables, *tables])
