"""A LeRobotDataset that reads segments: every chunk with the instruction, and whatever else, of its own first frame."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.language import is_language_column
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from ptr_hf.data.feature_store import FeatureStore
from ptr_hf.data.readable import ReadableDataset, as_unreadable
from ptr_hf.data.segments import ACTION, CHUNK_PREFIX, OBSERVATION_PREFIX, PAD_SUFFIX, SegmentLayout

TASK = "task"
TASK_INDEX = "task_index"


class SegmentDataset(ReadableDataset):
    """LeRobot's items at a segment layout, and the per-frame columns of every chunk.

    LeRobot gives all columns but observations and actions of the anchor frame alone. Where a segment has several chunks, an
    item has those of each chunk too, under `CHUNK_PREFIX`: `chunk.task_index` (T,), `chunk.task` (T texts), and every other
    column that `chunk_columns` lists. Past the episode's end they are those of its last frame.

    Args:
        repo_id: as of a LeRobotDataset.
        layout: the offsets to read.
        settings: of a LeRobotDataset, `delta_timestamps` among them.
    """

    def __init__(self, repo_id: str, *, layout: SegmentLayout, **settings: Any) -> None:
        super().__init__(repo_id, **settings)
        self.layout = layout
        self._features: FeatureStore | None = None
        self._first, self._last = episode_bounds(self)
        self._columns = self.hf_dataset.select_columns(chunk_columns(self.meta.features, layout))

    def __getitem__(self, idx: int | slice) -> Any:
        """LeRobot's item, or a list of them, with the columns of every chunk."""
        item = super().__getitem__(idx)
        if isinstance(idx, slice):
            return item
        place = int(idx) % len(self)
        if self._features is not None:
            item = self._with_features(item, place, self._features)
        if not self._columns.column_names:
            return item
        rows = [min(place + step, int(self._last[place])) for step in self.layout.chunk_starts]
        for key, values in self._columns[rows].items():
            item[CHUNK_PREFIX + key] = torch.stack(values) if isinstance(values[0], Tensor) else values
        tasks = item[CHUNK_PREFIX + TASK_INDEX].tolist()
        item[CHUNK_PREFIX + TASK] = [self.meta.tasks.iloc[task].name for task in tasks]
        return item

    def use_features(self, store: FeatureStore) -> None:
        """Read what is stored of every frame in the place of pictures: nothing is decoded any more.

        Args:
            store: one row a frame of this dataset, in its order; NaN where the frame could not be read.
        """
        self._features = store
        meta = copy.copy(self.meta)
        kept = {key: feature for key, feature in meta.features.items() if key not in meta.camera_keys}
        self.drop(meta.camera_keys)
        meta.info = dataclasses.replace(meta.info, features=kept)
        self.reader._meta = meta
        if self.reader.delta_indices is not None:
            self.reader.delta_indices = {key: steps for key, steps in self.reader.delta_indices.items() if key in kept}

    def _with_features(self, item: dict[str, Any], place: int, store: FeatureStore) -> dict[str, Any]:
        offsets = self.layout.observation_offsets
        first, last = int(self._first[place]), int(self._last[place])
        rows = [min(max(place + step, first), last) for step in offsets or [0]]
        found = store.read(rows)
        if any(not value.isfinite().all() for value in found.values()):
            found = {key: value.nan_to_num(0.0, 0.0, 0.0) for key, value in found.items()}
            item[ACTION], item[ACTION + PAD_SUFFIX] = as_unreadable(item[ACTION], self.reader.delta_indices[ACTION], 0)
        if offsets is None:
            return item | {key: value[0] for key, value in found.items()}
        beyond = torch.tensor([not first <= place + step <= last for step in offsets])
        return item | found | {key + PAD_SUFFIX: beyond for key in found}

    def drop(self, keys: Collection[str]) -> None:
        """Read these columns no more."""
        here = [key for key in keys if key in self.hf_dataset.column_names]
        if here:
            self.reader.hf_dataset = self.hf_dataset.remove_columns(here)

    def use_metadata(self, meta: LeRobotDatasetMetadata) -> None:
        """Read by this metadata: that of a dataset which the user has open, and may have changed."""
        self.meta = self.reader._meta = meta

    def set_image_transforms(self, image_transforms: Callable | None) -> None:
        """As LeRobot's; transforms get floats in [0, 1], and without any the frames stay 8-bit."""
        super().set_image_transforms(image_transforms)
        self._return_uint8 = self.reader._return_uint8 = image_transforms is None


def chunk_columns(features: Mapping[str, Mapping[str, Any]], layout: SegmentLayout) -> list[str]:
    """The per-frame columns that belong to each chunk of a segment; none where a segment is one chunk.

    Observations and actions are read at their own offsets, `index` is counted on from the anchor, an episode has one
    `episode_index`, and LeRobot's language columns end at its collate function.
    """
    if layout.segment_length == 1:
        return []
    known = (ACTION, "index", "episode_index")
    return [
        key
        for key, feature in features.items()
        if key not in known
        and not key.startswith(OBSERVATION_PREFIX)
        and not is_language_column(key)
        and feature["dtype"] not in ("image", "video")
    ]


def episode_bounds(dataset: LeRobotDataset) -> tuple[Int[np.ndarray, " frames"], Int[np.ndarray, " frames"]]:
    """Position of the first and of the last frame of each frame's episode."""
    episode = dataset.hf_dataset.data.column("episode_index").to_numpy()
    starts = np.flatnonzero(np.diff(episode, prepend=episode[:1] - 1))
    lengths = np.diff(starts, append=len(episode))
    return np.repeat(starts, lengths), np.repeat(starts + lengths - 1, lengths)
