import copy
import math
from dataclasses import replace

import pytest
import torch
from builders import HostReads, make_chunks, make_objective, make_samples, property_test, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptr_hf.method import (
    ChunkBatch,
    ObjectiveOutput,
    PTRObjective,
    build_candidates,
    conservative_weight,
    identification_logits,
    identification_loss,
    ptr_score,
)


def train_step(objective: PTRObjective, chunks: ChunkBatch) -> tuple[ObjectiveOutput, dict[str, Tensor]]:
    output = objective(chunks)
    terms = objective.combine(output)
    objective.after_step()
    return output, terms


@property_test
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 8))
def test_combine_is_equation_32(seed, rows):
    source = seeded(seed)
    numbers = torch.rand(6, rows, generator=source, dtype=torch.float64)
    loss, weight, identification, ranking, entropy, diversity = numbers
    chunk_valid, target_valid, ranking_valid = torch.rand(3, rows, generator=source) < 0.7
    weight = weight * chunk_valid
    filler = torch.zeros(rows)
    output = ObjectiveOutput(
        loss=loss, weight=weight, score=filler, identification=identification, ranking=ranking, target_valid=target_valid,
        ranking_valid=ranking_valid, chunk_valid=chunk_valid, entropy=entropy, diversity=diversity, contrast=filler,
        correct=filler.bool(), margin=filler, candidates=filler.long(),
    )  # fmt: skip
    objective = make_objective(
        identification_coef=0.05, ranking_coef=0.25, entropy_coef=2e-3, diversity_coef=3e-3, discount=0.9
    )

    def mean(values, weights):
        total = sum(weights.tolist())
        return sum(v * w for v, w in zip(values.tolist(), weights.tolist(), strict=True)) / total if total else 0.0

    terms = objective.combine(output)
    action, identified = mean(loss, weight), mean(identification, target_valid.double())
    ranked, tokenizer = (
        mean(ranking, ranking_valid.double()),
        (2e-3 * mean(entropy, chunk_valid.double()) + 3e-3 * mean(diversity, chunk_valid.double())),
    )
    expected = [action, identified, ranked, tokenizer, action + 0.05 * 0.9 * identified + 0.25 * ranked + tokenizer]
    assert list(terms) == ["action", "identification", "ranking", "tokenizer", "loss"]
    assert [value.item() for value in terms.values()] == pytest.approx(expected, abs=1e-12)


def test_forward_is_the_paper_step_by_step():
    objective = make_objective(queue_negatives=32)
    train_step(objective, make_chunks(7, seed=1))
    chunks = make_chunks(6, seed=2)
    output = objective(chunks)
    query = objective.scorer(chunks.context, chunks.action)
    # more draws than entries: the whole queue competes, so the draw leaves nothing to chance
    candidates = build_candidates(chunks.samples, chunks.samples, None, objective.queue, 32)
    logits = identification_logits(query, candidates.targets, 0.12)
    assert output.candidates.tolist() == [13] * 6
    torch.testing.assert_close(output.score, ptr_score(logits, candidates.mask).detach())
    torch.testing.assert_close(output.identification, identification_loss(logits, candidates.mask))
    torch.testing.assert_close(output.weight, conservative_weight(output.score, 1.5))
    torch.testing.assert_close(output.score, torch.log(torch.exp(-output.identification.detach()) * 13))
    # the ranking loss under some derangement: every row's value is one of those of the other rows' actions
    for i in range(6):
        other = [j for j in range(6) if j != i]
        queries = objective.scorer(chunks.context[i].expand(5, -1), chunks.action[other])
        negatives = identification_logits(queries, chunks.samples.targets[i].expand(5, 1, -1), 0.12)[:, 0]
        possible = torch.nn.functional.softplus(negatives - logits[i, 0])
        assert (possible - output.ranking[i]).abs().min() < 1e-5


@pytest.mark.parametrize("term", ["identification", "ranking"])
def test_scorer_losses_reach_context_and_action_and_the_option_cuts_them(term):
    for detach in (False, True):
        objective, chunks = make_objective(detach_scorer_inputs=detach), make_chunks()
        objective.combine(objective(chunks))[term].backward()
        assert all(parameter.grad is not None for parameter in objective.scorer.parameters())
        if detach:
            assert chunks.context.grad is None
            assert chunks.action.grad is None
        else:
            assert (chunks.context.grad.abs().sum(dim=1) > 0).all()
            assert (chunks.action.grad.abs().sum(dim=1) > 0).all()


def test_weight_targets_and_queue_are_constants():
    objective = make_objective()
    train_step(objective, make_chunks(seed=1))
    samples = make_samples(6, seed=2)
    samples = replace(samples, targets=samples.targets.requires_grad_())
    chunks = make_chunks(seed=2, samples=samples)
    output = objective(chunks)
    terms = objective.combine(output)
    assert not output.weight.requires_grad
    assert not output.score.requires_grad
    action_gradient = torch.autograd.grad(
        terms["action"], [chunks.loss, chunks.context, chunks.action, *objective.scorer.parameters()],
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    torch.testing.assert_close(action_gradient[0], output.weight / output.weight.sum())
    assert all(gradient is None or (gradient == 0).all() for gradient in action_gradient[1:])
    terms["loss"].backward()
    assert samples.targets.grad is None
    assert not any(buffer.requires_grad for buffer in objective.buffers())


def test_alpha_zero_is_the_plain_mean_and_draws_no_global_noise():
    objective = make_objective(alpha=0.0)
    before = torch.get_rng_state()
    for seed in range(3):
        chunks = make_chunks(seed=seed)
        output, terms = train_step(objective, chunks)
        objective.update_controller()
        assert (output.weight == 1.0).all()
        torch.testing.assert_close(terms["action"], chunks.loss.mean())
    assert torch.equal(before, torch.get_rng_state())


def test_during_warm_up_every_weight_is_one_and_the_scorer_trains():
    objective = make_objective(warmup_steps=2)
    for step in range(4):
        output, terms = train_step(objective, make_chunks(seed=step))
        assert (output.weight == 1.0).all() == (step < 2)
        objective.zero_grad()
        terms["loss"].backward()
        assert objective.scorer.query.weight.grad.abs().sum() > 0


def test_missing_targets_and_chunks_past_the_end():
    objective = make_objective()
    chunk_valid = torch.tensor([True, True, True, True, True, False])
    samples = make_samples(6, valid=torch.tensor([True, True, True, True, False, True]))
    loss = torch.rand(6)
    loss[5] = torch.nan
    output = objective(make_chunks(samples=samples, chunk_valid=chunk_valid, loss=loss))
    assert output.target_valid.tolist() == [True] * 4 + [False] * 2
    assert output.candidates.tolist() == [4] * 4 + [0] * 2
    assert output.weight[4:].tolist() == [1.0, 0.0]
    assert (output.score[4:] == 0).all()
    terms = objective.combine(output)
    torch.testing.assert_close(terms["action"], (output.weight * loss)[:5].sum() / output.weight.sum())
    torch.testing.assert_close(terms["identification"], output.identification[:4].mean())
    objective.after_step()
    assert objective.queue.ordered()["frame"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("empty", ["targets", "chunks"])
def test_a_batch_without_targets_or_chunks_still_has_a_loss_and_gradients(empty):
    objective, none = make_objective(), torch.zeros(6, dtype=torch.bool)
    chunks = make_chunks(samples=make_samples(6, valid=none))
    chunks = chunks if empty == "targets" else replace(chunks, chunk_valid=none)
    output = objective(chunks)
    terms = objective.combine(output)
    terms["loss"].backward()
    assert terms["identification"] == terms["ranking"] == 0
    expected = chunks.loss.mean() if empty == "targets" else torch.tensor(0.0)
    torch.testing.assert_close(terms["action"], expected)
    for value in (chunks.loss, chunks.context, chunks.action, *objective.scorer.parameters()):
        assert value.grad is not None
        assert value.grad.isfinite().all()
    assert all(value.isfinite() for value in objective.metrics(output).values())
    objective.after_step()
    before = objective.controller.temperature.clone()
    objective.update_controller()
    assert objective.controller.updates == 0
    assert objective.controller.temperature == before


@pytest.mark.parametrize("where", ["context", "action", "targets", "loss", "state"])
def test_one_sample_that_is_not_finite_does_not_spread(where):
    spoilt, clean = make_objective(), make_objective()
    chunks = make_chunks(seed=3)
    bad = replace(chunks, samples=replace(chunks.samples))
    tensor = vars(bad)[where] if where in vars(bad) else vars(bad.samples)[where]
    broken = tensor.detach().clone()
    broken[2] = torch.nan
    if where in vars(bad):
        bad = replace(bad, **{where: broken.requires_grad_()})
    else:
        bad = replace(bad, samples=replace(bad.samples, **{where: broken}))
    for step in range(2):
        output = spoilt(bad)
        terms = spoilt.combine(output)
        spoilt.zero_grad()
        terms["loss"].backward()
        spoilt.after_step()
        spoilt.update_controller()
        train_step(clean, chunks)
        assert all(value.isfinite() for value in terms.values()), step
        assert all(value.isfinite() for value in spoilt.metrics(output).values())
        assert all(parameter.grad.isfinite().all() for parameter in spoilt.scorer.parameters())
        assert output.weight.isfinite().all()
        if where in ("context", "action", "targets"):
            assert output.target_valid.tolist() == [True, True, False, True, True, True]
            assert output.weight[2] == 1.0
    assert spoilt.queue.ordered()["targets"].isfinite().all()
    assert len(spoilt.queue) == (12 if where in ("loss", "state") else 10)
    assert spoilt.controller.updates == 2


def test_the_queue_is_filled_after_the_step_in_micro_step_order():
    objective = make_objective()
    objective(make_chunks(3, seed=1))
    objective(make_chunks(3, seed=2))
    assert len(objective.queue) == 0
    objective.after_step()
    assert objective.queue.ordered()["episode"].tolist() == [1] * 3 + [2] * 3
    assert objective.steps == 1
    objective.after_step()
    assert len(objective.queue) == 6
    assert objective.steps == 2


def test_micro_steps_draw_differently_and_the_same_step_draws_again():
    first, again = make_objective(), make_objective()
    rankings = []
    for objective in (first, again):
        rankings.append([objective(make_chunks(6, seed=1)).ranking for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*rankings, strict=True))
    assert not torch.equal(*rankings[0])


def test_eval_mode_leaves_no_trace():
    objective = make_objective()
    train_step(objective, make_chunks(seed=1))
    before = copy.deepcopy(objective.state_dict())
    objective.eval()
    first, second = objective(make_chunks(seed=2)), objective(make_chunks(seed=2))
    assert torch.equal(first.score, second.score)
    objective.train()
    objective.after_step()
    after = objective.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "steps")


def test_a_run_resumed_from_its_state_continues_exactly():
    straight, resumed = make_objective(warmup_steps=3), make_objective(seed=9, warmup_steps=3)
    for step in range(8):
        if step == 5:
            # in the middle of a logging window
            resumed.load_state_dict(straight.state_dict())
        ours, _ = train_step(straight, make_chunks(seed=step))
        if step >= 5:
            theirs, _ = train_step(resumed, make_chunks(seed=step))
            for name, value in vars(ours).items():
                assert value is None or torch.equal(value, vars(theirs)[name]), name
        if step in (3, 6):
            straight.update_controller()
            if step == 6:
                resumed.update_controller()
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in straight.state_dict().items())


def test_the_controller_gets_the_means_of_the_whole_window():
    objective = make_objective(queue_negatives=0)
    outputs = []
    for step in range(3):
        for micro in range(2):
            valid = torch.rand(5, generator=seeded(10 * step + micro)) < 0.7
            chunks = make_chunks(5, seed=step, samples=make_samples(5, seed=step, valid=valid))
            outputs.append(objective(replace(chunks, chunk_valid=torch.tensor([True] * 4 + [False]))))
        objective.after_step()
    objective.update_controller()
    valid = torch.cat([output.target_valid for output in outputs])
    comparable = valid & (torch.cat([output.candidates for output in outputs]) > 1)
    assert objective.controller.accuracy.item() == pytest.approx(
        torch.cat([output.correct for output in outputs])[comparable].double().mean().item()
    )
    margin = torch.cat([output.margin for output in outputs])[comparable].double().mean().item()
    assert objective.controller.margin.item() == pytest.approx(margin, abs=1e-6)
    score = torch.cat([output.score for output in outputs])[valid].double().mean().item()
    assert objective.controller.score.item() == pytest.approx(score, abs=1e-6)
    assert objective.controller.valid_ratio.item() == pytest.approx(valid.sum().item() / 24)
    assert (objective.window == 0).all()


def test_metrics_are_what_they_are_called():
    objective, filler = make_objective(), torch.zeros(6)
    weight = torch.tensor([0.25, 4.0, 4.0, 1.0, 1.0, 0.0])
    output = ObjectiveOutput(
        loss=filler, weight=weight, score=torch.tensor([-5.0, 3.0, 4.0, 0.0, 0.0, 0.0]), identification=filler,
        ranking=filler, target_valid=torch.tensor([1, 1, 1, 1, 0, 0]).bool(), ranking_valid=filler.bool(),
        chunk_valid=torch.tensor([1, 1, 1, 1, 1, 0]).bool(), entropy=torch.full((6,), 0.5), diversity=torch.full((6,), 1.5),
        correct=torch.tensor([0, 1, 1, 0, 0, 0]).bool(), margin=torch.tensor([-1.0, 2.0, 5.0, 0.0, 0.0, 0.0]),
        contrast=filler, candidates=torch.tensor([9, 9, 9, 1, 0, 0]),
    )  # fmt: skip
    values = {name: value.item() for name, value in objective.metrics(output).items()}
    kept = weight[:5].tolist()
    assert values == pytest.approx(
        {
            "accuracy": 2 / 3,
            "candidates": 9.0,
            "margin": 2.0,
            "score": 0.5,
            "weight_mean": sum(kept) / 5,
            "weight_min": 0.25,
            "weight_max": 4.0,
            "weight_at_floor": 1 / 4,
            "weight_at_ceiling": 2 / 4,
            "effective_sample_size": sum(kept) ** 2 / sum(w * w for w in kept) / 5,
            "valid_target_ratio": 4 / 5,
            "temperature": 0.12,
            "beta": 1.5,
            "hard_negative_ratio": 0.0,
            "belief_entropy": 0.5,
            "belief_diversity": 1.5,
        }
    )


def test_without_a_queue_the_batch_alone_competes():
    objective = make_objective()
    objective.queue = None
    output, _ = train_step(objective, make_chunks(5))
    assert output.candidates.tolist() == [5] * 5
    alone, terms = train_step(objective, make_chunks(1))
    assert alone.score.item() == alone.ranking.item() == terms["identification"].item() == 0
    assert alone.weight.item() == 1


def test_a_step_never_waits_for_the_device():
    objective = make_objective()
    train_step(objective, make_chunks(seed=1))
    chunks = make_chunks(32, seed=2)
    with HostReads() as seen:
        output = objective(chunks)
        objective.combine(output)["loss"].backward()
        objective.metrics(output)
        objective.after_step()
        objective.update_controller()
    assert seen.reads == []


def test_half_precision_inputs_and_casts_keep_the_method_in_float32():
    objective = make_objective().to(torch.bfloat16)
    floating = {value.dtype for value in objective.state_dict().values() if value.is_floating_point()}
    assert floating == {torch.float32, torch.float64}
    chunks = make_chunks()
    halved = replace(
        chunks,
        context=chunks.context.detach().bfloat16().requires_grad_(),
        action=chunks.action.detach().bfloat16().requires_grad_(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(halved)
        loss = objective.combine(output)["loss"]
    assert loss.dtype == output.score.dtype == output.weight.dtype == torch.float32
    loss.backward()
    assert halved.context.grad.isfinite().all()


def test_a_deep_copy_keeps_its_own_step():
    objective = make_objective(warmup_steps=1)
    train_step(objective, make_chunks())
    other = copy.deepcopy(objective)
    objective.after_step()
    assert (int(objective.steps), int(other.steps)) == (2, 1)
    other.load_state_dict(make_objective().state_dict())
    assert (other(make_chunks()).weight == 1).all()
    assert not (objective(make_chunks()).weight == 1).all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="alpha is 2"):
        make_objective(alpha=2.0)


def test_the_scorer_learns_to_identify():
    """Consequences that follow from context and action are soon picked out."""
    objective = make_objective(capacity=64, queue_negatives=32)
    mix = torch.randn(15, 8, generator=seeded(0))
    scores = []
    for step in range(80):
        source = seeded(step)
        context, action = torch.randn(16, 10, generator=source), torch.randn(16, 5, generator=source)
        targets = torch.nn.functional.normalize(torch.tanh(torch.cat([context, action], dim=1) @ mix), dim=-1)
        samples = make_samples(16, seed=step, targets=targets)
        output = objective(make_chunks(16, context=context, action=action, samples=samples))
        objective.zero_grad()
        objective.combine(output)["loss"].backward()
        for parameter in objective.scorer.parameters():
            # the step of Adam without its memory
            parameter.data.sub_(parameter.grad.sign(), alpha=5e-3)
        objective.after_step()
        scores.append(output.score.mean().item())
    assert sum(scores[-10:]) / 10 > 1.5 > 0.5 > sum(scores[:10]) / 10
    assert max(scores) < math.log(48)
