"""A whole LeRobotDataset in memory, for small data sets whose reading would otherwise cost more than the training step.

LeRobot reads a sample frame by frame from Arrow tables and seeks in its videos. Here every column is one tensor, every
video is decoded once, and a batch of segments is a few index operations. The batches equal LeRobot's.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.utils import WeakFileLock
from jaxtyping import Bool, Int, Shaped, UInt8
from lerobot.datasets.language import is_language_column
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor
from torch.utils.data import Dataset

from ptr_hf.data.bookkeeping import mend_dataset
from ptr_hf.data.datasets import episode_spans
from ptr_hf.data.readable import ReadableDataset, as_unreadable, unreadable_frame
from ptr_hf.data.segment_dataset import TASK, TASK_INDEX, chunk_columns
from ptr_hf.data.segments import ACTION, CHUNK_PREFIX, OBSERVATION_PREFIX, PAD_SUFFIX, SegmentLayout, sample_of

GIGABYTE = 10**9
DECODED_AT_ONCE = 128 * 10**6
UNREADABLE = 10
"""So many frames at the beginning that cannot be read mean that none can."""

logger = logging.getLogger(__name__)


class InMemorySegments(Dataset[dict[str, Any]]):
    """The segments of a LeRobotDataset, read once into memory.

    `__getitems__` returns one collated batch, with the keys, dtypes and values of
    `collate_segments([dataset[i] for i in indices])` for the dataset `open_dataset(source, layout)`; give a DataLoader
    `collate_fn=collate_segments`. Workers gain nothing: leave `num_workers` at 0.

    Args:
        dataset: an open LeRobotDataset, with all episodes or some of them; its own `delta_timestamps` do not matter.
        layout: the offsets to read.
        frames_cache: a folder that keeps the decoded frames as memory-mapped arrays, one file a camera, for later runs and
            other processes; files of another data set, or of one that has changed, are left alone. None decodes anew.
        max_gigabytes: the most that columns and frames may take, 10^9 bytes each.
        frame_stride: recorded frames to one step of the layout.

    Attributes:
        dataset, meta, layout: as given.

    Raises:
        ValueError: the data set takes more than `max_gigabytes`, or holds what a plain tensor cannot (depth maps, missing
            values).
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        layout: SegmentLayout,
        *,
        frames_cache: str | Path | None = None,
        max_gigabytes: float = 4.0,
        frame_stride: int = 1,
    ) -> None:
        self.dataset, self.meta, self.layout = dataset, dataset.meta, layout
        self._frame_stride = frame_stride
        _check_supported(dataset, max_gigabytes)
        for sentence in mend_dataset(dataset):
            logger.warning("%s", sentence)
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
        loaded = {key: _load_frames(dataset, key, frames_cache) for key in self.meta.camera_keys}
        self._frames = {key: frames for key, (frames, _) in loaded.items()}
        wrong_times = dataset.wrong_times if isinstance(dataset, ReadableDataset) else frozenset()
        self._unreadable = sorted(wrong_times.union(*(places for _, places in loaded.values())))
        for place in self._unreadable:
            logger.warning("%s", unreadable_frame(dataset, place))
        self._first, self._last = _episode_bounds(dataset)
        self._task_names: list[str] = self.meta.tasks.index.tolist()
        self._offsets: dict[str, Tensor] = {}
        for key in self.meta.features:
            if key == ACTION:
                self._offsets[key] = torch.tensor(layout.action_offsets)
            elif key.startswith(OBSERVATION_PREFIX) and layout.observation_offsets is not None:
                self._offsets[key] = torch.tensor(layout.observation_offsets)

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
        rows = torch.tensor(indices, dtype=torch.int64)
        if ((rows < -len(self)) | (rows >= len(self))).any():
            raise IndexError(f"The data set has positions 0 to {len(self) - 1}; the batch asks for {list(indices)}.")
        rows = torch.where(rows < 0, rows + len(self), rows)
        observed = self._around(rows, self.layout.observation_offsets)
        acted = self._around(rows, self.layout.action_offsets)
        chunks, _ = self._around(rows, list(self.layout.chunk_starts))
        batch: dict[str, Any] = {}
        for key in [*self.meta.video_keys, *self._keys]:
            where = rows
            if key in self._offsets:
                where = (acted if key == ACTION else observed)[0]
            if key in self._frames:
                batch[key] = self._pictures(key, where)
            elif key in self._columns:
                batch[key] = _take(self._columns[key], where)
            else:
                batch[key] = [self._texts[key][row] for row in rows.tolist()]
        for key in self._offsets:
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
        wanted = rows.unsqueeze(1) + torch.tensor(offsets or [0]) * self._frame_stride
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
    column = dataset.hf_dataset.data.column(key).combine_chunks()
    if column.null_count:
        raise ValueError(f"{dataset.repo_id} lacks {column.null_count} values of {key!r}; InMemorySegments needs all.")
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    for _ in range(sample.ndim):
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    return torch.tensor(array, dtype=sample.dtype).reshape(-1, *sample.shape)


def _episode_bounds(dataset: LeRobotDataset) -> tuple[Int[Tensor, " frames"], Int[Tensor, " frames"]]:
    """Position of the first and of the last frame of each frame's episode."""
    first, last = (torch.empty(len(dataset.hf_dataset), dtype=torch.int64) for _ in range(2))
    for _, start, length in episode_spans(dataset):
        first[start : start + length] = start
        last[start : start + length] = start + length - 1
    return first, last


def _load_frames(
    dataset: LeRobotDataset, key: str, cache: str | Path | None
) -> tuple[UInt8[Tensor, "frames channels height width"], list[int]]:
    """All frames of a camera, decoded now or by an earlier run, and the places of those that cannot be read."""
    shape = (len(dataset), *dataset_to_policy_features({key: dataset.meta.features[key]})[key].shape)
    decode = _decode_images if key in dataset.meta.image_keys else _decode_videos
    if cache is None:
        frames = np.empty(shape, dtype=np.uint8)
        unreadable = decode(dataset, key, frames)
        return torch.from_numpy(frames), unreadable
    path = Path(cache) / f"{key}-{_identity(dataset, key)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes one decodes while the others wait for its file.
    with WeakFileLock(path.with_suffix(".lock")):
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            frames = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
            if unreadable := decode(dataset, key, frames):
                # the file could not tell which they are
                unfinished.unlink()
                return torch.from_numpy(np.array(frames)), unreadable
            frames.flush()
            unfinished.replace(path)
    # Copy on write: the pages are shared, and PyTorch wants memory that it may write to.
    return torch.from_numpy(np.load(path, mmap_mode="c")), []


def _identity(dataset: LeRobotDataset, key: str) -> str:
    """Digest of everything the decoded frames depend on: the files' contents, the episodes, the camera, the decoder."""
    root = dataset.root
    read = {root / path for path in dataset.reader.get_episodes_file_paths()}
    files = sorted({root / "meta" / "info.json", *(root / "meta" / "episodes").rglob("*.parquet"), *read})
    digest = hashlib.sha256(repr((key, dataset.episodes, dataset._video_backend)).encode())
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:32]


def _decode_images(dataset: LeRobotDataset, key: str, frames: np.ndarray) -> list[int]:
    """Decode picture by picture; returns the places of those that cannot be."""
    pictures = dataset.hf_dataset.select_columns([key]).with_format(None)
    unreadable: list[int] = []
    for position in range(len(pictures)):
        try:
            picture = pictures[position][key]
            pixels = np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            if len(unreadable) == position >= UNREADABLE:
                raise ValueError(f"The pictures {key} of {dataset.repo_id} cannot be read: {error}") from error
            unreadable.append(position)
            frames[position] = 0
            continue
        if picture.mode != "RGB":
            raise ValueError(
                f"{key} of {dataset.repo_id} holds {picture.mode} images, and InMemorySegments reads RGB: use the "
                "LeRobotDataset itself."
            )
        frames[position] = pixels.transpose(2, 0, 1)
    return unreadable


def _decode_videos(dataset: LeRobotDataset, key: str, frames: np.ndarray) -> list[int]:
    """Decode with LeRobot's function, a window of frames after the other; returns the places of those that cannot be."""
    logger.info("Decoding %d frames of %s once, into memory.", len(frames), key)
    timestamps = dataset.hf_dataset.data.column("timestamp").to_numpy()
    window = max(1, min(256, DECODED_AT_ONCE // math.prod(frames.shape[1:])))
    unreadable: list[int] = []
    for episode, start, length in episode_spans(dataset):
        path = dataset.root / dataset.meta.get_video_file_path(episode, key)
        begin = dataset.meta.episodes[episode][f"videos/{key}/from_timestamp"]

        def decoded(times: list[float], path: Path = path, begin: float = begin) -> np.ndarray:
            shifted = [begin + time for time in times]
            decode = partial(decode_video_frames, path, shifted, dataset.tolerance_s, dataset._video_backend)
            return decode(return_uint8=True).numpy()

        for first in range(start, start + length, window):
            last = min(first + window, start + length)
            try:
                frames[first:last] = decoded(timestamps[first:last].tolist())
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                for position in range(first, last):
                    try:
                        frames[position] = decoded([float(timestamps[position])])[0]
                    except (OSError, RuntimeError, ValueError, IndexError):
                        if len(unreadable) == position >= UNREADABLE:
                            raise error from None
                        unreadable.append(position)
                        frames[position] = 0
    return unreadable


def _take(values: Shaped[Tensor, "frames *shape"], where: Int[Tensor, "*steps"]) -> Shaped[Tensor, "..."]:
    return values.index_select(0, where.flatten()).reshape(*where.shape, *values.shape[1:])
