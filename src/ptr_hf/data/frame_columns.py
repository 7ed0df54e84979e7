"""What the data files of a LeRobotDataset say of their frames themselves: episode, frame, number and instruction.

Only these columns are read, a block at a time, so that a million frames take a second and any number of them little memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from lerobot.datasets.lerobot_dataset import LeRobotDataset

COUNTED = ("episode_index", "frame_index", "index", "task_index")
TIMESTAMP = "timestamp"
BLOCK = 1 << 16
"""Frames that are looked at together."""
NOWHERE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class FrameRuns:
    """The frames of all data files that are here, in the order in which LeRobot reads them, as runs of one episode each.

    Attributes:
        episode: (runs,) as recorded.
        start: (runs,) position of each run's first frame.
        count: (runs,) frames.
        index: (runs,) number of the first frame.
        tasks: of each run, its frames' instructions, rising.
        disorder: (runs,) place in the run of the first frame whose `frame_index` is another; -1 where there is none.
        miscount: (runs,) the same of `index`, which counts on from the first frame's.
        files: they were read from.
        ends: (files,) frames up to the end of each file.
    """

    episode: Int[np.ndarray, " runs"]
    start: Int[np.ndarray, " runs"]
    count: Int[np.ndarray, " runs"]
    index: Int[np.ndarray, " runs"]
    tasks: Sequence[tuple[int, ...]]
    disorder: Int[np.ndarray, " runs"]
    miscount: Int[np.ndarray, " runs"]
    files: tuple[Path, ...]
    ends: Int[np.ndarray, " files"]

    @property
    def frames(self) -> int:
        """Of all files."""
        return int(self.count.sum())

    def file_of(self, position: int | np.integer) -> Path:
        """The file that a frame lies in."""
        return self.files[int(np.searchsorted(self.ends, position, side="right"))]

    def frames_of(self, episode: int) -> Int[np.ndarray, " frames"]:
        """The `frame_index` of an episode's frames, read anew."""
        blocks = (block for path in self.files for block in _blocks(path))
        return np.concatenate([block["frame_index"][block["episode_index"] == episode] for block in blocks])


def data_files(root: Path) -> list[Path]:
    """The data files of a dataset, in LeRobot's order."""
    return sorted((root / "data").glob("*/*.parquet"))


def read_frame_runs(files: Sequence[Path]) -> FrameRuns:
    """Read the bookkeeping columns of some data files; what was found last is kept, while the files stay the same.

    Args:
        files: of one dataset, in LeRobot's order.

    Raises:
        ValueError: a file is damaged, or lacks one of the columns or values of it; the sentence names the file.
    """
    stats = [path.stat() for path in files]
    return _read(tuple(files), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=1)
def _read(files: tuple[Path, ...], _state: tuple[tuple[int, int], ...]) -> FrameRuns:
    parts, tasks, ends, total = [np.empty((6, 0), np.int64)], [], [], 0
    for path in files:
        for block in _blocks(path):
            found, of_parts = _runs_of(block)
            found[1] += total
            parts.append(found)
            tasks += of_parts
            total += len(block["index"])
        ends.append(total)
    # a run that a block or a file ends in the middle of goes on in the next one
    episode, start, frame, index, disorder, miscount = np.concatenate(parts, axis=1)
    first = run_starts(episode)
    size = np.diff(first, append=len(episode))
    before = start - np.repeat(start[first], size)

    def earliest(begins: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        wrong = np.where(begins != before, 0, wrong)
        places = np.where(wrong == NOWHERE, NOWHERE, before + np.minimum(wrong, total))
        found = np.minimum.reduceat(places, first) if len(first) else places
        return np.where(found == NOWHERE, -1, found)

    return FrameRuns(
        episode=episode[first],
        start=start[first],
        count=np.diff(start[first], append=total),
        index=index[first],
        tasks=[
            tasks[at] if parts == 1 else tuple(sorted(set().union(*tasks[at : at + parts])))
            for at, parts in zip(first.tolist(), size.tolist(), strict=True)
        ],
        disorder=earliest(frame, disorder),
        miscount=earliest(index - np.repeat(index[first], size), miscount),
        files=files,
        ends=np.array(ends, np.int64),
    )


def episode_column(meta: Any, name: str) -> pa.ChunkedArray:
    """A column of meta/episodes at once; `meta.episodes[name]` would make a Python object of every row.

    Args:
        meta: of a dataset or a mixture.
        name: of the column.
    """
    return meta.episodes.with_format("arrow")[:].column(name)


def table_blocks(dataset: LeRobotDataset, *names: str) -> Iterator[list[np.ndarray]]:
    """Columns of an open dataset, some frames at a time."""
    table = dataset.hf_dataset.data
    for first in range(0, len(table), BLOCK):
        part = table.slice(first, BLOCK)
        yield [part.column(name).to_numpy() for name in names]


def run_starts(episode: Int[np.ndarray, " frames"]) -> Int[np.ndarray, " runs"]:
    """Positions at which another episode begins."""
    return np.flatnonzero(np.diff(episode, prepend=episode[:1] - 1))


def _runs_of(block: dict[str, np.ndarray]) -> tuple[Int[np.ndarray, "6 runs"], list[tuple[int, ...]]]:
    """Of each run in a block: episode, start, its first frame's two numbers, where these stop counting; and its instructions."""
    episode, frame, index, task = (block[name] for name in COUNTED)
    starts = run_starts(episode)
    counts = np.diff(starts, append=len(episode))
    place = np.arange(len(episode)) - np.repeat(starts, counts)

    def stops(values: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(
            np.where(values == np.repeat(values[starts], counts) + place, NOWHERE, place), starts
        )

    lowest, highest = np.minimum.reduceat(task, starts).tolist(), np.maximum.reduceat(task, starts).tolist()
    tasks = [
        (low,) if low == high else tuple(np.unique(task[at : at + count]).tolist())
        for low, high, at, count in zip(lowest, highest, starts, counts, strict=True)
    ]
    return np.stack([episode[starts], starts, frame[starts], index[starts], stops(frame), stops(index)]), tasks


def _blocks(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The columns `COUNTED` of a file, some frames at a time."""
    try:
        with pq.ParquetFile(path) as file:
            lacking = [name for name in (*COUNTED, TIMESTAMP) if name not in file.schema_arrow.names]
            if lacking:
                raise ValueError(f"{path} lacks the column {lacking[0]!r}, which every data file of LeRobot has.")
            for batch in file.iter_batches(BLOCK, columns=list(COUNTED)):
                for name in COUNTED:
                    if batch[name].null_count or not pa.types.is_integer(batch[name].type):
                        raise ValueError(
                            f"The column {name!r} of {path} holds something else than whole numbers (or lacks some): copy or "
                            "convert the dataset anew."
                        )
                if len(batch):
                    yield {name: batch[name].to_numpy().astype(np.int64) for name in COUNTED}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({_first_line(error)}): copy it anew.") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
