"""Whether a dataset's timestamps fit its rate and its videos: LeRobot looks a video's frames up by them alone."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import get_video_duration_in_s

RATE_TOLERANCE = 0.1
"""The frames' mean rate may differ by so much of the rate in info.json."""
FEW = 0.02
"""Share of frames that may have a wrong time, and are left out; where there are more, the dataset is refused."""


def check_rate(dataset: LeRobotDataset) -> str | None:
    """A sentence where the frames are recorded at another rate than meta/info.json says.

    Args:
        dataset: open; its episodes' frames lie together and in order.
    """
    table, fps = dataset.hf_dataset.data, float(dataset.meta.fps)
    episode, time = table.column("episode_index").to_numpy(), table.column("timestamp").to_numpy()
    steps = np.diff(time.astype(np.float64))[np.diff(episode) == 0]
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
    table, fps = dataset.hf_dataset.data, float(meta.fps)
    if not meta.video_keys:
        return np.empty(0, dtype=np.int64)
    episode = table.column("episode_index").to_numpy()
    frame = table.column("frame_index").to_numpy()
    time = table.column("timestamp").to_numpy().astype(np.float64)
    for key in meta.video_keys:
        _check_spans(dataset, key, np.unique(episode).tolist())
    # a recording with times of its own is looked up by them
    regular = np.abs(time - frame / fps) <= 0.5 / fps
    if regular.mean() < 0.5:
        return np.flatnonzero(~np.isfinite(time))
    wrong = np.flatnonzero(~regular)
    if len(wrong) > max(1, FEW * len(time)):
        raise ValueError(
            f"{len(wrong)} of the {len(time)} timestamps of {dataset.repo_id} are not those of their frames at fps={fps:g}, and "
            f"its videos are looked up by them (first in episode {episode[wrong[0]]}: frame {frame[wrong[0]]} at "
            f"{time[wrong[0]]:.4g} s): convert the dataset anew."
        )
    return wrong


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
    chunk, file, begin, end = (np.asarray(meta.episodes[name], dtype=np.float64) for name in names)
    lasts = np.asarray(meta.episodes["length"]) / fps
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
