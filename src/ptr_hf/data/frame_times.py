"""Whether a dataset's timestamps fit its rate and its videos: LeRobot looks a video's frames up by them alone."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import get_video_duration_in_s

from ptr_hf.data.frame_columns import episode_column, table_blocks

RATE_TOLERANCE = 0.1
"""The frames' mean rate may differ by so much of the rate in info.json."""
FEW = 0.02
"""Share of frames that may have a wrong time, and are left out; where there are more, the dataset is refused."""
LOOKED_AT = 100_000
"""About so many steps, spread evenly, tell the rate."""


def check_rate(dataset: LeRobotDataset) -> str | None:
    """A sentence where the frames are recorded at another rate than meta/info.json says.

    Args:
        dataset: open; its episodes' frames lie together and in order.
    """
    fps, every = float(dataset.meta.fps), max(1, len(dataset.hf_dataset) // LOOKED_AT)
    parts = [
        np.diff(time.astype(np.float64))[np.diff(episode) == 0][::every].copy()
        for episode, time in table_blocks(dataset, "episode_index", "timestamp")
    ]
    steps = np.concatenate([np.empty(0), *parts])
    steps = steps[np.isfinite(steps)]
    if not len(steps) or abs(float(np.median(steps)) * fps - 1.0) <= RATE_TOLERANCE:
        return None
    return (
        f"The frames of {dataset.repo_id} are {np.median(steps):.3g} s apart by their timestamps, and fps={fps:g} of "
        "meta/info.json says otherwise: chunks and consequences are counted in frames; mend whichever of the two is wrong."
    )


def wrong_times(dataset: LeRobotDataset) -> np.ndarray:
    """Positions of frames whose timestamp is that of no frame or another frame of their video.

    Args:
        dataset: open, with its videos here; its metadata have been checked.

    Raises:
        ValueError: a video is damaged, an episode's part of it is another's or too short, or many timestamps are wrong.
    """
    meta = dataset.meta
    fps, total = float(meta.fps), len(dataset.hf_dataset)
    if not meta.video_keys:
        return np.empty(0, dtype=np.int64)
    chosen = range(meta.total_episodes) if dataset.episodes is None else dataset.episodes
    for key in meta.video_keys:
        _check_spans(dataset, key, chosen)

    def regular(frame: np.ndarray, time: np.ndarray) -> np.ndarray:
        return np.abs(time.astype(np.float64) - frame / fps) <= 0.5 / fps

    wrong = total - sum(int(regular(*block).sum()) for block in table_blocks(dataset, "frame_index", "timestamp"))
    if wrong > 0.5 * total:
        # a recording with times of its own is looked up by them
        return _positions(~np.isfinite(time) for (time,) in table_blocks(dataset, "timestamp"))
    places = _positions(~regular(*block) for block in table_blocks(dataset, "frame_index", "timestamp"))
    if wrong > max(1, FEW * total):
        table = dataset.hf_dataset.data
        episode, frame, time = (
            table.column(name)[int(places[0])].as_py() for name in ("episode_index", "frame_index", "timestamp")
        )
        raise ValueError(
            f"{wrong} of the {total} timestamps of {dataset.repo_id} are not those of their frames at fps={fps:g}, and "
            f"its videos are looked up by them (first in episode {episode}: frame {frame} at {time:.4g} s): convert the "
            "dataset anew."
        )
    return places


def _positions(marked: Iterable[np.ndarray]) -> np.ndarray:
    """Where blocks of marks that follow each other are set."""
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    first = 0
    for block in marked:
        found.append(first + np.flatnonzero(block))
        first += len(block)
    return np.concatenate(found)


def _check_spans(dataset: LeRobotDataset, key: str, chosen: Sequence[int]) -> None:
    """Every episode has a part of a video to itself that is there and long enough."""
    meta, fps, wanted = dataset.meta, float(dataset.meta.fps), set(chosen)
    half = 0.5 / fps
    names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    lacking = [name for name in names if name not in meta.episodes.column_names]
    if lacking:
        raise ValueError(
            f"meta/episodes of {dataset.repo_id} lacks the column {lacking[0]!r}: convert the dataset anew."
        )
    chunk, file, begin, end = (np.asarray(episode_column(meta, name), dtype=np.float64) for name in names)
    lasts = episode_column(meta, "length").to_numpy() / fps
    files: dict[tuple[int, int], list[int]] = {}
    for episode in np.argsort(begin, kind="stable").tolist():
        files.setdefault((int(chunk[episode]), int(file[episode])), []).append(episode)
    for (chunk_index, file_index), episodes in files.items():
        if wanted.isdisjoint(episodes):
            continue
        assert meta.video_path is not None
        name = meta.video_path.format(video_key=key, chunk_index=chunk_index, file_index=file_index)
        path = Path(dataset.root) / name
        seconds = video_seconds(path)
        for episode in episodes:
            first, last = begin[episode], begin[episode] + lasts[episode]
            # NaN is no place either
            fits = first > -half and end[episode] > last - 1.5 / fps and last < seconds + 1.5 / fps
            if episode in wanted and not fits:
                raise ValueError(
                    f"meta/episodes of {dataset.repo_id} places episode {episode} at {first:.4g} to {end[episode]:.4g} s of "
                    f"{path}, which lasts {seconds:.4g} s, and its frames take {lasts[episode]:.4g} s: copy or convert the "
                    "dataset anew."
                )
        for one, other in pairwise(episodes):
            if begin[other] < begin[one] + lasts[one] - half and not wanted.isdisjoint((one, other)):
                raise ValueError(
                    f"meta/episodes of {dataset.repo_id} gives episodes {one} and {other} the same part of {path}, at "
                    f"{begin[other]:.4g} s: one of them would show the other's frames. Convert the dataset anew."
                )


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
