"""Which action, which instruction, belongs to what happened? On data where y - z follows from the action and the task."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from evidences import make_evidence, rows_of, seeded
from torch import Tensor

from ptr_hf.method import Draws
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores import ActionIdentification, InstructionIdentification
from ptr_hf.scores.identification import CrossFitted, fold

EPISODES, CHUNKS, TASKS = 80, 6, 4


@pytest.fixture(scope="module")
def world() -> tuple[Evidence, Tensor]:
    """Episodes in which the action moves the scene and the task pulls at it, and which of them are mislabelled.

    The first tenth of the episodes records the negated action, the second tenth another task.
    """
    source = seeded(0)
    rows = EPISODES * CHUNKS
    episode = torch.arange(rows) // CHUNKS
    action = torch.randn(rows, 3, generator=source)
    task = torch.randint(TASKS, (EPISODES,), generator=source)[episode]
    pull = 2.0 * torch.randn(TASKS, 4, generator=source)
    current = torch.randn(rows, 7, generator=source)
    change = torch.cat([action, pull[task]], dim=1) + 0.1 * torch.randn(rows, 7, generator=source)
    kind = (episode < EPISODES // 10).long() + 2 * ((episode >= EPISODES // 10) & (episode < EPISODES // 5)).long()
    recorded = torch.where((kind == 1)[:, None], -action, action)
    evidence = make_evidence(
        rows,
        dim=7,
        action=recorded[:, None],
        current=current,
        target=current + change,
        task=torch.where(kind == 2, (task + 1) % TASKS, task),
        episode=episode,
    )
    return evidence, kind


def trained(score: CrossFitted, evidence: Evidence, steps: int = 250) -> CrossFitted:
    torch.manual_seed(0)
    for head in score.heads:
        for layer in head.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
    optimizer, source = torch.optim.AdamW(score.parameters(), lr=3e-3), seeded(1)
    for step in range(steps):
        batch = rows_of(evidence, torch.randperm(len(evidence.loss), generator=source)[:48])
        optimizer.zero_grad()
        score(batch, Draws(step)).loss.mean().backward()
        optimizer.step()
    return score


@pytest.fixture(scope="module")
def actions(world: tuple[Evidence, Tensor]) -> ActionIdentification:
    return trained(ActionIdentification(7, 3, hidden_dim=32), world[0])


@pytest.fixture(scope="module")
def instructions(world: tuple[Evidence, Tensor]) -> InstructionIdentification:
    return trained(InstructionIdentification(7, TASKS, hidden_dim=32), world[0])


def judged(score: CrossFitted, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Verdicts and nulls of all chunks, compared in mixed batches."""
    order = torch.randperm(len(evidence.loss), generator=seeded(2))
    value, null = torch.empty(2, len(order))
    with torch.no_grad():
        for rows in order.split(48):
            scored = score(rows_of(evidence, rows), Draws(3))
            assert scored.valid.all()
            value[rows], null[rows] = scored.value, scored.null
    return value, null


@pytest.mark.full
def test_t_a_finds_flipped_actions_and_overlooks_wrong_tasks(actions, world) -> None:
    evidence, kind = world
    value, null = judged(actions, evidence)
    clean, flipped, wrong_task = (value[kind == number] for number in range(3))
    # medians: a head that is sure of a wrong action is wrong by tens of nats
    assert clean.median() > 1.2
    assert flipped.median() < -1.0
    assert wrong_task.median() > 1.2
    assert (clean[:, None] > flipped).float().mean() > 0.9
    # on another chunk's action the head knows that it is not this one
    assert null[kind == 0].mean() < 0


def test_t_l_finds_wrong_tasks_and_overlooks_flipped_actions(instructions, world) -> None:
    evidence, kind = world
    value, null = judged(instructions, evidence)
    clean, flipped, wrong_task = (value[kind == number] for number in range(3))
    assert clean.mean() > 0.7
    assert flipped.mean() > 0.7
    assert wrong_task.mean() < -0.5
    assert null[kind == 0].mean() < -0.5
    assert value.max() <= torch.tensor(float(TASKS)).log() + 1e-5


@pytest.mark.full
def test_no_verdict_beyond_chance_where_consequences_are_noise(world) -> None:
    evidence, _ = world
    noise = replace(evidence, target=torch.randn(evidence.target.shape, generator=seeded(5)))
    value, _ = judged(trained(ActionIdentification(7, 3, hidden_dim=32), noise, steps=100), noise)
    assert value.mean() < 0.05


class TestCrossFitting:
    KINDS: ClassVar[dict[str, Callable[[bool], CrossFitted]]] = {
        "actions": lambda cross_fit: ActionIdentification(6, 6, 16, cross_fit),
        "instructions": lambda cross_fit: InstructionIdentification(6, 2, 16, cross_fit),
    }

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("number", [0, 1])
    def test_a_folds_rows_teach_only_the_other_folds_head(self, kind: str, number: int) -> None:
        score, evidence = self.KINDS[kind](True), make_evidence(12)
        rows = fold(evidence.episode) == number
        assert 0 < rows.sum() < 12
        score(evidence, Draws(0)).loss[rows].sum().backward()
        norms = [sum(float(p.grad.norm()) for p in head.parameters() if p.grad is not None) for head in score.heads]
        assert norms[number] == 0
        assert norms[1 - number] > 1e-3

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("number", [0, 1])
    def test_a_folds_verdicts_are_its_own_heads(self, kind: str, number: int) -> None:
        score, evidence = self.KINDS[kind](True), make_evidence(12)
        rows = fold(evidence.episode) == number
        before = score(evidence, Draws(0)).value
        with torch.no_grad():
            for parameter in score.heads[1 - number].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=seeded(9)))
        after = score(evidence, Draws(0)).value
        assert torch.equal(after[rows], before[rows])
        assert not torch.allclose(after[~rows], before[~rows])

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_it_one_head_learns_from_and_judges_all(self, kind: str) -> None:
        score, evidence = self.KINDS[kind](False), make_evidence(12)
        assert len(score.heads) == 1
        scored = score(evidence, Draws(0))
        scored.loss[:1].sum().backward()
        assert any(float(p.grad.norm()) > 0 for p in score.parameters())

    def test_both_folds_hold_about_half_of_the_episodes(self) -> None:
        numbers = fold(torch.arange(300))
        assert set(numbers.tolist()) == {0, 1}
        assert abs(float(numbers.float().mean()) - 0.5) < 0.05

    def test_the_policy_is_never_reached(self) -> None:
        columns = {name: torch.randn(12, 6).requires_grad_() for name in ("current", "target")}
        score, evidence = ActionIdentification(6, 6, 16), make_evidence(12, **columns)
        scored = score(evidence, Draws(0))
        assert not scored.value.requires_grad
        assert not scored.null.requires_grad
        assert scored.loss.requires_grad


class TestWithoutAnswer:
    def test_a_single_task_says_nothing(self) -> None:
        score = InstructionIdentification(6, 1, 16)
        scored = score(make_evidence(8, task=torch.zeros(8, dtype=torch.int64)), Draws(0))
        assert not scored.valid.any()
        assert scored.loss.eq(0).all()

    def test_a_task_that_the_head_does_not_know_says_nothing(self) -> None:
        scored = InstructionIdentification(6, 2, 16)(make_evidence(4, task=torch.tensor([0, 1, 2, 7])), Draws(0))
        assert scored.valid.tolist() == [True, True, False, False]
        assert scored.loss[2:].eq(0).all()

    def test_chunks_without_a_future_neither_learn_nor_compete(self) -> None:
        score, known = ActionIdentification(6, 6, 16), torch.arange(10) < 6
        evidence = make_evidence(10, target_valid=known)
        scored = score(evidence, Draws(0))
        assert torch.equal(scored.valid, known)
        assert scored.loss[~known].eq(0).all()
        assert scored.loss.isfinite().all()
        alone = score(rows_of(evidence, known), Draws(0))
        torch.testing.assert_close(scored.value[known], alone.value)
        torch.testing.assert_close(scored.loss[known], alone.loss)

    @pytest.mark.parametrize("usable", [0, 1])
    def test_nobody_to_compare_with(self, usable: int) -> None:
        score = ActionIdentification(6, 6, 16)
        scored = score(make_evidence(5, target_valid=torch.arange(5) < usable), Draws(0))
        assert not scored.valid.any()
        assert scored.loss.eq(0).all()
        scored.loss.sum().backward()
        assert all(p.grad.isfinite().all() for p in score.parameters() if p.grad is not None)

    def test_guessing_is_0(self) -> None:
        score = ActionIdentification(6, 6, 16)
        with torch.no_grad():
            for parameter in score.parameters():
                parameter.zero_()
        scored = score(make_evidence(9), Draws(0))
        torch.testing.assert_close(scored.value, torch.zeros(9))
        torch.testing.assert_close(scored.null, torch.zeros(9))
