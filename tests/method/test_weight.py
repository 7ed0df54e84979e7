import math

import pytest
import torch
from builders import property_test, seeded
from hypothesis import given
from hypothesis import strategies as st

from ptr_hf.method import (
    conservative_weight,
    effective_sample_size,
    global_self_normalized_loss,
    kl_bound,
    self_normalized_loss,
    weight_bounds,
)

alphas = st.floats(0.0, 1.0)
floors = st.floats(0.01, 1.0)
ceilings = st.floats(1.0, 50.0)
scores = st.lists(st.floats(-60.0, 20.0), min_size=1, max_size=12)


@property_test
@given(values=scores, beta=st.floats(0.1, 5.0), alpha=alphas, low=floors, high=ceilings)
def test_equals_equation_21_and_stays_within_its_bounds(values, beta, alpha, low, high):
    weight = conservative_weight(torch.tensor(values, dtype=torch.float64), beta, alpha, low, high)
    expected = [1 + alpha * (min(max(math.exp(value / beta), low), high) - 1) for value in values]
    assert weight.tolist() == pytest.approx(expected, rel=1e-12)
    floor, ceiling = weight_bounds(alpha, low, high)
    assert ((weight >= floor - 1e-12) & (weight <= ceiling + 1e-12)).all()


@property_test
@given(values=scores, alpha=alphas, low=floors, high=ceilings)
def test_a_higher_score_never_weighs_less(values, alpha, low, high):
    weight = conservative_weight(torch.tensor(sorted(values), dtype=torch.float64), 1.5, alpha, low, high)
    assert (weight.diff() >= 0).all()


@property_test
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40), alpha=alphas, low=floors, high=ceilings)
def test_the_weighted_distribution_stays_within_the_kl_bound(seed, rows, alpha, low, high):
    source = seeded(seed)
    p = torch.rand(rows, generator=source, dtype=torch.float64) + 1e-3
    p = p / p.sum()
    score = 8 * torch.randn(rows, generator=source, dtype=torch.float64)
    q = p * conservative_weight(score, 1.5, alpha, low, high)
    q = q / q.sum()
    divergence = (q * (q / p).log()).sum().item()
    assert -1e-12 <= divergence <= kl_bound(alpha, low, high) + 1e-12


@property_test
@given(seed=st.integers(0, 10_000), sources=st.integers(1, 4), alpha=alphas, low=floors, high=ceilings)
def test_no_source_share_moves_beyond_equation_30(seed, sources, alpha, low, high):
    source = seeded(seed)
    rows = 30
    belongs = torch.randint(sources, (rows,), generator=source)
    # the sources' quality differs, so that shares really move
    score = 6 * torch.randn(sources, generator=source, dtype=torch.float64)[belongs]
    weight = conservative_weight(score, 1.0, alpha, low, high)
    ratio = math.exp(kl_bound(alpha, low, high))
    for m in range(sources):
        before = (belongs == m).double().mean()
        if before > 0:
            moved = (self_normalized_loss((belongs == m).double(), weight) / before).item()
            assert 1 / ratio - 1e-9 <= moved <= ratio + 1e-9


def test_the_bound_is_nearly_reached_so_the_tests_above_could_fail():
    # one rare sample at the ceiling, all others at the floor
    rows = 10_000
    score = torch.full((rows,), -100.0, dtype=torch.float64)
    score[0] = 100.0
    share = self_normalized_loss((score > 0).double(), conservative_weight(score, 1.0))
    assert (share * rows).item() == pytest.approx(16.0, rel=2e-3)
    assert kl_bound() == pytest.approx(math.log(16.0))


@given(values=scores)
@property_test
def test_alpha_zero_is_exactly_one(values):
    assert (conservative_weight(torch.tensor(values), 1.5, alpha=0.0) == 1.0).all()


def test_score_zero_weighs_one_and_missing_or_nan_scores_too():
    score = torch.tensor([0.0, 9.0, torch.nan, torch.inf, -9.0])
    valid = torch.tensor([True, False, True, True, True])
    weight = conservative_weight(score, torch.tensor(1.5, dtype=torch.float64), valid=valid)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.25]))


def test_weight_is_a_constant_and_at_least_float32():
    score = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    weight = conservative_weight(score, 1.5)
    assert not weight.requires_grad
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, conservative_weight(score.float(), 1.5))


@pytest.mark.parametrize(
    ("alpha", "low", "high"), [(-0.1, 0.5, 2), (1.1, 0.5, 2), (1, 0, 2), (1, 1.5, 2), (1, 0.5, 0.9)]
)
def test_settings_out_of_range_are_refused(alpha, low, high):
    for call in (weight_bounds, kl_bound, lambda *a: conservative_weight(torch.zeros(1), 1.0, *a)):
        with pytest.raises(ValueError, match=r"alpha is|w_min is"):
            call(float(alpha), float(low), float(high))


def test_beta_must_be_positive():
    with pytest.raises(ValueError, match="beta is 0"):
        conservative_weight(torch.zeros(1), 0.0)


@property_test
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 10), scale=st.floats(0.01, 100.0))
def test_self_normalised_loss_is_a_weighted_mean_whatever_the_scale_of_the_weights(seed, rows, scale):
    source = seeded(seed)
    loss = torch.randn(rows, generator=source, dtype=torch.float64)
    weight = torch.rand(rows, generator=source, dtype=torch.float64) + 0.1
    mean = self_normalized_loss(loss, weight)
    assert mean.item() == pytest.approx(sum((weight * loss).tolist()) / sum(weight.tolist()), abs=1e-12)
    assert mean.item() == pytest.approx(self_normalized_loss(loss, scale * weight).item(), abs=1e-9)
    assert loss.min() - 1e-9 <= mean <= loss.max() + 1e-9
    assert torch.equal(mean, global_self_normalized_loss(loss, weight))


def test_gradient_goes_through_the_loss_only():
    loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    weight = torch.tensor([0.25, 1.0, 4.0], requires_grad=True)
    self_normalized_loss(loss, weight).backward()
    torch.testing.assert_close(loss.grad, weight.detach() / weight.detach().sum())
    assert weight.grad is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_left_out(bad):
    loss = torch.tensor([1.0, bad, 3.0], requires_grad=True)
    weight = torch.tensor([1.0, 4.0, 3.0])
    mean = self_normalized_loss(loss, weight)
    assert mean.item() == pytest.approx(2.5)
    mean.backward()
    torch.testing.assert_close(loss.grad, torch.tensor([0.25, 0.0, 0.75]))


def test_nothing_to_average_is_zero_with_a_graph():
    loss = torch.randn(3, requires_grad=True)
    mean = self_normalized_loss(loss, torch.zeros(3))
    mean.backward()
    assert mean.item() == 0
    assert (loss.grad == 0).all()


def test_several_terms_at_once_are_the_terms_one_by_one():
    loss, weight = torch.randn(3, 5), torch.rand(3, 5)
    weight[1] = 0
    together = global_self_normalized_loss(loss, weight)
    torch.testing.assert_close(
        together, torch.stack([self_normalized_loss(*pair) for pair in zip(loss, weight, strict=True)])
    )


def test_half_precision_is_summed_in_float32():
    loss = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    assert self_normalized_loss(loss, torch.ones(4096, dtype=torch.bfloat16)) == 1.0


@property_test
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 20))
def test_effective_sample_size_lies_between_one_and_the_number_of_rows(seed, rows):
    source = seeded(seed)
    weight = torch.rand(rows, generator=source, dtype=torch.float64) + 1e-3
    valid = torch.rand(rows, generator=source) < 0.7
    size = effective_sample_size(weight, valid).item()
    kept = weight[valid].tolist()
    if kept:
        assert size == pytest.approx(sum(kept) ** 2 / sum(w * w for w in kept))
        assert 1 - 1e-9 <= size <= len(kept) + 1e-9
    else:
        assert size == 0
    assert effective_sample_size(torch.ones(rows)) == rows
