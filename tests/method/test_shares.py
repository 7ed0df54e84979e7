"""Shares of a mixture's sources: the sums behind them, Proposition 3 and the bound of Eq. 30."""

import math

import pytest
import torch
from builders import HostReads, make_chunks, make_objective, make_samples, property_test, seeded
from hypothesis import given
from hypothesis import strategies as st

from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.method import (
    GROUP_STATISTICS,
    ObjectiveOutput,
    conservative_weight,
    group_statistics,
    share_bound,
    weight_bounds,
)
from ptr_hf.presets import PRESETS
from ptr_hf.scores import WEIGHT_MAPS, map_range
from ptr_hf.scores.weigher import ScoreWeigher

BOUNDS = weight_bounds()


def output_of(weight, score=None, loss=None, target_valid=None, chunk_valid=None) -> ObjectiveOutput:
    rows = len(weight)
    filler, always = torch.zeros(rows), torch.ones(rows, dtype=torch.bool)
    return ObjectiveOutput(
        loss=filler if loss is None else loss, weight=weight, score=filler if score is None else score,
        identification=filler, ranking=filler, target_valid=always if target_valid is None else target_valid,
        ranking_valid=always, chunk_valid=always if chunk_valid is None else chunk_valid, entropy=filler, diversity=filler,
        contrast=filler, correct=always, margin=filler, candidates=filler.long(),
    )  # fmt: skip


def shares(output: ObjectiveOutput, group, groups: int, bounds=BOUNDS) -> tuple[list[float], list[float]]:
    """π and q of every group."""
    sums = group_statistics(output, group, groups, bounds)
    of = dict(zip(GROUP_STATISTICS, sums.T, strict=True))
    return tuple((of[name] / of[name].sum()).tolist() for name in ("chunks", "weight"))


def test_sums_by_hand():
    output = output_of(
        weight=torch.tensor([0.25, 4.0, 1.0, 2.0, 4.0, 0.0, 3.0]),
        score=torch.tensor([-3.0, 3.0, 9.0, 1.0, 5.0, 0.0, 1.0]),
        loss=torch.tensor([0.5, 0.25, 1.0, 2.0, torch.inf, 8.0, 8.0]),
        target_valid=torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool(),
        chunk_valid=torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool(),
    )
    # the fifth has no finite loss, the sixth lies past its episode, the seventh comes from nowhere known
    group = torch.tensor([0, 0, 0, 2, 2, 2, -1])
    sums = group_statistics(output, group, 3, BOUNDS)
    assert sums.dtype == torch.float64
    assert dict(zip(GROUP_STATISTICS, sums[0].tolist(), strict=True)) == {
        "chunks": 3, "weight": 5.25, "targets": 2, "score": 0.0, "at_floor": 1, "at_ceiling": 1, "loss": 1.75
    }  # fmt: skip
    assert sums[1].tolist() == [0] * 7
    assert sums[2].tolist() == [1, 2.0, 1, 1.0, 0, 0, 2.0]


@property_test
@given(seed=st.integers(0, 10_000), sources=st.integers(1, 5), beta=st.floats(0.3, 3.0))
def test_p3_shares_follow_the_mean_exponential_of_each_source(seed, sources, beta):
    """Without a clip, q(m) = π(m) E_m[exp(J/β)] / Σ_n π(n) E_n[exp(J/β)]."""
    source, rows = seeded(seed), 40
    group = torch.randint(sources, (rows,), generator=source)
    judgement = torch.randn(rows, generator=source, dtype=torch.float64)
    weight = conservative_weight(judgement, beta, w_min=1e-12, w_max=1e12)
    before, after = shares(output_of(weight), group, sources)
    tilted = []
    for m in range(sources):
        of_source = [math.exp(j / beta) for j, g in zip(judgement.tolist(), group.tolist(), strict=True) if g == m]
        share = len(of_source) / rows
        assert before[m] == pytest.approx(share)
        tilted.append(share * (sum(of_source) / len(of_source) if of_source else 0.0))
    assert after == pytest.approx([value / sum(tilted) for value in tilted], abs=1e-12)


def test_p3_by_hand():
    # two thirds with J = 0, one third with J = ln 4 and β = 1: 2/3 · 1 against 1/3 · 4
    weight = conservative_weight(torch.tensor([0.0, 0.0, math.log(4.0)], dtype=torch.float64), 1.0)
    before, after = shares(output_of(weight), torch.tensor([0, 0, 1]), 2)
    assert before == pytest.approx([2 / 3, 1 / 3])
    assert after == pytest.approx([1 / 3, 2 / 3])


@property_test
@given(
    seed=st.integers(0, 10_000),
    sources=st.integers(1, 4),
    alpha=st.floats(0.0, 1.0),
    floor=st.floats(0.01, 1.0),
    ceiling=st.floats(1.0, 50.0),
    scale=st.floats(0.01, 100.0),
)
def test_clipped_weights_never_leave_equation_30(seed, sources, alpha, floor, ceiling, scale):
    source = seeded(seed)
    group = torch.randint(sources, (30,), generator=source)
    score = 6 * torch.randn(sources, generator=source, dtype=torch.float64)[group]
    weight = conservative_weight(score, 1.0, alpha, floor, ceiling)
    low, high = share_bound(*weight_bounds(alpha, floor, ceiling))
    # whatever the weights are multiplied by: normalised to mean 1, to sum 1, ...
    before, after = shares(output_of(weight * scale), group, sources)
    observed = share_bound(weight.min().item(), weight.max().item())
    for pi, q in zip(before, after, strict=True):
        if pi > 0:
            assert low - 1e-9 <= q / pi <= high + 1e-9
            assert observed[0] - 1e-9 <= q / pi <= observed[1] + 1e-9


def test_the_bound_by_hand():
    assert share_bound(0.25, 4.0) == (1 / 16, 16.0)
    assert share_bound(1.0, 1.0) == (1.0, 1.0)
    for wrong in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="bound no share"):
            share_bound(*wrong)


@property_test
@given(
    weight_map=st.sampled_from(WEIGHT_MAPS),
    seed=st.integers(0, 10_000),
    alpha=st.floats(0.0, 1.0),
    floor=st.floats(0.001, 1.0),
    ceiling=st.floats(1.0, 20.0),
    spread=st.floats(0.0, 50.0),
)
def test_every_map_stays_in_its_range(weight_map, seed, alpha, floor, ceiling, spread):
    source = seeded(seed)
    values = spread * torch.randn(60, 2, generator=source)
    values[torch.rand(60, 2, generator=source) < 0.2] = torch.nan
    group = torch.randint(3, (60,), generator=source)
    weigher = ScoreWeigher({}, None, weight_map=weight_map, floor=floor, ceiling=ceiling, alpha=alpha)
    weigher.scores = torch.nn.ModuleDict({name: _Nothing() for name in ("a", "b")})
    low, high = map_range(weight_map, alpha, floor, ceiling)
    weight = weigher.slot_weights(values, group)
    assert (weight >= low - 1e-6).all()
    assert (weight <= high * (1 + 1e-6)).all()


class _Nothing(torch.nn.Module):
    has_chance = False


def test_ranges_of_the_presets():
    found = {}
    for preset in ("ptr", "sft", "sft_belief", "ptr_consequence", "ptr_calibrated", "small_loss_rejection"):
        config = PTRHyperparameters(preset=preset)
        found[preset] = config.weight_range
    assert found == {
        "ptr": (0.25, 4.0), "sft": (1.0, 1.0), "sft_belief": (1.0, 1.0), "ptr_consequence": pytest.approx((0.02, 4.0)),
        "ptr_calibrated": pytest.approx((0.01, 1.0)), "small_loss_rejection": pytest.approx((0.02, 1.0)),
    }  # fmt: skip
    assert set(found) <= set(PRESETS)


def test_the_objective_says_where_its_rows_come_from_and_nothing_waits_for_them():
    objective = make_objective(alpha=1.0)
    source = torch.tensor([0, 1, 1, 2, 2, 2])
    chunks = make_chunks(6, samples=make_samples(6, source=source))
    output = objective(chunks)
    assert torch.equal(output.source, source)
    assert torch.equal(output.task, chunks.samples.task)
    with HostReads() as host:
        sums = group_statistics(output, output.source, 3, BOUNDS)
    assert host.reads == []
    whole = {name: value.item() for name, value in objective.metrics(output).items()}
    total = dict(zip(GROUP_STATISTICS, sums.sum(dim=0).tolist(), strict=True))
    assert total["chunks"] == 6
    assert total["weight"] / 6 == pytest.approx(whole["weight_mean"])
    for name in ("score", "at_floor", "at_ceiling"):
        logged = whole["score" if name == "score" else f"weight_{name}"]
        assert total[name] / total["targets"] == pytest.approx(logged)
