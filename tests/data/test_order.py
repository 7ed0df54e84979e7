"""The order of an epoch: that of the libraries' own samplers, without their lists."""

import tracemalloc
from collections import Counter, deque

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from ptr_hf.data.order import EpochSampler, MixtureSampler, permutation


class TestEpochSampler:
    @pytest.mark.parametrize("size", [1, 2, 4096, 10_001])
    @pytest.mark.parametrize("epoch", [0, 3])
    def test_the_order_is_accelerates(self, size: int, epoch: int) -> None:
        ours, theirs = EpochSampler(size, seed=7), SeedableRandomSampler(range(size), data_seed=7)
        for sampler in (ours, theirs):
            sampler.set_epoch(epoch)
        assert list(ours) == list(theirs)
        assert len(ours) == size

    def test_no_list_is_held(self) -> None:
        sampler = EpochSampler(1_000_000)
        assert sampler.order().element_size() == 4
        tracemalloc.start()
        deque(sampler, maxlen=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # a list takes 8 MB, the numbers in it 32
        assert peak < 1_000_000

    def test_numbers_that_need_eight_bytes_have_them(self) -> None:
        assert permutation(3, torch.Generator(), below=2**31).dtype == torch.int64


class TestMixtureSampler:
    def test_an_epoch_has_exactly_the_shares(self) -> None:
        sampler = MixtureSampler((100, 20), (0.25, 0.75), seed=3)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == 120
        counts = Counter(position >= 100 for position in drawn)
        assert counts == {False: 30, True: 90}
        # nobody is drawn twice before all of its source have been drawn
        seen = Counter(position for position in drawn if position >= 100)
        assert set(seen.values()) == {4, 5}
        assert max(Counter(position for position in drawn if position < 100).values()) == 1

    def test_the_order_depends_on_seed_and_epoch_alone(self) -> None:
        first, second = MixtureSampler((50, 9), (0.5, 0.5), seed=1), MixtureSampler((50, 9), (0.5, 0.5), seed=1)
        assert list(first) == list(first) == list(second)
        second.set_epoch(1)
        assert list(first) != list(second)
        assert list(first) != list(MixtureSampler((50, 9), (0.5, 0.5), seed=2))

    def test_the_order_of_earlier_releases(self) -> None:
        sampler = MixtureSampler((5, 3), (0.25, 0.75), seed=1)
        sampler.set_epoch(2)
        assert list(sampler) == [0, 7, 6, 2, 5, 6, 7, 5]
