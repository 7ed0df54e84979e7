"""Writes many LeRobotDatasets that differ only in their labels, some forty times faster than frame by frame.

The result is what LeRobot's own writer gives: same files, same columns, statistics from LeRobot's own functions. Videos are
not encoded again: an episode refers to the beginning of an episode's video in another dataset, whose files are linked.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import write_info, write_stats, write_table_one_row_group_per_episode
from lerobot.datasets.utils import DEFAULT_EPISODES_PATH, EPISODES_DIR, VIDEO_DIR
from lerobot.utils.utils import flatten_dict

from episodes import Episode, stream_feature

Stats = dict[str, np.ndarray]
_stats: dict[bytes, Stats] = {}  # most streams come back unchanged in the next dataset


@dataclass(frozen=True)
class VideoSource:
    """Where the images are: ``episodes[i]`` is the episode of the dataset ``folder`` whose beginning episode i shows."""

    folder: Path
    episodes: Sequence[int]


def write_frames(
    path: Path,
    episodes: Iterable[Episode],
    fps: int,
    names: Mapping[str, Sequence[str]] | None = None,
    robot_type: str | None = None,
    videos: VideoSource | None = None,
    overwrite: bool = False,
) -> int:
    """Writes episodes without images as a LeRobotDataset in the folder ``path``, all frames in one file.

    Args:
        path: the dataset's folder; its name is the dataset's.
        episodes: all with the same features.
        fps: control steps per second; every step is a frame.
        names: feature -> names of its channels.
        robot_type: stored in the metadata.
        videos: adds the videos of another dataset.
        overwrite: replaces an existing folder.

    Returns:
        The number of episodes written.

    Raises:
        FileExistsError: if the folder exists and ``overwrite`` is False.
        ValueError: if there are no episodes, an episode has images, or the videos are too few or too short.
    """
    written = list(episodes)
    if not written:
        raise ValueError("There are no episodes to write.")
    frames = {key: stream_feature(value, (names or {}).get(key)) for key, value in written[0].frames.items()}
    if any(feature["dtype"] == "video" for feature in frames.values()):
        raise ValueError(f"Episodes with images go through write_demonstrations; got {sorted(frames)}.")
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; allow overwriting it or choose another folder.")
        shutil.rmtree(path)
    source = None if videos is None else _Videos(videos, [episode.length for episode in written])
    meta = LeRobotDatasetMetadata.create(
        path.name, fps, frames | (source.features if source else {}), robot_type, root=path
    )
    tasks = list(dict.fromkeys(episode.task for episode in written))
    columns: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    stats: list[dict[str, Stats]] = []
    start = 0
    for index, episode in enumerate(written):
        steps = np.arange(episode.length)
        streams = {
            **episode.frames,
            "timestamp": steps / fps,
            "frame_index": steps,
            "episode_index": np.full(episode.length, index),
            "index": start + steps,
            "task_index": np.full(episode.length, tasks.index(episode.task)),
        }
        for key, value in streams.items():
            columns.setdefault(key, []).append(value)
        row = {
            "episode_index": index,
            "tasks": [episode.task],
            "length": episode.length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": start,
            "dataset_to_index": start + episode.length,
        }
        stats.append({key: _stream_stats(key, value, meta.features[key]) for key, value in streams.items()})
        if source is not None:
            stats[-1] |= source.stats[index]
            row |= source.spans[index]
        row |= flatten_dict({"stats": stats[-1]})
        rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        start += episode.length

    _write_data(meta, {key: np.concatenate(values) for key, values in columns.items()})
    meta.save_episode_tasks(tasks)
    plain = {key: [_plain(row[key]) for row in rows] for key in rows[0]}
    file = path / DEFAULT_EPISODES_PATH.format(chunk_index=0, file_index=0)
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pydict(plain), file, compression="snappy")
    if source is not None:
        source.link(path)
    write_stats(aggregate_stats(stats), path)
    meta.info.total_episodes, meta.info.total_frames, meta.info.total_tasks = len(written), start, len(tasks)
    meta.info.splits = {"train": f"0:{len(written)}"}
    write_info(meta.info, path)
    return len(written)


def write_many_frames(path: Path, episodes: int, frames: int, width: int = 6, tasks: int = 7, fps: int = 10) -> None:
    """Writes a LeRobotDataset of random motions without images, a million episodes in a minute; for measurements.

    Unlike LeRobot's, its row groups hold many episodes, and its episodes have no statistics.

    Args:
        path: the dataset's folder, which does not exist.
        episodes, frames: how many, and of how many frames each.
        width: of the states and actions.
        tasks: instructions, which take turns.
        fps: control steps per second.
    """
    vectors = {key: {"dtype": "float32", "shape": (width,), "names": None} for key in ("observation.state", "action")}
    meta = LeRobotDatasetMetadata.create(path.name, fps, vectors, root=path, use_videos=False)
    names = [f"task {number}" for number in range(tasks)]
    meta.save_episode_tasks(names)
    for file, first in enumerate(range(0, episodes, EPISODES_A_FILE)):
        own = np.arange(first, min(first + EPISODES_A_FILE, episodes))
        task, count, draws = own % tasks, len(own), np.random.default_rng([0, file])
        course = np.sin(6 * np.arange(frames)[:, None] / frames + task[:, None, None] + np.arange(width))
        action = course + draws.normal(0, 0.1, (count, frames, width))
        columns = {
            "observation.state": (action.cumsum(axis=1) / fps).reshape(-1, width),
            "action": action.reshape(-1, width),
            "timestamp": np.tile(np.arange(frames) / fps, count),
            "frame_index": np.tile(np.arange(frames), count),
            "episode_index": own.repeat(frames),
            "index": np.arange(first * frames, (first + count) * frames),
            "task_index": task.repeat(frames),
        }
        target = meta.root / meta.data_path.format(chunk_index=0, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(meta, columns), target, row_group_size=ROW_GROUP)
        rows = {
            "episode_index": own,
            "tasks": [[names[number]] for number in task],
            "length": np.full(count, frames),
            "data/chunk_index": np.zeros(count, np.int64),
            "data/file_index": np.full(count, file),
            "dataset_from_index": own * frames,
            "dataset_to_index": (own + 1) * frames,
            "meta/episodes/chunk_index": np.zeros(count, np.int64),
            "meta/episodes/file_index": np.full(count, file),
        }
        target = path / DEFAULT_EPISODES_PATH.format(chunk_index=0, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), target)
    write_stats({key: {"mean": np.zeros(width), "std": np.ones(width)} for key in vectors}, path)
    meta.info.total_episodes, meta.info.total_frames, meta.info.total_tasks = episodes, episodes * frames, tasks
    meta.info.splits = {"train": f"0:{episodes}"}
    write_info(meta.info, path)


EPISODES_A_FILE, ROW_GROUP = 50_000, 250_000


def _write_data(meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray]) -> None:
    file = meta.root / meta.data_path.format(chunk_index=0, file_index=0)
    file.parent.mkdir(parents=True)
    write_table_one_row_group_per_episode(_table(meta, columns), file)


def _table(meta: LeRobotDatasetMetadata, columns: dict[str, np.ndarray]) -> pa.Table:
    features = get_hf_features_from_features(meta.features)
    arrays = []
    for key in features:
        values = columns[key].astype(meta.features[key]["dtype"])
        flat = pa.array(values.ravel())
        arrays.append(flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    return pa.Table.from_arrays(arrays, names=list(features)).cast(datasets.Features(features).arrow_schema)


def _stream_stats(key: str, values: np.ndarray, feature: dict[str, Any]) -> Stats:
    digest = blake2b(values.tobytes(), digest_size=16, key=str((values.shape, values.dtype)).encode()[:64]).digest()
    if digest not in _stats:
        _stats[digest] = compute_episode_stats({key: values}, {key: feature})[key]
    return _stats[digest]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


class _Videos:
    """The columns, statistics and files that refer to another dataset's videos."""

    def __init__(self, source: VideoSource, lengths: Sequence[int]) -> None:
        if len(source.episodes) != len(lengths):
            raise ValueError(f"There are {len(lengths)} episodes but videos for {len(source.episodes)}.")
        self.folder = source.folder
        meta = LeRobotDatasetMetadata(source.folder.name, root=source.folder)
        self.features = {key: meta.features[key] for key in meta.video_keys}
        rows = pq.read_table(source.folder / EPISODES_DIR).to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        self.spans: list[dict[str, Any]] = []
        self.stats: list[dict[str, Stats]] = []
        for episode, length in zip(source.episodes, lengths, strict=True):
            row = rows[episode]
            if length > row["length"]:
                raise ValueError(f"Episode {episode} of {source.folder.name} has {row['length']} frames, not {length}.")
            span: dict[str, Any] = {}
            for key in self.features:
                span |= {name: row[name] for name in row if name.startswith(f"videos/{key}/")}
                if length < row["length"]:
                    span[f"videos/{key}/to_timestamp"] = span[f"videos/{key}/from_timestamp"] + length / meta.fps
            self.spans.append(span)
            self.stats.append({key: _image_stats(row, key) for key in self.features})

    def link(self, path: Path) -> None:
        """Links the video files into another dataset, or copies them where that is not possible."""
        for file in sorted((self.folder / VIDEO_DIR).rglob("*.mp4")):
            target = path / file.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copy2(file, target)


def _image_stats(row: Mapping[str, Any], key: str) -> Stats:
    prefix = f"stats/{key}/"
    return {name.removeprefix(prefix): np.array(row[name]) for name in row if name.startswith(prefix)}
