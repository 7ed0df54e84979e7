import math

import pytest
import torch
from builders import HostReads, property_test, seeded
from hypothesis import given
from hypothesis import strategies as st

from ptr_hf.method import (
    TransitionScorer,
    identification_logits,
    identification_loss,
    identification_metrics,
    masked_derangement,
    masked_mean,
    ptr_score,
    ranking_loss,
)

seeds = st.integers(0, 10_000)


def random_logits(seed, batch, count):
    source = seeded(seed)
    logits = 20 * (2 * torch.rand(batch, count, generator=source, dtype=torch.float64) - 1)
    mask = torch.rand(batch, count, generator=source) < 0.7
    return logits, mask


@property_test
@given(
    seed=seeds, batch=st.integers(1, 4), count=st.integers(1, 6), temperature=st.floats(0.01, 2), clamp=st.floats(1, 30)
)
def test_logits_are_clamped_cosines_over_the_temperature(seed, batch, count, temperature, clamp):
    source = seeded(seed)
    query = torch.randn(batch, 5, generator=source, dtype=torch.float64)
    candidates = torch.randn(batch, count, 5, generator=source, dtype=torch.float64)
    logits = identification_logits(query, candidates, temperature, clamp)
    for b in range(batch):
        for c in range(count):
            u, y = query[b], candidates[b, c]
            cosine = (u @ y / (u.norm() * y.norm())).item()
            assert logits[b, c].item() == pytest.approx(min(max(cosine / temperature, -clamp), clamp), abs=1e-9)
    assert logits.abs().max() <= clamp
    torch.testing.assert_close(logits, identification_logits(7 * query, 0.1 * candidates, temperature, clamp))


def test_the_clamp_is_reached_and_cuts_the_gradient_there():
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    logits = identification_logits(query, torch.tensor([[[1.0, 0.1], [-1.0, 0.1]]]), 0.03)
    assert logits.tolist() == [[20.0, -20.0]]
    logits.sum().backward()
    assert (query.grad == 0).all()


@property_test
@given(seed=seeds, batch=st.integers(1, 4), count=st.integers(1, 8))
def test_score_and_loss_equal_equations_13_and_14(seed, batch, count):
    logits, mask = random_logits(seed, batch, count)
    score, loss = ptr_score(logits, mask), identification_loss(logits, mask)
    for b in range(batch):
        if not mask[b, 0]:
            assert score[b] == loss[b] == 0
            continue
        kept = logits[b][mask[b]].tolist()
        posterior = math.exp(kept[0]) / sum(math.exp(value) for value in kept)
        assert score[b].item() == pytest.approx(math.log(posterior * len(kept)), abs=1e-9)
        assert loss[b].item() == pytest.approx(-math.log(posterior), abs=1e-9)
        assert score[b] <= math.log(len(kept))
        if len(kept) == 1:
            assert score[b] == 0


@property_test
@given(seed=seeds, batch=st.integers(1, 3), count=st.integers(1, 300), level=st.floats(-20, 20))
def test_a_uniform_posterior_scores_zero_and_a_constant_changes_nothing(seed, batch, count, level):
    uniform = torch.full((batch, count), level, dtype=torch.float64)
    torch.testing.assert_close(ptr_score(uniform), torch.zeros(batch, dtype=torch.float64), rtol=0, atol=1e-12)
    logits, mask = random_logits(seed, batch, count)
    torch.testing.assert_close(ptr_score(logits + level, mask), ptr_score(logits, mask), rtol=0, atol=1e-9)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(count - 1, generator=seeded(seed))])
    torch.testing.assert_close(ptr_score(logits[:, order], mask[:, order]), ptr_score(logits, mask), rtol=0, atol=1e-9)


def test_a_sure_scorer_reaches_the_logarithm_of_the_pool():
    logits = torch.tensor([[20.0] + [-20.0] * 63])
    assert ptr_score(logits).item() == pytest.approx(math.log(64), abs=1e-6)


def test_only_the_match_scores_exactly_zero():
    assert ptr_score(torch.randn(5, 1)).tolist() == [0.0] * 5
    assert identification_loss(torch.randn(5, 1)).tolist() == [0.0] * 5


def test_one_bad_row_does_not_spread():
    logits = torch.randn(3, 4)
    logits[1] = torch.nan
    logits.requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    score, loss = ptr_score(logits, mask), identification_loss(logits, mask)
    assert score.isfinite().all()
    (score + loss * 2).sum().backward()
    assert logits.grad.isfinite().all()
    # without the mask the bad row is bad, and the others are still what they were
    unmasked = ptr_score(logits.detach())
    torch.testing.assert_close(unmasked[[0, 2]], score.detach()[[0, 2]])
    assert unmasked[1].isnan()


def test_half_precision_is_raised_and_float64_kept():
    query, candidates = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        logits = identification_logits(query.to(dtype), candidates.to(dtype), 0.1)
        assert (
            logits.dtype == ptr_score(logits.to(dtype)).dtype == identification_loss(logits.to(dtype)).dtype == expected
        )
        assert ranking_loss(logits[:, 0].to(dtype), logits[:, 1].to(dtype)).dtype == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = identification_logits(query.float(), candidates.float(), 0.03)
    assert torch.equal(blurred, identification_logits(query.float(), candidates.float(), 0.03))


@property_test
@given(pairs=st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=6))
def test_ranking_loss_equals_equation_31(pairs):
    positive, negative = torch.tensor(pairs, dtype=torch.float64).T
    expected = [-math.log(1 / (1 + math.exp(-(p - n)))) for p, n in pairs]
    assert ranking_loss(positive, negative).tolist() == pytest.approx(expected, abs=1e-9)


@property_test
@given(seed=seeds, n=st.integers(1, 30), share=st.floats(0, 1))
def test_a_masked_derangement_permutes_the_valid_rows_among_themselves(seed, n, share):
    source = seeded(seed)
    valid, keys = torch.rand(n, generator=source) < share, torch.rand(n, generator=source)
    with HostReads() as seen:
        index, usable = masked_derangement(valid, keys)
    assert seen.reads == []
    assert sorted(index.tolist()) == list(range(n))
    assert torch.equal(usable, valid if valid.sum() >= 2 else torch.zeros_like(valid))
    moved = index != torch.arange(n)
    assert torch.equal(moved, usable)
    assert valid[index[usable]].all()


def test_derangements_vary_with_the_keys_and_ignore_those_of_invalid_rows():
    def draw(seed: int) -> list[int]:
        return masked_derangement(torch.ones(4, dtype=torch.bool), torch.rand(4, generator=seeded(seed)))[0].tolist()

    # the six cyclic ones
    assert len({tuple(draw(seed)) for seed in range(200)}) == 6
    valid, keys = torch.arange(7) < 4, torch.rand(7, generator=seeded(3))
    assert masked_derangement(valid, keys)[0].tolist() == [
        *masked_derangement(valid[:4], keys[:4])[0].tolist(),
        4,
        5,
        6,
    ]


@property_test
@given(seed=seeds, batch=st.integers(1, 4), count=st.integers(1, 6))
def test_metrics_say_whether_the_match_is_on_top_and_by_how_much(seed, batch, count):
    logits, mask = random_logits(seed, batch, count)
    correct, margin, valid = identification_metrics(logits, mask)
    for b in range(batch):
        others = logits[b, 1:][mask[b, 1:]].tolist()
        if mask[b, 0] and others:
            assert valid[b]
            assert margin[b].item() == pytest.approx(logits[b, 0].item() - max(others))
            assert correct[b] == (logits[b, 0].item() > max(others))
        else:
            assert not valid[b]
            assert not correct[b]
            assert margin[b] == 0


def test_a_scorer_that_knows_nothing_is_never_correct():
    correct, margin, valid = identification_metrics(torch.zeros(3, 5))
    assert valid.all()
    assert not correct.any()
    assert (margin == 0).all()


@property_test
@given(seed=seeds, batch=st.integers(1, 4), steps=st.integers(1, 6))
def test_masked_mean_averages_the_valid_steps(seed, batch, steps):
    source = seeded(seed)
    x = torch.randn(batch, steps, 3, generator=source, dtype=torch.float64)
    mask = torch.rand(batch, steps, generator=source) < 0.5
    mean = masked_mean(x.masked_fill(~mask[..., None], torch.nan), mask)
    for b in range(batch):
        kept = x[b][mask[b]]
        torch.testing.assert_close(mean[b], kept.mean(0) if len(kept) else torch.zeros(3, dtype=torch.float64))


def test_scorer_reads_context_and_action_and_sends_gradient_to_both():
    torch.manual_seed(0)
    scorer = TransitionScorer(6, 4, 8, hidden_dim=32)
    context, action = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    query = scorer(context, action)
    assert query.shape == (5, 8)
    query.square().sum().backward()
    assert (context.grad.abs().sum(dim=1) > 0).all()
    assert (action.grad.abs().sum(dim=1) > 0).all()
    assert not torch.allclose(query, scorer(context, action.roll(1, 0)))
    assert not torch.allclose(query, scorer(context.roll(1, 0), action))


def test_scorer_rows_do_not_mix():
    scorer = TransitionScorer(6, 4, 8)
    context, action = torch.randn(3, 6), torch.randn(3, 4)
    torch.testing.assert_close(scorer(context, action)[1:2], scorer(context[1:2], action[1:2]), rtol=0, atol=1e-6)


def test_both_layers_of_the_action_path_are_xavier_initialised():
    torch.manual_seed(0)
    scorer = TransitionScorer(6, 64, 8, hidden_dim=256)
    for layer in (scorer.action_in, scorer.action_out):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.98 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (layer.bias == 0).all()


def test_scorer_works_in_float32_whatever_comes_in():
    scorer = TransitionScorer(6, 4, 8).to(torch.bfloat16)
    context, action = torch.randn(3, 6).bfloat16(), torch.randn(3, 4).bfloat16()
    expected = scorer(context.float(), action.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(context, action), expected)
    assert expected.dtype == torch.float32
    assert scorer.double()(context, action).dtype == torch.float64
