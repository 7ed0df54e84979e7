"""What the data files of a LeRobotDataset say of their frames themselves: episode, frame, number, instruction and time.

Only these columns are read, so that a million frames take a second; pictures and vectors stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COUNTED = ("episode_index", "frame_index", "index", "task_index")
TIMESTAMP = "timestamp"


@dataclass(frozen=True)
class FrameColumns:
    """The frames of all data files that are here, in the order in which LeRobot reads them.

    Attributes:
        episode, frame, index, task: (frames,) whole numbers, as recorded.
        timestamp: (frames,) seconds; NaN where none was recorded.
        files: they were read from.
        ends: (files,) frames up to the end of each file.
    """

    episode: np.ndarray
    frame: np.ndarray
    index: np.ndarray
    task: np.ndarray
    timestamp: np.ndarray
    files: tuple[Path, ...]
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.episode)

    def file_of(self, position: int | np.integer) -> Path:
        """The file that a frame lies in."""
        return self.files[int(np.searchsorted(self.ends, position, side="right"))]


def data_files(root: Path) -> list[Path]:
    """The data files of a dataset, in LeRobot's order."""
    return sorted((root / "data").glob("*/*.parquet"))


def read_frame_columns(files: Sequence[Path]) -> FrameColumns:
    """Read the bookkeeping columns of some data files; the last read are kept, while the files stay the same.

    Args:
        files: of one dataset, in LeRobot's order.

    Raises:
        ValueError: a file is damaged, or lacks one of the columns or values of it; the sentence names the file.
    """
    stats = [path.stat() for path in files]
    return _read(tuple(files), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=1)
def _read(files: tuple[Path, ...], _state: tuple[tuple[int, int], ...]) -> FrameColumns:
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*COUNTED, TIMESTAMP)}
    for path in files:
        table = _table(path)
        for name in COUNTED:
            if table[name].null_count or not pa.types.is_integer(table[name].type):
                raise ValueError(
                    f"The column {name!r} of {path} holds something else than whole numbers (or lacks some): copy or convert the "
                    "dataset anew."
                )
            columns[name].append(table[name].to_numpy().astype(np.int64))
        columns[TIMESTAMP].append(table[TIMESTAMP].to_numpy().astype(np.float64))
    counts = [len(part) for part in columns[TIMESTAMP]]
    whole = {name: np.concatenate(parts) if parts else np.empty(0, np.int64) for name, parts in columns.items()}
    episode, frame, index, task, timestamp = whole.values()
    return FrameColumns(episode, frame, index, task, timestamp, files, np.cumsum(counts, dtype=np.int64))


def _table(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            lacking = [name for name in (*COUNTED, TIMESTAMP) if name not in file.schema_arrow.names]
            if lacking:
                raise ValueError(f"{path} lacks the column {lacking[0]!r}, which every data file of LeRobot has.")
            return file.read(columns=[*COUNTED, TIMESTAMP])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({_first_line(error)}): copy it anew.") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
