"""Files of a dataset that were cut off or damaged: found cheaply, and named."""

import hashlib
import json
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import get_video_duration_in_s


def files_digest(dataset: LeRobotDataset) -> str:
    """A digest of a dataset's frames: its data and video files by name, size and time, its revision and its episodes."""
    root = Path(dataset.root)
    digest = hashlib.sha256(f"{dataset.revision} {dataset.episodes}".encode())
    files = [path for part in ("data", "videos") for path in sorted((root / part).rglob("*")) if path.is_file()]
    for path in files:
        about = path.stat()
        digest.update(f"{path.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def video_seconds(path: Path) -> float:
    """How long a video is by its own header.

    Raises:
        ValueError: the file is missing, damaged, or shorter than its own parts say, as after a broken copy.
    """
    try:
        if path.suffix == ".mp4":
            _check_boxes(path)
        return get_video_duration_in_s(path)
    except (OSError, ValueError, IndexError, TypeError, av.FFmpegError) as error:
        raise ValueError(f"The video {path} is damaged or cut off ({error}): copy it anew.") from error


def damaged_file(root: Path, thorough: bool = False) -> str | None:
    """The first file of a dataset's metadata and data that cannot be read, in words; None where all can.

    Args:
        root: of the dataset.
        thorough: read all of the data files, not only what says what is in them.
    """
    for path in sorted((root / "meta").glob("*.json")):
        try:
            json.loads(path.read_text())
        except (OSError, ValueError) as error:
            return f"{path} is damaged ({error})"
    tables = [root / "meta" / "tasks.parquet", *sorted((root / "meta" / "episodes").glob("*/*.parquet"))]
    for path in [*tables, *sorted((root / "data").glob("*/*.parquet"))]:
        try:
            if path.is_file():
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups if thorough else 0):
                        file.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            return f"{path} is damaged or cut off ({str(error).strip().splitlines()[0]})"
    return None


def _check_boxes(path: Path) -> None:
    """An MP4 is a row of boxes, each of which says how long it is: their ends have to be the file's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        place = 0
        while place < size:
            file.seek(place)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            elif length == 0:
                # the last box goes on to the end
                return
            if len(header) < 8 or length < 8 or place + length > size:
                raise ValueError(f"it has {size} bytes and says that there are more")
            place += length
    if not size:
        raise ValueError("it is empty")
