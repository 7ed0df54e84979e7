"""What an inspection reads of a dataset: states, actions, instructions and episodes, from parquet; no video is decoded here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from lerobot.datasets import StreamingLeRobotDataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig
from ptr_hf.data.segments import ACTION, OBSERVATION_PREFIX, SegmentLayout
from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.seen import ImageFeatures

TASK_GROUP = "task"
BLOCK = 1 << 16
"""About so many frames, of whole episodes, are looked at together."""

type OfFrames = np.ndarray | Callable[[slice], np.ndarray]
"""(frames, ...) values, or what gives those of a slice of the frames."""


@dataclass(frozen=True)
class Recordings:
    """The columns of a dataset that are not pictures, in dataset order. Those of frames are `on_disk`, where they were read.

    Attributes:
        name: of the dataset.
        revision: of its Hub repo, where it has one.
        state: (frames, S) float32, all float vectors of the observation side by side; NaN and Inf are 0.
        action: (frames, A) float32, likewise.
        finite: (frames,) bool, whether state and action held numbers alone.
        index, frame, episode: (frames,) the frame's number in the dataset, in its episode, and its episode's row below.
        timestamp: (frames,) seconds.
        episode_index: (episodes,) as the dataset numbers them.
        length: (episodes,) frames.
        task: (episodes,) the row of its instruction in `instructions`.
        instructions: texts.
        state_names, action_names: of the dimensions.
        attributes: columns of meta/episodes with one value an episode, by name.
        fps: frames per second.
        images: what was seen in some frames; None where nobody looked.
    """

    name: str
    revision: str | None
    state: np.ndarray
    action: np.ndarray
    finite: np.ndarray
    index: np.ndarray
    frame: np.ndarray
    episode: np.ndarray
    timestamp: np.ndarray
    episode_index: np.ndarray
    length: np.ndarray
    task: np.ndarray
    instructions: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    attributes: Mapping[str, np.ndarray]
    fps: float
    images: ImageFeatures | None = None

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def first(self) -> np.ndarray:
        """(episodes,) the row of each episode's first frame."""
        return np.cumsum(self.length) - self.length

    @cached_property
    def last(self) -> np.ndarray:
        """(episodes,) the row of each episode's last frame."""
        return np.cumsum(self.length) - 1

    @cached_property
    def blocks(self) -> list[tuple[slice, slice]]:
        """See `episode_blocks`."""
        return episode_blocks(self.length)

    def over(self, values: OfFrames, reduce: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """What becomes of each episode's frames, (episodes, ...); only a block of frames is in memory at a time.

        Args:
            values: of the frames.
            reduce: is given those of some whole episodes, and the place at which each of these begins among them.
        """
        read = values if callable(values) else values.__getitem__
        return np.concatenate([reduce(read(span), self.first[own] - span.start) for own, span in self.blocks])

    def means(self, values: OfFrames) -> np.ndarray:
        """Mean over each episode's frames of values (frames, K); NaN are left out, and an episode of NaN alone gives NaN."""
        return self.over(values, _means)

    def means_at(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The same of values (n, K) that some frames alone have: those of the rows (n,), which rise."""
        own, begins = np.unique(self.episode[rows], return_index=True)
        found = np.full((len(self.length), values.shape[1]), np.nan)
        found[own] = _means(values, begins)
        return found

    def deviation(self, values: OfFrames) -> np.ndarray:
        """(K,) standard deviation over the frames of values (frames, K); NaN are left out."""
        read = values if callable(values) else values.__getitem__

        def mean(of: Callable[[slice], np.ndarray]) -> np.ndarray:
            total, count = np.zeros(1), np.zeros(1, np.int64)
            for _, span in self.blocks:
                own = of(span).astype(np.float64)
                known = np.isfinite(own)
                total, count = total + np.where(known, own, 0).sum(axis=0), count + known.sum(axis=0)
            return total / np.maximum(count, 1)

        center = mean(read)
        return np.sqrt(mean(lambda span: (read(span) - center) ** 2))

    def group(self, name: str) -> np.ndarray:
        """(episodes,) the number of each episode's group.

        Args:
            name: "task", a column of meta/episodes, or "none" for one group of all.

        Raises:
            ValueError: there is no such column.
        """
        if name == TASK_GROUP:
            return self.task
        if name == "none":
            return np.zeros_like(self.task)
        if name not in self.attributes:
            known = ", ".join([TASK_GROUP, "none", *self.attributes])
            raise ValueError(f"{self.name} has no episode column {name!r} to compare episodes within; it has {known}.")
        return np.unique(self.attributes[name], return_inverse=True)[1]


def sources_of(given: Any) -> tuple[list[Any], bool]:
    """The datasets that an argument stands for, each of which is inspected by itself.

    Args:
        given: a Hub id, a folder, an open LeRobotDataset; a list of these; or a mixture, as `PTRTrainer` takes it.

    Returns:
        the datasets, and whether `given` may hold several.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        return list(given), True
    mixture = MixtureConfig.of(given)
    return ([given], False) if mixture is None else (list(mixture.sources), True)


def single(
    source: Any, episodes: Sequence[int] | None = None, revision: str | None = None
) -> tuple[Any, Sequence[int] | None, str | None]:
    """A dataset, the subset of its episodes and its revision: those of the arguments, or of a mixture's source its own.

    LeRobot's stream stands for the dataset that it streams: of that, all parquet files are read.
    """
    if isinstance(source, SourceConfig):
        source, episodes, revision = source.dataset, source.episodes, source.revision
    if isinstance(source, StreamingLeRobotDataset):
        episodes = source.episodes if episodes is None else episodes
        if source.streaming_from_local:
            return source.root, episodes, None
        return source.repo_id, episodes, revision or source.revision
    return source, episodes, revision


def read_recordings(
    source: str | Any, *, episodes: Sequence[int] | None = None, revision: str | None = None
) -> Recordings:
    """Read a dataset's states, actions and episodes. Videos are neither decoded nor downloaded.

    Args:
        source: Hub id, local folder, an open LeRobotDataset, or a mixture's source, which has episodes and revision of its own.
        episodes: a subset; None takes all.
        revision: of the Hub repo.

    Raises:
        ValueError: the dataset has no actions, or cannot be read; the sentence names it.
    """
    source, episodes, revision = single(source, episodes, revision)
    alone = SegmentLayout(None, (0,), 1, 1, 1)
    dataset = open_dataset(source, alone, episodes=episodes, revision=revision, download_videos=False)
    features = dataset.meta.features
    if ACTION not in features:
        raise ValueError(
            f"The dataset {dataset.repo_id} has no 'action': demonstrations without actions cannot be inspected or learned from."
        )
    keys = [
        key
        for key, feature in features.items()
        if key.startswith(OBSERVATION_PREFIX) and feature["dtype"].startswith("float") and len(feature["shape"]) <= 1
    ]
    keys.sort(key=lambda key: (key != OBS_STATE, key))
    runs = dataset.runs
    state_names = tuple(name for key in keys for name in _names(key, features[key]))
    action_names = tuple(_names(ACTION, features[ACTION]))
    frames, tasks = len(dataset.hf_dataset), [np.empty(0, np.int64)]
    state, action = (on_disk((frames, len(names)), np.float32) for names in (state_names, action_names))
    finite, timestamp = on_disk((frames,), np.bool_), on_disk((frames,), np.float32)
    index, frame, episode = (on_disk((frames,), np.int64) for _ in range(3))
    for own, span in episode_blocks(runs.length):
        table = dataset.hf_dataset.data.slice(span.start, span.stop - span.start)
        vectors = [np.empty((len(table), 0), np.float32), *(_vectors(table, key) for key in keys)]
        states, actions = np.concatenate(vectors, axis=1), _vectors(table, ACTION)
        finite[span] = np.isfinite(states).all(axis=1) & np.isfinite(actions).all(axis=1)
        state[span] = np.nan_to_num(states, nan=0, posinf=0, neginf=0)
        action[span] = np.nan_to_num(actions, nan=0, posinf=0, neginf=0)
        for values, name in ((index, "index"), (frame, "frame_index"), (timestamp, "timestamp")):
            values[span] = table.column(name).to_numpy()
        episode[span] = np.repeat(np.arange(own.start, own.stop), runs.length[own])
        tasks.append(_most_frequent(table.column("task_index").to_numpy(), runs.start[own] - span.start))
    return Recordings(
        name=dataset.repo_id,
        revision=dataset.revision,
        state=state,
        action=action,
        finite=finite,
        index=index,
        frame=frame,
        episode=episode,
        timestamp=timestamp,
        episode_index=runs.episode,
        length=runs.length,
        task=np.concatenate(tasks),
        instructions=tuple(dataset.meta.tasks.index),
        state_names=state_names,
        action_names=action_names,
        attributes=_attributes(dataset, runs.episode),
        fps=float(dataset.meta.fps),
    )


def episode_blocks(length: np.ndarray) -> list[tuple[slice, slice]]:
    """Whole episodes and their frames, about `BLOCK` of these at a time.

    Args:
        length: (episodes,) frames.
    """
    last = np.cumsum(length)
    starts = np.flatnonzero(np.diff((last - length) // BLOCK, prepend=-1))
    stops = np.append(starts[1:], len(length))
    return [
        (slice(start, stop), slice(last[start] - length[start], last[stop - 1]))
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def _means(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Means of the rows from each beginning to the next; NaN are left out."""
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0), begins, axis=0, dtype=np.float64)
    count = np.add.reduceat(known, begins, axis=0, dtype=np.int64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _vectors(table: Any, key: str) -> np.ndarray:
    """A column of numbers or vectors as (frames, dimensions) float32."""
    column = table.column(key).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    rows = len(column)
    while (
        pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) or pa.types.is_large_list(column.type)
    ):
        column = column.flatten()
    if rows and len(column) % rows:
        raise ValueError(f"The vectors of {key!r} are not all of one length: convert the dataset anew.")
    return column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, -1)


def _most_frequent(task: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(episodes,) the instruction that most of an episode's frames have, which begins at a place in `task`."""
    found, last = task[first].astype(np.int64), np.append(first[1:], len(task))
    for episode in np.flatnonzero(np.minimum.reduceat(task, first) != np.maximum.reduceat(task, first)):
        found[episode] = np.bincount(task[first[episode] : last[episode]]).argmax()
    return found


def _names(key: str, feature: Mapping[str, Any]) -> list[str]:
    """A readable name for every dimension of a feature."""
    size = int(np.prod(feature["shape"]))
    names = feature.get("names")
    if isinstance(names, Mapping):
        names = [name for part in names.values() for name in (part if isinstance(part, list | tuple) else [part])]
    if isinstance(names, list | tuple) and len(names) == size and size > 1:
        return [str(name) for name in names]
    stem = key.removeprefix(OBSERVATION_PREFIX)
    return [stem] if size == 1 else [f"{stem}[{number}]" for number in range(size)]


def _attributes(dataset: LeRobotDataset, episode_index: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of meta/episodes that a user has added: one text or number an episode."""
    own = [name for name in dataset.meta.episodes.column_names if "/" not in name and name not in _BOOKKEEPING]
    found = {name: np.asarray(episode_column(dataset.meta, name).to_pylist())[episode_index] for name in own}
    return {name: values for name, values in found.items() if values.ndim == 1 and values.dtype.kind in "iufbUO"}


_BOOKKEEPING = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
