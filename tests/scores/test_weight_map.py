"""From verdicts to weights: quantiles and z-scores group by group, and the maps' shapes and bounds."""

import math

import numpy as np
import pytest
import torch
from evidences import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from ptr_hf.scores.weight_map import combined, exponential, grouped_quantile, rejection, standardized


def data(seed: int, slots: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = seeded(seed)
    values = torch.randn(slots, generator=source)
    # episodes make the groups, so there are at most as many as slots
    return (
        values,
        torch.randint(min(groups, slots), (slots,), generator=source),
        torch.rand(slots, generator=source) < 0.7,
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    # values of large groups are not sorted
    slots=st.integers(1, 40) | st.integers(380, 420),
    groups=st.integers(1, 6),
    quantile=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
)
def test_grouped_quantile_is_numpys_in_every_group(seed: int, slots: int, groups: int, quantile: float) -> None:
    values, group, known = data(seed, slots, groups)
    found = grouped_quantile(values.masked_fill(~known, torch.nan), group, known, quantile)
    for slot in range(slots):
        members = values[(group == group[slot]) & known].numpy()
        if not len(members):
            assert math.isnan(found[slot])
            continue
        assert found[slot].item() == pytest.approx(np.quantile(members, quantile, method="lower"))


def test_standardized_is_median_and_mad_within_each_group() -> None:
    values, group, _ = data(0, 200, 4)
    values = values * torch.tensor([1.0, 10.0, 0.1, 3.0])[group] + 5.0 * group
    z = standardized(values[:, None], group)[:, 0]
    for number in range(4):
        own = values[group == number].double().numpy()
        middle = np.quantile(own, 0.5, method="lower")
        spread = 1.4826 * np.quantile(np.abs(own - middle), 0.5, method="lower")
        expected = np.clip((own - middle) / spread, -8, 8)
        np.testing.assert_allclose(z[group == number].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_channels_are_standardized_apart_and_nan_stays_nan() -> None:
    values = torch.randn(50, 2, generator=seeded(1)) * torch.tensor([1.0, 1000.0])
    group = torch.zeros(50, dtype=torch.int64)
    together = standardized(values, group)
    assert torch.equal(together[:, 0], standardized(values[:, :1], group)[:, 0])
    missing = values.clone()
    missing[::5, 1] = torch.nan
    z = standardized(missing, group)
    assert z[:, 1].isnan().tolist() == [row % 5 == 0 for row in range(50)]
    assert torch.equal(z[:, 0], together[:, 0])


def test_a_small_group_is_compared_with_everyone() -> None:
    values = torch.randn(60, generator=seeded(2))
    group = torch.zeros(60, dtype=torch.int64)
    group[:4] = 1
    # five known members make a group; the NaN does not count as one
    group[10:16] = 2
    values[10:16] += 100.0
    values[15] = torch.nan
    z = standardized(values[:, None], group)[:, 0]
    everyone = standardized(values[:, None], torch.zeros_like(group))[:, 0]
    torch.testing.assert_close(z[:4], everyone[:4])
    assert z[10:15].abs().max() < 8 < 100
    assert (everyone[10:15] == 8).all()
    assert z[15].isnan()


def test_a_channel_that_is_the_same_everywhere_says_nothing() -> None:
    group = torch.zeros(20, dtype=torch.int64)
    z = standardized(torch.full((20, 1), 3.5), group)
    assert (z == 0).all()
    assert (exponential(z[:, 0], 0.02, 4.0) == 1).all()


def test_outliers_are_clamped() -> None:
    values = torch.cat([torch.linspace(-1, 1, 21), torch.tensor([1e6, -1e6])])
    z = standardized(values[:, None], torch.zeros(23, dtype=torch.int64))[:, 0]
    assert z[-2:].tolist() == [8.0, -8.0]


def test_combined_divides_by_the_root_of_the_number_that_know() -> None:
    nan = math.nan
    z = combined(torch.tensor([[1.0, 2.0, 3.0], [1.0, nan, 3.0], [nan, -2.0, nan], [nan, nan, nan]]))
    expected = torch.tensor([6 / math.sqrt(3), 4 / math.sqrt(2), -2.0, nan])
    torch.testing.assert_close(z, expected, equal_nan=True)


@pytest.mark.parametrize("floor", [0.02, 0.25, 1.0])
def test_rejection_keeps_most_and_rejects_below(floor: float) -> None:
    z = torch.linspace(-8, 8, 400)
    weight = rejection(z, floor)
    assert weight.min() >= floor
    assert weight.max() <= 1.0
    assert (weight.diff() >= 0).all()
    assert weight[z > 0].min() >= 1 - (1 - floor) * 0.003
    middle = rejection(torch.tensor([-1.5]), floor).item()
    assert middle == pytest.approx((1 + floor) / 2)
    assert rejection(torch.tensor([-8.0]), floor).item() == pytest.approx(floor, abs=1e-6)


def test_exponential_is_1_at_the_median_and_stops_at_its_bounds() -> None:
    z = torch.linspace(-8, 8, 401)
    weight = exponential(z, 0.02, 4.0)
    assert weight[200].item() == pytest.approx(1.0, abs=1e-5)
    assert weight.min().item() == pytest.approx(0.02)
    assert weight.max().item() == pytest.approx(4.0)
    inside = z.abs() < 0.4
    torch.testing.assert_close(weight[inside], torch.exp(3 * z[inside]))
