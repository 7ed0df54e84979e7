"""In which order an epoch reads its samples: a permutation of four bytes a sample, made from seed and epoch alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

AT_ONCE = 4096
"""Numbers that become Python objects at a time."""


class EpochSampler(Sampler[int]):
    """Every sample once, in the order of Accelerate's `SeedableRandomSampler`, which makes a list of it (48 bytes a sample).

    Args:
        size: number of samples.
        seed: of the order, to which the epoch is added.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Accelerate calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for numbers in self.order().split(AT_ONCE):
            yield from numbers.tolist()

    def order(self) -> Int[Tensor, " samples"]:
        """The samples of the epoch in their order."""
        return permutation(self.size, torch.Generator().manual_seed(self.seed + self.epoch))


class MixtureSampler(EpochSampler):
    """Draws every source at its share, in an order that depends on seed and epoch alone.

    An epoch has as many samples as the mixture; each source gives its share of them, rounded, without repeating a sample
    before all of its own have been drawn.

    Args:
        sizes: samples of every source.
        shares: π, adding up to 1.
        seed: of the order.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int = 0) -> None:
        self.sizes, self.shares = tuple(sizes), tuple(shares)
        total = sum(self.sizes)
        ends = np.rint(np.cumsum(self.shares) * total).astype(int)
        self.counts = tuple(np.diff(ends, prepend=0).tolist())
        """Samples of every source in an epoch."""
        super().__init__(sum(self.counts), seed)

    def order(self) -> Int[Tensor, " samples"]:
        """The samples of the epoch in their order."""
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        first, drawn = 0, []
        for size, count in zip(self.sizes, self.counts, strict=True):
            for left in range(count, 0, -size):
                drawn.append(permutation(size, generator, first + size)[:left].add_(first))
            first += size
        together = torch.cat(drawn)
        return together[permutation(len(together), generator)]


def permutation(size: int, generator: torch.Generator, below: int = 0) -> Int[Tensor, " size"]:
    """`torch.randperm` in four bytes a number, or in eight where numbers up to `size` or `below` need them."""
    dtype = torch.int32 if max(size, below) < 2**31 else torch.int64
    return torch.randperm(size, generator=generator, dtype=dtype)
