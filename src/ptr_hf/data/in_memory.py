"""A whole LeRobotDataset in memory, for small data sets whose reading would otherwise cost more than the training step.

LeRobot reads a sample frame by frame from Arrow tables and seeks in its videos. Here every column is one tensor, every
video is decoded once, and a batch of segments is a few index operations. The batches equal LeRobot's.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from lerobot.datasets.language import is_language_column
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor
from torch.utils.data import Dataset

from ptr_hf.data.datasets import episode_spans
from ptr_hf.data.normalization import column_of
from ptr_hf.data.pictures import pictures
from ptr_hf.data.segment_dataset import (
    TASK,
    TASK_INDEX,
    SegmentDataset,
    as_unreadable,
    chunk_columns,
    unreadable_frame,
)
from ptr_hf.data.segments import ACTION, CHUNK_PREFIX, OBSERVATION_PREFIX, PAD_SUFFIX, SegmentLayout, sample_of

GIGABYTE = 10**9
DECODED_AT_ONCE = 128 * 10**6
DECODING_ERRORS = (OSError, RuntimeError, ValueError, IndexError, SyntaxError)
UNREADABLE = 10
"""So many frames at the beginning that cannot be read mean that none can."""

logger = logging.getLogger(__name__)


class InMemorySegments(Dataset[dict[str, Any]]):
    """The segments of a LeRobotDataset, read once into memory.

    `__getitems__` returns one collated batch, with the keys, dtypes and values of
    `collate_segments([dataset[i] for i in indices])` for the dataset `open_dataset(source, layout)`; give a DataLoader
    `collate_fn=collate_segments`. Workers gain nothing: leave `num_workers` at 0.

    Args:
        dataset: that `open_dataset` has opened, at whatever layout, with all episodes or some of them.
        layout: the offsets to read.
        max_gigabytes: the most that columns and frames may take, 10^9 bytes each.

    Attributes:
        dataset, meta, layout: as given.

    Raises:
        ValueError: the data set takes more than `max_gigabytes`, or holds what a plain tensor cannot (depth maps, missing
            values).
    """

    def __init__(
        self,
        dataset: SegmentDataset,
        layout: SegmentLayout,
        *,
        max_gigabytes: float = 4.0,
    ) -> None:
        self.dataset, self.meta, self.layout = dataset, dataset.meta, layout
        _check_supported(dataset, max_gigabytes)
        self._columns: dict[str, Tensor] = {}
        self._texts: dict[str, list[str]] = {}
        self._keys = [key for key in dataset.hf_dataset.column_names if not is_language_column(key)]
        self._of_chunks = chunk_columns(self.meta.features, layout)
        for key in self._keys:
            if key in self.meta.image_keys:
                continue
            if self.meta.features[key]["dtype"] == "string":
                self._texts[key] = dataset.hf_dataset.data.column(key).to_pylist()
            else:
                self._columns[key] = _read_column(dataset, key)
        loaded = {key: _decoded(dataset, key) for key in self.meta.camera_keys}
        self._frames = {key: frames for key, (frames, _) in loaded.items()}
        self._unreadable = sorted(dataset.wrong_times.union(*(places for _, places in loaded.values())))
        for place in self._unreadable:
            logger.warning("%s", unreadable_frame(dataset, place))
        runs = dataset.runs
        edges = (runs.start, runs.start + runs.length - 1)
        self._first, self._last = (torch.from_numpy(np.repeat(edge, runs.length)) for edge in edges)
        self._task_names: list[str] = self.meta.tasks.index.tolist()
        # what is read at the layout's offsets
        self._moving = [
            key
            for key in self.meta.features
            if key == ACTION or (key.startswith(OBSERVATION_PREFIX) and layout.observation_offsets is not None)
        ]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, without the batch dimension."""
        return sample_of(self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A collated batch of the segments that start at the given positions, in their order.

        Raises:
            IndexError: a position is outside the data set.
        """
        rows = positions_of(indices, len(self), "data set")
        observed = self._around(rows, self.layout.observation_offsets)
        acted = self._around(rows, self.layout.action_offsets)
        chunks, _ = self._around(rows, list(self.layout.chunk_starts))
        batch: dict[str, Any] = {}
        for key in [*self.meta.video_keys, *self._keys]:
            where = (acted if key == ACTION else observed)[0] if key in self._moving else rows
            if key in self._frames:
                batch[key] = self._pictures(key, where)
            elif key in self._columns:
                batch[key] = _take(self._columns[key], where)
            else:
                batch[key] = [self._texts[key][row] for row in rows.tolist()]
        for key in self._moving:
            batch[key + PAD_SUFFIX] = (acted if key == ACTION else observed)[1]
        if self.dataset.image_transforms is not None:
            self._transform(batch, self.dataset.image_transforms)
        batch[TASK] = [self._task_names[task] for task in batch[TASK_INDEX].tolist()]
        for key in self._of_chunks:
            if key in self._columns:
                batch[CHUNK_PREFIX + key] = _take(self._columns[key], chunks)
            else:
                batch[CHUNK_PREFIX + key] = [
                    tuple(self._texts[key][row] for row in column) for column in chunks.T.tolist()
                ]
        if self._of_chunks:
            numbers = batch[CHUNK_PREFIX + TASK_INDEX].T.tolist()
            batch[CHUNK_PREFIX + TASK] = [tuple(self._task_names[task] for task in column) for column in numbers]
        if self._unreadable:
            self._mark_unreadable(batch, observed[0])
        return batch

    def _mark_unreadable(self, batch: dict[str, Any], observed: Int[Tensor, "batch steps"]) -> None:
        """Samples that show a frame which could not be read are made ones that `Screen` leaves out."""
        bad = torch.isin(observed, torch.tensor(self._unreadable))
        for row in bad.any(dim=1).nonzero()[:, 0].tolist():
            offset = (self.layout.observation_offsets or [0])[int(bad[row].int().argmax())]
            action, pad = as_unreadable(batch[ACTION][row], self.layout.action_offsets, offset)
            batch[ACTION][row], batch[ACTION + PAD_SUFFIX][row] = action, pad

    def _around(
        self, rows: Int[Tensor, " batch"], offsets: list[int] | None
    ) -> tuple[Int[Tensor, "batch steps"], Bool[Tensor, "batch steps"]]:
        """Positions at the offsets, held at the episode's ends, and whether they were."""
        wanted = rows.unsqueeze(1) + torch.tensor(offsets or [0])
        first, last = self._first[rows].unsqueeze(1), self._last[rows].unsqueeze(1)
        return wanted.clamp(first, last), (wanted < first) | (wanted > last)

    def _pictures(self, key: str, where: Int[Tensor, "batch *steps"]) -> Shaped[Tensor, "batch ..."]:
        """Frames as the dataset gives them: uint8 from videos, unless it scales them; float32 in [0, 1] from image files."""
        frames = _take(self._frames[key], where)
        if key in self.meta.image_keys or not self.dataset._return_uint8:
            frames = frames.to(torch.float32).div(255)
        if key in self.meta.image_keys:
            return frames
        if where.ndim > 1 and where.shape[1] == 1:
            # LeRobot drops the time axis of a single video frame, and of no other feature.
            frames = frames.squeeze(1)
        return frames

    def _transform(self, batch: dict[str, Any], transforms: Callable) -> None:
        """The dataset's image transforms, in LeRobot's order: sample by sample, and in a sample camera by camera."""
        cameras = self.meta.camera_keys
        samples = zip(*(batch[key] for key in cameras), strict=True)
        changed = [[transforms(frames) for frames in sample] for sample in samples]
        batch |= {
            key: torch.stack(list(frames)) for key, frames in zip(cameras, zip(*changed, strict=True), strict=True)
        }


def collate_segments(samples: Mapping[str, Any] | Sequence[Any]) -> Any:
    """Collate function of every data set: `InMemorySegments` and mixtures give batches, samples are collated as LeRobot does.

    LeRobot's function leaves its language columns out, which hold lists of unequal length.
    """
    return samples if isinstance(samples, Mapping) else lerobot_collate_fn(list(samples))


def positions_of(indices: Sequence[int], length: int, what: str) -> Int[Tensor, " batch"]:
    """Positions from 0 on, where negative ones count from the end.

    Raises:
        IndexError: there are not so many.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64)
    if ((rows < -length) | (rows >= length)).any():
        raise IndexError(f"The {what} has positions 0 to {length - 1}; the batch asks for {list(indices)}.")
    return torch.where(rows < 0, rows + length, rows)


def _check_supported(dataset: LeRobotDataset, max_gigabytes: float) -> None:
    meta = dataset.meta
    if meta.depth_keys:
        raise ValueError(
            f"{meta.repo_id} holds depth maps ({', '.join(meta.depth_keys)}), which InMemorySegments does not read: use the "
            "LeRobotDataset itself."
        )
    per_frame = 0
    for item in meta.features.values():
        width = 1 if item["dtype"] in ("image", "video") else 4 if item["dtype"].startswith("float") else 8
        per_frame += width * math.prod(item["shape"])
    gigabytes = len(dataset) * per_frame / GIGABYTE
    if gigabytes > max_gigabytes:
        raise ValueError(
            f"{meta.repo_id} takes {gigabytes:.3g} GB in memory ({len(dataset)} frames), more than "
            f"max_gigabytes={max_gigabytes:g}: raise the limit, choose fewer episodes, or read the LeRobotDataset from disk."
        )


def _read_column(dataset: LeRobotDataset, key: str) -> Shaped[Tensor, "frames *shape"]:
    """A column as one tensor, with the dtype and shape that LeRobot gives its rows."""
    sample = dataset.hf_dataset.select_columns([key])[:1][key][0]
    lacking = dataset.hf_dataset.data.column(key).null_count
    if lacking:
        raise ValueError(f"{dataset.repo_id} lacks {lacking} values of {key!r}; InMemorySegments needs all.")
    return torch.from_numpy(column_of(dataset, key)).to(sample.dtype).reshape(-1, *sample.shape)


def _decoded(dataset: LeRobotDataset, key: str) -> tuple[UInt8[Tensor, "frames channels height width"], list[int]]:
    """All frames of a camera, a window after the other, and the places of those that cannot be read."""
    logger.info("Decoding %d frames of %s once, into memory.", len(dataset), key)
    shape = dataset_to_policy_features({key: dataset.meta.features[key]})[key].shape
    if shape[0] != 3:
        raise ValueError(
            f"{key} of {dataset.repo_id} holds pictures of {shape[0]} channels, and InMemorySegments reads 3: use the "
            "LeRobotDataset itself."
        )
    frames = np.zeros((len(dataset), *shape), dtype=np.uint8)
    window = max(1, min(256, DECODED_AT_ONCE // math.prod(shape)))
    unreadable: list[int] = []
    for episode, start, length in episode_spans(dataset):
        for first in range(start, start + length, window):
            rows = range(first, min(first + window, start + length))
            try:
                frames[rows.start : rows.stop] = pictures(dataset, key, episode, rows)
            except DECODING_ERRORS:
                for row in rows:
                    try:
                        frames[row] = pictures(dataset, key, episode, [row])[0]
                    except DECODING_ERRORS as error:
                        if len(unreadable) == row >= UNREADABLE:
                            raise ValueError(
                                f"The pictures {key} of {dataset.repo_id} cannot be read: {error}"
                            ) from error
                        unreadable.append(row)
    return torch.from_numpy(frames), unreadable


def _take(values: Shaped[Tensor, "frames *shape"], where: Int[Tensor, "*steps"]) -> Shaped[Tensor, "..."]:
    return values.index_select(0, where.flatten()).reshape(*where.shape, *values.shape[1:])
