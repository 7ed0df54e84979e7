"""What ranks exchange, and how their rows are numbered so that a step does not depend on how many ranks there are.

Every collective here is the identity in a single process.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 when torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_over_ranks(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over all ranks, without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def rows_of_all_ranks(tensor: Shaped[Tensor, "rows *shape"]) -> Shaped[Tensor, "all_rows *shape"]:
    """Rows of every rank, concatenated in rank order, without gradient; every rank must bring as many rows."""
    if world_size() == 1:
        return tensor.detach()
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.detach().contiguous())
    return torch.cat(gathered)


class _RowsOfAllRanks(torch.autograd.Function):
    """`rows_of_all_ranks` whose backward hands each rank the gradient that all ranks have for its rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return rows_of_all_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])[rank() * ctx.rows : (rank() + 1) * ctx.rows]


@dataclass(frozen=True)
class GlobalRows:
    """The numbering of all ranks' rows as one process would number them.

    A rank holds ``chunks`` · ``segments`` rows, time-major. One process with all ranks' segments side by side would hold
    chunks · (ranks · segments) rows, time-major too; every row has its place there, whatever the number of ranks.

    Args:
        chunks: T, chunks of a segment.
        segments: B, segments of a rank; every rank must hold as many.
        rank, ranks: by default those of a process that looks at its own rows alone.
    """

    chunks: int
    segments: int
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_all_ranks(cls, chunks: int, segments: int) -> "GlobalRows":
        """The numbering over the ranks of torch.distributed."""
        return cls(chunks, segments, rank(), world_size())

    @property
    def total(self) -> int:
        """Rows of all ranks together."""
        return self.chunks * self.segments * self.ranks

    def own(self, device: torch.device | None = None) -> Int[Tensor, " rows"]:
        """The places of this rank's rows."""
        chunk = torch.arange(self.chunks, device=device)[:, None] * (self.ranks * self.segments)
        segment = torch.arange(self.segments, device=device) + self.rank * self.segments
        return (chunk + segment).flatten()

    def numbers(self, device: torch.device | None = None) -> Int[Tensor, " all_rows"]:
        """A number for every row, by segment and then by chunk: segments that fill up the batch change nobody's."""
        segments = torch.arange(self.ranks * self.segments, device=device)
        return (segments * self.chunks + torch.arange(self.chunks, device=device)[:, None]).flatten()

    def gather(self, tensor: Shaped[Tensor, "rows *shape"]) -> Shaped[Tensor, "all_rows *shape"]:
        """Every rank's rows in their places; gradients flow back to the rank that a row came from.

        Where the tensor requires gradients all ranks must run the backward pass, in which they exchange them.
        """
        if self.ranks == 1:
            return tensor
        rows = _RowsOfAllRanks.apply(tensor) if tensor.requires_grad else rows_of_all_ranks(tensor)
        assert isinstance(rows, Tensor)
        parts = rows.unflatten(0, (self.ranks, self.chunks, self.segments))
        return parts.transpose(0, 1).flatten(0, 2)
