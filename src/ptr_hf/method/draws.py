"""Random numbers that depend on what they are drawn for, not on which rank draws them or how many rows it holds."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ptr_hf.method.distributed import GlobalRows

_BITS = (1 << 32) - 1
# an odd multiplier below 2^31, so that products of 32-bit numbers stay within 63 bits
_MULTIPLIER = 0x45D9F3B


def _mixed(value: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A bijection of 32-bit numbers that spreads every bit over all of them: two rounds of xor-shift and multiply."""
    for _ in range(2):
        value = (((value >> 16) ^ value) * _MULTIPLIER) & _BITS
    return (value >> 16) ^ value


def uniform(seed: int, rows: Int[Tensor, " rows"], columns: int) -> Float[Tensor, "rows {columns}"]:
    """Float64 in [0, 1), a function of seed, row number and column alone, on the rows' device; no host sync.

    Args:
        seed: of the step.
        rows: numbers of the rows, e.g. `GlobalRows.own`.
        columns: numbers drawn for each.
    """
    low, high = seed & _BITS, (seed >> 32) & _BITS
    row = _mixed((_mixed(rows + low & _BITS) + high) & _BITS)[:, None]
    column = _mixed(torch.arange(columns, device=rows.device))
    return _mixed(_mixed(row ^ column) + row & _BITS).double() / (_BITS + 1)


class Purpose(IntEnum):
    """What a step draws; each has a stream of its own."""

    QUEUE = 0
    SHUFFLED_CONSEQUENCE = 1
    OTHER_ACTION = 2
    NULL_ACTION = 3
    NULL_INSTRUCTION = 4


@dataclass(frozen=True)
class Draws:
    """The random numbers of a micro-step, equal on every rank."""

    seed: int

    def seed_of(self, purpose: Purpose) -> int:
        """The seed of one stream."""
        return (self.seed * 1_000_003 + purpose) % 2**63

    def keys(
        self, rows: GlobalRows, purpose: Purpose, device: torch.device | None = None
    ) -> Float[Tensor, " all_rows"]:
        """One number in [0, 1) for every row of all ranks."""
        return uniform(self.seed_of(purpose), rows.numbers(device), 1)[:, 0]
