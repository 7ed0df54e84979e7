"""The paper's three propositions, in a discrete world whose densities are known."""

import itertools
import math

import pytest
import torch
from builders import property_test, seeded
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from ptr_hf.method import conservative_weight, identification_loss, ptr_score, self_normalized_loss

CONTEXTS, OUTCOMES = 3, 4


def densities(seed: int = 0) -> tuple[Float[Tensor, "contexts outcomes"], Float[Tensor, " outcomes"]]:
    """p⁺(y | h, e) for every pair of context and action, and p⁻(y), the outcomes of all samples."""
    p_plus = torch.softmax(2.0 * torch.randn(CONTEXTS, OUTCOMES, generator=seeded(seed), dtype=torch.float64), dim=1)
    return p_plus, p_plus.mean(dim=0)


@pytest.mark.parametrize("negatives", [1, 2, 3])
def test_p1_the_bayes_optimal_logits_are_the_log_density_ratio(negatives):
    """Minimise the exact expectation of L_id over a table of logits: log p⁺/p⁻ + a constant of the context."""
    p_plus, p_minus = densities()
    draws = torch.tensor(list(itertools.product(range(OUTCOMES), repeat=1 + negatives)))
    # probability of (match, negatives) in each context
    probability = p_plus[:, draws[:, 0]] * p_minus[draws[:, 1:]].prod(dim=1)
    table = torch.zeros(CONTEXTS, OUTCOMES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def expected_loss() -> Tensor:
        optimizer.zero_grad()
        per_draw = identification_loss(table[:, draws].flatten(0, 1)).view(CONTEXTS, -1)
        loss = (probability * per_draw).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    learned = table.detach() - table.detach().mean(dim=1, keepdim=True)
    optimal = (p_plus / p_minus).log()
    torch.testing.assert_close(learned, optimal - optimal.mean(dim=1, keepdim=True), rtol=0, atol=1e-6)


def test_p2_the_expected_score_tends_to_the_kl_divergence():
    p_plus, p_minus = densities(2)
    ratio = (p_plus / p_minus).log()
    divergence = (p_plus * ratio).sum(dim=1)
    source, draws = seeded(0), 4000
    errors = []
    for negatives in (1, 8, 64, 1024):
        expected = []
        for context in range(CONTEXTS):
            # the match takes each outcome with its exact probability; the negatives are sampled
            others = torch.multinomial(p_minus, draws * negatives, replacement=True, generator=source)
            logits = ratio[context][others].view(draws, negatives)
            scores = [
                ptr_score(torch.cat([ratio[context, y].expand(draws, 1), logits], dim=1)).mean()
                for y in range(OUTCOMES)
            ]
            expected.append((p_plus[context] * torch.stack(scores)).sum())
        errors.append((torch.stack(expected) - divergence).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 5e-3


def test_p2_the_score_is_a_lower_bound_on_the_way():
    p_plus, p_minus = densities(1)
    ratio = (p_plus / p_minus).log()
    draws = torch.tensor(list(itertools.product(range(OUTCOMES), repeat=4)))
    for context in range(CONTEXTS):
        probability = p_plus[context, draws[:, 0]] * p_minus[draws[:, 1:]].prod(dim=1)
        expected = (probability * ptr_score(ratio[context][draws])).sum()
        assert expected <= min((p_plus[context] * ratio[context]).sum(), math.log(4))


def tilted_shares(mixture, outcomes, judgement, beta):
    """π_m E_m[exp(J/β)], normalised."""
    shares = mixture * (outcomes * (judgement / beta).exp()).sum(dim=1)
    return shares / shares.sum()


@property_test
@given(seed=st.integers(0, 10_000), sources=st.integers(1, 5), beta=st.floats(0.3, 3.0))
def test_p3_tilting_a_mixture_gives_the_stated_source_shares(seed, sources, beta):
    """The weighting of the code, its clip out of the way, tilts p(x) = Σ π_m p_m(x) by exp(J/β)."""
    source, atoms = seeded(seed), 6
    mixture = torch.rand(sources, generator=source, dtype=torch.float64) + 0.05
    mixture = mixture / mixture.sum()
    outcomes = torch.softmax(torch.randn(sources, atoms, generator=source, dtype=torch.float64), dim=1)
    judgement = torch.randn(atoms, generator=source, dtype=torch.float64)
    joint = mixture[:, None] * outcomes
    weight = conservative_weight(judgement, beta, alpha=1.0, w_min=1e-9, w_max=1e9)
    expected = tilted_shares(mixture, outcomes, judgement, beta)
    for m in range(sources):
        membership = (joint[m] / joint.sum(dim=0)).double()
        share = self_normalized_loss(membership, joint.sum(dim=0) * weight)
        torch.testing.assert_close(share, expected[m], rtol=0, atol=1e-12)


@property_test
@given(seed=st.integers(0, 10_000), beta=st.floats(0.3, 3.0))
def test_p3_the_tilt_is_the_best_trade_of_judgement_for_divergence(seed, beta):
    """q ∝ p exp(J/β) maximises E_q[J] - β KL(q‖p); no other distribution does better."""
    source = seeded(seed)
    p = torch.softmax(torch.randn(8, generator=source, dtype=torch.float64), dim=0)
    judgement = torch.randn(8, generator=source, dtype=torch.float64)

    def value(q: Tensor) -> float:
        return ((q * judgement).sum() - beta * (q * (q / p).log()).sum()).item()

    weight = conservative_weight(judgement, beta, alpha=1.0, w_min=1e-9, w_max=1e9)
    tilted = p * weight / (p * weight).sum()
    for _ in range(20):
        other = torch.softmax(torch.randn(8, generator=source, dtype=torch.float64), dim=0)
        near = 0.9 * tilted + 0.1 * other
        assert value(tilted) >= max(value(other), value(near)) - 1e-12
