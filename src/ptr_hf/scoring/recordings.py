"""What an inspection reads of a dataset: states, actions, instructions and episodes, from parquet; no video is decoded here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig
from ptr_hf.data.segments import ACTION, OBSERVATION_PREFIX, SegmentLayout
from ptr_hf.scoring.seen import ImageFeatures

TASK_GROUP = "task"


@dataclass(frozen=True)
class Recordings:
    """The columns of a dataset that are small enough to hold, in dataset order.

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

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean over each episode's frames of values (frames, K); NaN are left out, and an episode of NaN alone gives NaN."""
        known = np.isfinite(values)
        total = np.add.reduceat(np.where(known, values, 0), self.first, axis=0, dtype=np.float64)
        count = np.add.reduceat(known, self.first, axis=0, dtype=np.int64)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

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
    """A dataset, the subset of its episodes and its revision: those of the arguments, or of a mixture's source its own."""
    if isinstance(source, SourceConfig):
        return source.dataset, source.episodes, source.revision
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
    table = dataset.hf_dataset.data
    episode = table.column("episode_index").to_numpy()
    vectors = [_vectors(table, key) for key in keys]
    state = np.concatenate(vectors, axis=1) if vectors else np.zeros((len(episode), 0), np.float32)
    action = _vectors(table, ACTION)
    finite = np.isfinite(state).all(axis=1) & np.isfinite(action).all(axis=1)
    episode_index, first, row, length = np.unique(episode, return_index=True, return_inverse=True, return_counts=True)
    task_index = table.column("task_index").to_numpy()
    return Recordings(
        name=dataset.repo_id,
        revision=dataset.revision,
        state=np.nan_to_num(state, nan=0, posinf=0, neginf=0),
        action=np.nan_to_num(action, nan=0, posinf=0, neginf=0),
        finite=finite,
        index=table.column("index").to_numpy(),
        frame=table.column("frame_index").to_numpy(),
        episode=row,
        timestamp=table.column("timestamp").to_numpy(),
        episode_index=episode_index,
        length=length,
        task=_most_frequent(task_index, row, first, len(length)),
        instructions=tuple(dataset.meta.tasks.index),
        state_names=tuple(name for key in keys for name in _names(key, features[key])),
        action_names=tuple(_names(ACTION, features[ACTION])),
        attributes=_attributes(dataset, episode_index),
        fps=float(dataset.meta.fps),
    )


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


def _most_frequent(task: np.ndarray, row: np.ndarray, first: np.ndarray, episodes: int) -> np.ndarray:
    """(episodes,) the instruction that most of an episode's frames have."""
    own = task[first]
    if np.array_equal(task, own[row]):
        return own
    return np.asarray([np.bincount(task[row == episode]).argmax() for episode in range(episodes)])


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
