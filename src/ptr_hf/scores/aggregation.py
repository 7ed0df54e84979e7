"""What is remembered of every stretch of every episode: per-chunk verdicts are noisy, an episode's mean is not.

A slot is a whole episode (``trajectory``), a stretch of it (``segment``: episodes that are bad only in part) or a single
chunk (``sample``). Each keeps a mean of the last verdicts it got, in buffers, so that it is saved with the run, and is
fed from all ranks, so that it is equal on each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from lerobot.datasets import LeRobotDatasetMetadata
from torch import Tensor

from ptr_hf.method import NeverLowered
from ptr_hf.method.distributed import rows_of_all_ranks

WHOLE_EPISODE = 1 << 40


@dataclass(frozen=True)
class EpisodeTable:
    """What is known of a dataset's episodes before training.

    Attributes:
        first: dataset index of the first frame.
        length: frames.
        group: episodes that are compared with each other; 0, 1, ...
        corrupted: the truth, for the oracle alone; all False when it is not known.
        num_tasks: instructions in the dataset.
    """

    first: Int[Tensor, " episodes"]
    length: Int[Tensor, " episodes"]
    group: Int[Tensor, " episodes"]
    corrupted: Bool[Tensor, " episodes"]
    num_tasks: int

    @property
    def num_episodes(self) -> int:
        return len(self.length)

    def num_slots(self, window: int) -> int:
        """Slots of ``window`` frames that the episodes fill."""
        return int(_slots_of(self.length, window).sum())

    @classmethod
    def from_metadata(
        cls,
        meta: LeRobotDatasetMetadata,
        group_by: str = "all",
        corrupted: Sequence[int] = (),
    ) -> "EpisodeTable":
        """The table of a LeRobotDataset.

        Args:
            meta: of the dataset.
            group_by: ``all``, ``task``, or a per-episode column of the dataset's episode metadata (an operator, a robot,
                a source), whose values make the groups.
            corrupted: episodes that the truth sidecar calls corrupted.

        Raises:
            ValueError: there is no such column.
        """
        # all rows at once: `meta.episodes[name]` would make a Python object of each
        table = meta.episodes.with_format("arrow")[:]
        first, length = (
            torch.tensor(table.column(name).to_numpy(), dtype=torch.int64) for name in ("dataset_from_index", "length")
        )
        flags = torch.zeros(len(length), dtype=torch.bool)
        flags[torch.as_tensor(list(corrupted), dtype=torch.int64)] = True
        return cls(first, length, _groups(table, group_by), flags, max(1, int(meta.total_tasks)))


def _groups(table: pa.Table, group_by: str) -> Int[Tensor, " episodes"]:
    if group_by == "all":
        return torch.zeros(len(table), dtype=torch.int64)
    column = "tasks" if group_by == "task" else group_by
    if column not in table.column_names:
        known = ", ".join(name for name in sorted(table.column_names) if "/" not in name)
        raise ValueError(
            f"standardize_by={group_by!r} is no column of the dataset's episodes: choose all, task, or a column of "
            f"meta/episodes ({known})."
        )
    values = [str(value) for value in table.column(column).to_pylist()]
    number = {name: place for place, name in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values])


def _slots_of(length: Int[Tensor, " episodes"], window: int) -> Int[Tensor, " episodes"]:
    return torch.div(length + window - 1, window, rounding_mode="floor").clamp(min=1)


class SlotMemory(NeverLowered):
    """A recency-weighted mean of the verdicts on every slot.

    Args:
        num_episodes, num_slots: sizes; ``fill`` brings the content.
        num_channels: scores remembered side by side.
        window: frames of a slot; ``WHOLE_EPISODE`` for one slot an episode.
        horizon: number of visits that a slot's mean looks back on: verdicts of a scorer that has learned since fade.
    """

    total: Float[Tensor, "slots channels"]
    count: Float[Tensor, "slots channels"]
    weight: Float[Tensor, " slots"]
    group: Int[Tensor, " slots"]
    first_slot: Int[Tensor, " episodes"]
    first_frame: Int[Tensor, " episodes"]

    def __init__(
        self, num_episodes: int, num_slots: int, num_channels: int, window: int = WHOLE_EPISODE, horizon: float = 32.0
    ) -> None:
        super().__init__()
        self.window = window
        self.horizon = horizon
        self.register_buffer("total", torch.zeros(num_slots, num_channels))
        self.register_buffer("count", torch.zeros(num_slots, num_channels))
        self.register_buffer("weight", torch.ones(num_slots))
        self.register_buffer("group", torch.zeros(num_slots, dtype=torch.int64))
        self.register_buffer("first_slot", torch.zeros(num_episodes, dtype=torch.int64))
        self.register_buffer("first_frame", torch.zeros(num_episodes, dtype=torch.int64))

    @torch.no_grad()
    def fill(self, episodes: EpisodeTable) -> None:
        """Lay out the slots of a dataset and forget every verdict."""
        slots = _slots_of(episodes.length, self.window).to(self.group.device)
        self.first_slot.copy_(slots.cumsum(0) - slots)
        self.first_frame.copy_(episodes.first)
        self.group.copy_(episodes.group.to(self.group.device).repeat_interleave(slots))
        self.total.zero_()
        self.count.zero_()
        self.weight.fill_(1.0)

    def slot(self, episode: Int[Tensor, " batch"], index: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The slot of a chunk, by its episode and its first frame's dataset index."""
        inside = torch.div(index - self.first_frame[episode], self.window, rounding_mode="floor")
        return (self.first_slot[episode] + inside).clamp(max=len(self.weight) - 1)

    @torch.no_grad()
    def remember(self, slot: Int[Tensor, " batch"], values: Float[Tensor, "batch channels"]) -> None:
        """Take in one step's verdicts of every rank; NaN says nothing. Each rank brings as many rows.

        Only the slots that were visited are touched, however many there are.
        """
        slot, values = rows_of_all_ranks(slot), rows_of_all_ranks(values.to(self.total))
        if not len(slot):
            return
        slot, order = slot.sort(stable=True)
        known = values[order].isfinite()
        # number of the row's slot among those visited; what is left over repeats the last one
        group = torch.cat([slot.new_zeros(1), (slot[1:] != slot[:-1]).long().cumsum(0)])
        visits = torch.zeros_like(values).index_add_(0, group, known.to(values))
        news = torch.zeros_like(values).index_add_(0, group, torch.where(known, values[order], 0.0))
        visited = torch.zeros_like(slot).scatter(0, group, slot)
        group = torch.minimum(torch.arange(len(slot), device=slot.device), group[-1])
        visited, visits, news = visited[group], visits[group], news[group]
        fade = (1.0 - 1.0 / self.horizon) ** visits
        self.total[visited] = self.total[visited] * fade + news
        self.count[visited] = self.count[visited] * fade + visits

    @property
    def mean(self) -> Float[Tensor, "slots channels"]:
        """Mean verdict of every slot, NaN where nothing was said yet."""
        return self.total / self.count
