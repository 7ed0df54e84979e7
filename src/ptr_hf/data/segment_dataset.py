"""A LeRobotDataset that reads segments: every chunk with the instruction, and whatever else, of its own first frame."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.language import is_language_column
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from ptr_hf.data.readable import ReadableDataset
from ptr_hf.data.segments import ACTION, CHUNK_PREFIX, OBSERVATION_PREFIX, SegmentLayout

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
        frame_stride: recorded frames to one step of the layout.
        settings: of a LeRobotDataset, `delta_timestamps` among them.
    """

    def __init__(self, repo_id: str, *, layout: SegmentLayout, frame_stride: int = 1, **settings: Any) -> None:
        super().__init__(repo_id, **settings)
        self.layout = layout
        self._steps = [start * frame_stride for start in layout.chunk_starts]
        self._first, self._last = episode_bounds(self)
        self._columns = self.hf_dataset.select_columns(chunk_columns(self.meta.features, layout))

    def __getitem__(self, idx: int | slice) -> Any:
        """LeRobot's item, or a list of them, with the columns of every chunk."""
        item = super().__getitem__(idx)
        if isinstance(idx, slice) or not self._columns.column_names:
            return item
        place = int(idx) % len(self)
        rows = [min(place + step, int(self._last[place])) for step in self._steps]
        for key, values in self._columns[rows].items():
            item[CHUNK_PREFIX + key] = torch.stack(values) if isinstance(values[0], Tensor) else values
        tasks = item[CHUNK_PREFIX + TASK_INDEX].tolist()
        item[CHUNK_PREFIX + TASK] = [self.meta.tasks.iloc[task].name for task in tasks]
        return item

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
