"""A LeRobotDataset that reads segments: every chunk with the instruction, and whatever else, of its own first frame.

One frame that cannot be read (a damaged picture, a timestamp that fits no frame) does not end it. The sample that needs it is
replaced by another one whose actions are NaN: that is how a bad sample looks to `Screen`, which leaves it out, counts it and
names it.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.language import is_language_column
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from ptr_hf.data.feature_store import FeatureStore
from ptr_hf.data.frame_columns import run_starts, table_blocks
from ptr_hf.data.pictures import pictures
from ptr_hf.data.segments import ACTION, CHUNK_PREFIX, OBSERVATION_PREFIX, PAD_SUFFIX, SegmentLayout
from ptr_hf.data.video_frames import ForwardReader

TASK = "task"
TASK_INDEX = "task_index"
NAMED = 10
"""Frames that are named by each process that reads; the others are counted."""
KEPT = ("index", "episode_index", "frame_index", "timestamp", "task_index", "task")
"""What a stand-in has of the sample that it stands for."""

logger = logging.getLogger(__name__)


class SegmentDataset(LeRobotDataset):
    """LeRobot's items at a segment layout, and the per-frame columns of every chunk.

    LeRobot gives all columns but observations and actions of the anchor frame alone. Where a segment has several chunks, an
    item has those of each chunk too, under `CHUNK_PREFIX`: `chunk.task_index` (T,), `chunk.task` (T texts), and every other
    column that `chunk_columns` lists. Past the episode's end they are those of its last frame.

    Args:
        repo_id: as of a LeRobotDataset.
        layout: the offsets to read.
        settings: of a LeRobotDataset, `delta_timestamps` among them.

    Attributes:
        wrong_times: positions of frames whose timestamp is another frame's; no sample reads them.
    """

    wrong_times: frozenset[int] = frozenset()

    def __init__(self, repo_id: str, *, layout: SegmentLayout, **settings: Any) -> None:
        super().__init__(repo_id, **settings)
        self.reader = ForwardReader(self._ensure_reader())
        self.layout = layout
        self._features: FeatureStore | None = None
        self.runs = episode_runs(self)
        self._columns = self.hf_dataset.select_columns(chunk_columns(self.meta.features, layout))

    def __getitem__(self, idx: int | slice) -> Any:
        """LeRobot's item, or a list of them, with the columns of every chunk; or a stand-in, and a warning that names the frame.

        Raises:
            Exception: what reading raises, where no item of the dataset can be read.
        """
        if isinstance(idx, slice):
            return super().__getitem__(idx)
        place = int(idx) % len(self)
        item = self._read(place)
        if self._features is not None:
            item = self._with_features(item, place, self._features)
        if self._columns.column_names:
            last = self.runs.bounds(place)[1]
            rows = [min(place + step, last) for step in self.layout.chunk_starts]
            for key, values in self._columns[rows].items():
                item[CHUNK_PREFIX + key] = torch.stack(values) if isinstance(values[0], Tensor) else values
            tasks = item[CHUNK_PREFIX + TASK_INDEX].tolist()
            item[CHUNK_PREFIX + TASK] = [self.meta.tasks.iloc[task].name for task in tasks]
        return item

    def _read(self, place: int) -> dict[str, Any]:
        """LeRobot's item, or a stand-in where there are actions that can say so."""
        if ACTION not in (self.reader.delta_indices or {}):
            return super().__getitem__(place)
        wrong = self.wrong_times and sorted(self.wrong_times.intersection(self._needed(place, self.meta.video_keys)))
        if wrong:
            return self._stand_in(place, wrong[0], "its timestamp is not that of this frame")
        try:
            return super().__getitem__(place)
        except Exception as error:
            try:
                return self._stand_in(place, self._unreadable(place), f"{type(error).__name__}: {_first_line(error)}")
            except (RuntimeError, TypeError):
                raise error from None

    def _stand_in(self, place: int, frame: int, why: str) -> dict[str, Any]:
        """A sample that is left out: another one's contents under this one's numbers."""
        row = self.hf_dataset.select_columns([name for name in KEPT if name in self.hf_dataset.column_names])[place]
        row["task"] = self.meta.tasks.iloc[int(row["task_index"])].name
        item = {**self._donor(), **row}
        steps = self.reader.delta_indices[ACTION]
        item[ACTION], item[ACTION + PAD_SUFFIX] = as_unreadable(item[ACTION], steps, frame - place)
        self._name(frame, why)
        return item

    def _donor(self) -> dict[str, Any]:
        for place in np.linspace(0, len(self) - 1, 8).astype(int).tolist():
            try:
                return super().__getitem__(place)
            except Exception:
                continue
        raise RuntimeError("no item can be read")

    def _needed(self, place: int, keys: Collection[str]) -> list[int]:
        """Positions of the frames at which a sample has some features."""
        steps = {step for key in keys for step in self.reader.delta_indices.get(key, [0])}
        first, last = self.runs.bounds(place)
        return sorted({min(max(place + step, first), last) for step in steps})

    def _unreadable(self, place: int) -> int:
        """The first frame that the sample needs and that cannot be read by itself; its own where all can."""
        # with an action LeRobot decodes the pictures of its row
        for frame in self._needed(place, self.meta.features):
            try:
                row = self.hf_dataset[frame]
                for key in self.meta.video_keys:
                    pictures(self, key, int(row["episode_index"]), [frame])
            except Exception:
                return frame
        return place

    @cached_property
    def _named(self) -> set[int]:
        return set()

    def _name(self, frame: int, why: str) -> None:
        """Say once which frame it was, in the process that reads."""
        if frame in self._named or len(self._named) > NAMED:
            return
        self._named.add(frame)
        more = " Further ones are counted alone." if len(self._named) > NAMED else ""
        logger.warning("%s%s", unreadable_frame(self, frame, why), more)

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
        first, last = self.runs.bounds(place)
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


@dataclasses.dataclass(frozen=True)
class EpisodeRuns:
    """Where the episodes of an open dataset lie, in the order in which it reads them.

    Attributes:
        episode: (runs,) numbers.
        start: (runs,) position of the first frame.
        length: (runs,) frames.
    """

    episode: Int[np.ndarray, " runs"]
    start: Int[np.ndarray, " runs"]
    length: Int[np.ndarray, " runs"]

    def bounds(self, place: int) -> tuple[int, int]:
        """Position of the first and of the last frame of a frame's episode."""
        run = int(np.searchsorted(self.start, place, side="right")) - 1
        return int(self.start[run]), int(self.start[run] + self.length[run] - 1)


def episode_runs(dataset: LeRobotDataset) -> EpisodeRuns:
    """Where the episodes of an open dataset lie; memory grows with their number alone."""
    starts, found, before, total = [np.empty(0, np.int64)], [np.empty(0, np.int64)], None, 0
    for (episode,) in table_blocks(dataset, "episode_index"):
        begins = run_starts(episode)
        if before == episode[0]:
            begins = begins[1:]
        starts.append(begins + total)
        found.append(episode[begins])
        before, total = episode[-1], total + len(episode)
    start = np.concatenate(starts)
    return EpisodeRuns(np.concatenate(found), start, np.diff(start, append=total))


def as_unreadable(action: Tensor, steps: Sequence[int], offset: int) -> tuple[Tensor, Tensor]:
    """Actions of a segment that `Screen` leaves out and names by a frame, and their padding.

    Args:
        action: (steps, ...) of any segment.
        steps: their frames, counted from the segment's first.
        offset: of the frame; the segment's first stands for one that no action is at.

    Raises:
        TypeError: the actions are whole numbers, among which there is no NaN.
    """
    if not action.is_floating_point():
        raise TypeError("Actions that are whole numbers cannot be left out.")
    there = torch.tensor(steps) == (offset if offset in steps else 0)
    spoiled = torch.zeros_like(action)
    spoiled[there] = torch.nan
    # what is padding names no frame
    return spoiled, ~there


def unreadable_frame(dataset: LeRobotDataset, place: int, why: str = "") -> str:
    """The sentence about a frame that cannot be read.

    Args:
        dataset: it is of.
        place: of the frame among those of the dataset.
        why: in words; by default nothing is said of it.
    """
    table = dataset.hf_dataset.data
    episode, number = (table.column(name)[place].as_py() for name in ("episode_index", "frame_index"))
    because = f" ({why})" if why else ""
    return f"Frame {number} of episode {episode} of {dataset.repo_id} cannot be read{because}: samples that need it are left out."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
