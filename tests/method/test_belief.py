import math

import pytest
import torch
from builders import property_test, seeded
from hypothesis import given
from hypothesis import strategies as st

from ptr_hf.method import BeliefMemory, BeliefTokenizer, belief_diversity, belief_entropy


def build(dim: int, tokens: int, temperature: float = 1.0, seed: int = 0) -> BeliefTokenizer:
    torch.manual_seed(seed)
    return BeliefTokenizer(dim, tokens, temperature).double()


def by_hand(tokenizer, context, action, mask):
    """Eq. 3-11, one number at a time."""
    fuse, assign = tokenizer.fuse, tokenizer.assign
    (batch, steps, dim), count = context.shape, assign.out_features
    tokens = torch.zeros(batch, count, dim, dtype=torch.float64)
    assignment = torch.zeros(batch, steps, count, dtype=torch.float64)
    entropies, diversities = [], []
    for b in range(batch):
        inside = [i for i in range(steps) if mask[b, i]]
        if not inside:
            continue
        fused = {i: torch.tanh(fuse.weight @ torch.cat([context[b, i], action[b, i]]) + fuse.bias) for i in inside}
        entropy = 0.0
        for m in range(count):
            logits = [((assign.weight[m] @ fused[i] + assign.bias[m]) / tokenizer.temperature).item() for i in inside]
            total = sum(math.exp(value) for value in logits)
            for i, value in zip(inside, logits, strict=True):
                share = math.exp(value) / total
                assignment[b, i, m] = share
                tokens[b, m] += share * fused[i].detach()
                entropy -= share * math.log(share) / count
        entropies.append(entropy)
        gram = assignment[b].T @ assignment[b] - torch.eye(count, dtype=torch.float64)
        diversities.append((gram**2).sum().item())
    rows = max(len(entropies), 1)
    return tokens, assignment, sum(entropies) / rows, sum(diversities) / rows


@property_test
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    steps=st.integers(1, 6),
    dim=st.integers(1, 5),
    tokens=st.integers(1, 4),
    temperature=st.floats(0.1, 3.0),
)
def test_equals_the_equations_term_by_term(seed, batch, steps, dim, tokens, temperature):
    tokenizer, source = build(dim, tokens, temperature, seed), seeded(seed)
    context, action = torch.randn(2, batch, steps, dim, generator=source, dtype=torch.float64)
    mask = torch.rand(batch, steps, generator=source) < 0.7
    update = tokenizer(context, action, mask)
    z, assignment, entropy, diversity = by_hand(tokenizer, context, action, mask)
    torch.testing.assert_close(update.tokens, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(update.assignment, assignment, rtol=0, atol=1e-9)
    assert update.entropy.item() == pytest.approx(entropy, abs=1e-9)
    assert update.diversity.item() == pytest.approx(diversity, abs=1e-9)


@property_test
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8), scale=st.sampled_from([0.1, 10.0, 1000.0]))
def test_every_token_distributes_one_over_the_valid_steps(seed, steps, scale):
    source = seeded(seed)
    context, action = scale * torch.randn(2, 4, steps, 6, generator=source)
    mask = torch.rand(4, steps, generator=source) < 0.5
    update = BeliefTokenizer(6, 3, temperature=0.05)(context, action, mask)
    sums = update.assignment.sum(dim=1)
    torch.testing.assert_close(sums, mask.any(dim=1).float()[:, None].expand_as(sums))
    assert (update.assignment >= 0).all()
    assert (update.assignment.masked_select(~mask[..., None]) == 0).all()
    assert 0 <= update.entropy <= math.log(steps) + 1e-5
    assert update.diversity >= 0
    assert update.tokens.abs().max() <= 1 + 1e-5


def test_no_mask_is_a_mask_of_ones():
    tokenizer = build(4, 2)
    context, action = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for ours, masked in zip(
        tokenizer(context, action), tokenizer(context, action, torch.ones(3, 5).bool()), strict=True
    ):
        torch.testing.assert_close(ours, masked, rtol=0, atol=0)


def test_masked_steps_reach_nothing_forward_or_backward():
    tokenizer = BeliefTokenizer(4, 2)
    context, action = torch.randn(2, 3, 5, 4)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [False] * 5])
    clean = tokenizer(context, action, mask)
    spoilt = context.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    update = tokenizer(spoilt, action, mask)
    for value, expected in zip(update, clean, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    (update.tokens.sum() + update.entropy + update.diversity).backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert (spoilt.grad[2] == 0).all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tokenizer.parameters())


def test_rows_without_a_step_are_zero_and_left_out_of_the_means():
    tokenizer = build(4, 2)
    context, action = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [False] * 5])
    both, first = tokenizer(context, action, mask), tokenizer(context[:1], action[:1])
    assert (both.tokens[1] == 0).all()
    torch.testing.assert_close(both.entropy, first.entropy)
    torch.testing.assert_close(both.diversity, first.diversity)
    none = tokenizer(context, action, torch.zeros(2, 5, dtype=torch.bool))
    assert none.entropy == 0
    assert none.diversity == 0


def test_regularisers_are_zero_exactly_for_one_step_per_token():
    assignment = torch.eye(3)[None]
    assert belief_entropy(assignment, torch.zeros_like(assignment)) == 0
    assert belief_diversity(assignment) == 0
    uniform = torch.full((1, 4, 3), 0.25)
    torch.testing.assert_close(belief_entropy(uniform, uniform.log()), torch.tensor([math.log(4)]))
    assert belief_diversity(uniform) > 0


def test_half_precision_and_autocast_give_float32_results():
    tokenizer = BeliefTokenizer(8, 4).to(torch.bfloat16)
    assert tokenizer.fuse.weight.dtype == torch.float32
    context, action = torch.randn(2, 3, 5, 8).bfloat16()
    expected = tokenizer(context.float(), action.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update = tokenizer(context, action)
    for value, reference in zip(update, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference, rtol=0, atol=0)


def test_memory_starts_learned_projects_and_cuts_the_carried_tokens():
    torch.manual_seed(0)
    memory = BeliefMemory(64, 4, 96)
    start = memory.start(3)
    assert start.shape == (3, 4, 64)
    injected = memory.to_backbone(start)
    assert injected.shape == (3, 4, 96)
    assert 0.5 < injected.square().mean().sqrt() < 2.0
    injected.square().sum().backward()
    assert memory.initial.grad is not None
    assert memory.initial.grad.abs().sum() > 0
    carried = BeliefMemory.carry(start)
    assert not carried.requires_grad
    assert torch.equal(carried, start)


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 1.0), (4, 0.0), (4, -1.0)])
def test_refuses_what_it_cannot_do(tokens, temperature):
    with pytest.raises(ValueError, match=r"num_tokens|temperature"):
        BeliefTokenizer(8, tokens, temperature)
