"""FIFO of past targets (Section 4.2), each with the task, source, episode, frame and state it came with."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ptr_hf.method.numerics import NeverLowered

_IDENTITY = ("task", "source", "episode", "frame")


class CandidateQueue(NeverLowered):
    """The last ``capacity`` targets pushed, held in buffers so that it is saved, moved and broadcast with the model.

    Rows are float32 and constant. Unknown task, source, episode and frame are -1, an unknown state is NaN.

    Args:
        capacity: number of targets kept, at least 1.
        dim: width of a target.
        state_dim: width of the proprioceptive state kept with each target, 0 for none.

    Raises:
        ValueError: if capacity or dim is not positive.

    Example:
        >>> queue = CandidateQueue(capacity=4, dim=2)
        >>> queue.push(torch.ones(3, 2), task=[0, 0, 1])
        >>> len(queue)
        3
    """

    targets: Float[Tensor, "capacity dim"]
    state: Float[Tensor, "capacity state_dim"]
    task: Int[Tensor, " capacity"]
    source: Int[Tensor, " capacity"]
    episode: Int[Tensor, " capacity"]
    frame: Int[Tensor, " capacity"]
    pushed: Int[Tensor, ""]

    def __init__(self, capacity: int, dim: int, state_dim: int = 0) -> None:
        super().__init__()
        if capacity < 1 or dim < 1:
            raise ValueError(f"A CandidateQueue needs a positive capacity and dim, not {capacity} and {dim}.")
        self.capacity = capacity
        self.register_buffer("targets", torch.zeros(capacity, dim))
        self.register_buffer("state", torch.zeros(capacity, state_dim))
        for name in _IDENTITY:
            self.register_buffer(name, torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Number of targets held; reads the device, so not for the step."""
        return min(int(self.pushed), self.capacity)

    @property
    def filled(self) -> Bool[Tensor, " capacity"]:
        """Slots that hold a target."""
        return torch.arange(self.capacity, device=self.pushed.device) < self.pushed

    @torch.no_grad()
    def push(
        self,
        targets: Float[Tensor, "batch dim"],
        valid: Bool[Tensor, " batch"] | None = None,
        **metadata: Shaped[Tensor, "batch ..."] | Sequence[int],
    ) -> None:
        """Append the valid, finite rows in order; of more rows than fit the newest stay. No host sync.

        Args:
            targets: rows to append.
            valid: rows that are targets; all by default.
            metadata: ``task``, ``source``, ``episode``, ``frame``, one integer a row, and ``state``, one vector a row.

        Raises:
            ValueError: for another name, or a shape that does not fit the queue.
        """
        rows, device = targets.shape[0], self.targets.device
        unknown = sorted(metadata.keys() - {*_IDENTITY, "state"})
        if unknown:
            raise ValueError(f"The queue keeps task, source, episode, frame and state with a target, not {unknown}.")
        if rows == 0:
            return
        entries = {"targets": targets} | {name: torch.as_tensor(value) for name, value in metadata.items()}
        for name, value in entries.items():
            expected = (rows, *self.get_buffer(name).shape[1:])
            if value.shape != expected:
                raise ValueError(f"The queue expects {name} of shape {expected}, not {tuple(value.shape)}.")
        kept = targets.isfinite().all(dim=1).to(device)
        kept = kept if valid is None else kept & valid.to(device)
        order, total = kept.cumsum(0) - 1, kept.sum()
        kept = kept & (order >= total - self.capacity)
        # the row that writes each slot; rows that write none meet in a slot past the end
        slot = torch.where(kept, (self.pushed + order) % self.capacity, self.capacity)
        writer = torch.full((self.capacity + 1,), -1, device=device)
        writer = writer.scatter(0, slot, torch.arange(rows, device=device))[: self.capacity]
        written = writer >= 0
        for name in ("targets", "state", *_IDENTITY):
            buffer = self.get_buffer(name)
            if name in entries:
                new = entries[name].to(buffer)[writer.clamp(min=0)]
            else:
                new = torch.full_like(buffer, torch.nan if name == "state" else -1)
            buffer.copy_(torch.where(written.view(-1, *[1] * (buffer.dim() - 1)), new, buffer))
        self.pushed.add_(total)

    def ordered(self) -> dict[str, Tensor]:
        """What the queue holds, oldest first, by name; reads the device, so not for the step."""
        first = int(self.pushed) % self.capacity if int(self.pushed) > self.capacity else 0
        order = (first + torch.arange(len(self))) % self.capacity
        return {name: self.get_buffer(name)[order] for name in ("targets", *_IDENTITY, "state")}
