"""A LeRobotDataset that one frame which cannot be read does not end: a damaged picture, a timestamp that fits no frame.

The sample that needs it is replaced by another one whose actions are NaN: that is how a bad sample looks to `Screen`, which
leaves it out, counts it and names it.
"""

import logging
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from ptr_hf.data.pictures import pictures
from ptr_hf.data.segments import ACTION, PAD_SUFFIX

logger = logging.getLogger(__name__)

NAMED = 10
"""Frames that are named by each process that reads; the others are counted."""
KEPT = ("index", "episode_index", "frame_index", "timestamp", "task_index", "task")
"""What a stand-in has of the sample that it stands for."""


class ReadableDataset(LeRobotDataset):
    """LeRobot's items; where one cannot be read, another one whose actions are NaN, and a warning that names the frame.

    Attributes:
        wrong_times: positions of frames whose timestamp is another frame's; no sample reads them.
    """

    wrong_times: frozenset[int] = frozenset()

    def __getitem__(self, idx: int | slice) -> Any:
        """LeRobot's item, or a stand-in.

        Raises:
            Exception: what reading raises, where no item of the dataset can be read.
        """
        if isinstance(idx, slice) or ACTION not in (self.reader.delta_indices or {}):
            return super().__getitem__(idx)
        place = int(idx) % len(self)
        if self.wrong_times:
            wrong = sorted(self.wrong_times.intersection(self._needed(place, self.meta.video_keys)))
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
        row = self._rows[place]
        steps = {step for key in keys for step in self.reader.delta_indices.get(key, [0])}
        first = place - int(row[1])
        last = first + int(self.meta.episodes["length"][int(row[0])]) - 1
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
    def _rows(self) -> np.ndarray:
        """(frames, 2): episode and frame in it."""
        table = self.hf_dataset.data
        return np.stack([table.column(name).to_numpy() for name in ("episode_index", "frame_index")], axis=1)

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
