"""What the data files say of their frames does not depend on the blocks and files in which it is read."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptr_hf.data import frame_columns
from ptr_hf.data.frame_columns import COUNTED, TIMESTAMP, read_frame_runs


def wrong_place(values: np.ndarray, expected: np.ndarray) -> int:
    wrong = np.flatnonzero(values != expected)
    return int(wrong[0]) if len(wrong) else -1


@pytest.mark.parametrize("seed", range(8))
def test_runs_are_those_of_the_whole_columns(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(seed)
    lengths = draws.integers(1, 12, 9)
    columns = {
        "episode_index": np.repeat(draws.permutation(9), lengths),
        "frame_index": np.concatenate([np.arange(length) for length in lengths]),
        "index": np.arange(lengths.sum()),
        "task_index": np.repeat(draws.integers(0, 3, 9), lengths),
    }
    for name in ("frame_index", "index", "task_index"):
        spoiled = draws.choice(lengths.sum(), 3)
        columns[name][spoiled] += draws.integers(0, 2, 3)
    cuts = [0, *np.sort(draws.choice(lengths.sum(), 2, replace=False)).tolist(), int(lengths.sum())]
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path, (first, last) in zip(files, pairwise(cuts), strict=True):
        times = np.zeros(last - first, np.float32)
        pq.write_table(pa.table({name: columns[name][first:last] for name in COUNTED} | {TIMESTAMP: times}), path)
    monkeypatch.setattr(frame_columns, "BLOCK", int(draws.integers(2, 9)))
    runs = read_frame_runs(files)

    starts = np.flatnonzero(np.diff(columns["episode_index"], prepend=-1))
    edges = list(pairwise([*starts.tolist(), int(lengths.sum())]))
    assert runs.frames == lengths.sum()
    assert runs.start.tolist() == starts.tolist()
    assert runs.count.tolist() == [last - first for first, last in edges]
    assert runs.episode.tolist() == columns["episode_index"][starts].tolist()
    assert runs.index.tolist() == columns["index"][starts].tolist()
    for run, (first, last) in enumerate(edges):
        place, index = np.arange(last - first), columns["index"][first:last]
        assert runs.tasks[run] == tuple(np.unique(columns["task_index"][first:last]))
        assert runs.disorder[run] == wrong_place(columns["frame_index"][first:last], place)
        assert runs.miscount[run] == wrong_place(index, index[0] + place)
        assert runs.frames_of(int(runs.episode[run])).tolist() == columns["frame_index"][first:last].tolist()
    assert [runs.file_of(place) for place in range(runs.frames)] == [
        path for path, (first, last) in zip(files, pairwise(cuts), strict=True) for _ in range(first, last)
    ]
