"""Score × Aggregation × WeightMap as the objective uses it."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from evidences import make_chunks, make_evidence, make_objective, make_table

from ptr_hf.method import Draws, conservative_weight
from ptr_hf.scores import (
    WHOLE_EPISODE,
    ActionIdentification,
    InstructionIdentification,
    OfEpisode,
    Reading,
    ScoreWeigher,
    SlotMemory,
    known_beforehand,
)

BETA = torch.tensor(1.5)
LENGTHS = (40, 30, 30, 20, 20, 20, 10, 10)


def by_episode(**options: Any) -> ScoreWeigher:
    """Small loss over the episodes of LENGTHS."""
    table = make_table(LENGTHS)
    memory = SlotMemory(len(LENGTHS), table.num_slots(WHOLE_EPISODE), 1)
    weigher = ScoreWeigher({"loss": Reading("loss")}, memory, **{"refresh_interval": 1, **options})
    weigher.lay_out(table)
    return weigher


def of_every_episode(**columns: Any) -> Any:
    return make_evidence(8, index=make_table(LENGTHS).first, **columns)


class TestThePaper:
    def paper(self) -> ScoreWeigher:
        return ScoreWeigher(
            {"posterior": Reading("posterior")},
            None,
            weight_map="paper",
            floor=0.25,
            ceiling=4.0,
            missing_future="one",
            self_weighting=False,
        )

    @pytest.mark.parametrize("options", [{}, {"warmup_steps": 2}, {"alpha": 0.5}])
    def test_its_own_score_by_this_way_gives_the_same_bits(self, options: dict[str, Any]) -> None:
        own = make_objective(**options)
        weigher = self.paper()
        weigher.alpha = options.get("alpha", 1.0)
        ours = make_objective(weigher, **options)
        for step in range(4):
            losses, gradients = [], []
            for objective in (own, ours):
                chunks = make_chunks(seed=step)
                output = objective(chunks)
                terms = objective.combine(output)
                terms["loss"].backward()
                objective.after_step()
                objective.update_controller()
                terms.pop("heads", None)
                losses.append({**terms, "weight": output.weight, "score": output.score})
                gradients.append([chunks.loss.grad, chunks.context.grad, chunks.action.grad])
            for name, value in losses[0].items():
                assert torch.equal(losses[1][name], value), (step, name)
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert losses[0]["weight"].std() > 0.1

    def test_a_missing_future_may_get_the_mean_instead_of_1(self) -> None:
        weigher = self.paper().eval()
        evidence = make_evidence(6, target_valid=torch.arange(6) != 2)
        weights = {}
        for choice in ("one", "batch"):
            weigher.missing_future = choice
            weights[choice] = weigher.weigh(evidence, BETA, True, Draws(0)).weight
        others = torch.arange(6) != 2
        expected = conservative_weight(evidence.posterior, BETA)
        assert weights["one"][2] == 1
        assert torch.equal(weights["one"][others], expected[others])
        assert torch.equal(weights["batch"][others], expected[others])
        assert weights["batch"][2].item() == pytest.approx(float(expected[others].mean()))

    def test_nothing_known_at_all_is_1(self) -> None:
        weigher = self.paper().eval()
        weigher.missing_future = "batch"
        evidence = make_evidence(4, target_valid=torch.zeros(4, dtype=torch.bool))
        assert weigher.weigh(evidence, BETA, True, Draws(0)).weight.tolist() == [1.0] * 4


class TestMemory:
    def test_weights_are_1_until_the_warmup_is_over(self) -> None:
        weigher = by_episode()
        evidence = of_every_episode()
        for step in range(1, 5):
            weight = weigher.weigh(evidence, BETA, step > 3, Draws(0)).weight
            assert weight.tolist() == [1.0] * 8
            weigher.after_step(step, step >= 4)
        assert weigher.weigh(evidence, BETA, True, Draws(0)).weight.std() > 0.1

    def test_an_episodes_weight_follows_the_mean_of_its_losses(self) -> None:
        weigher = by_episode()
        for step in range(1, 6):
            weigher.weigh(of_every_episode(loss=torch.arange(8.0) + step % 2), BETA, True, Draws(0))
            weigher.after_step(step, True)
        weight = weigher.weigh(of_every_episode(), BETA, True, Draws(0)).weight
        assert (weight.diff() <= 0).all()
        assert weight[0].item() == pytest.approx(4.0)
        # median 4 and median distance 2 of the losses 0 to 7
        assert weight[4].item() == pytest.approx(1.0)
        assert weight[7].item() == pytest.approx(math.exp(-3 * 3 / (1.4826 * 2)), rel=1e-4)

    def test_it_is_read_at_every_refresh(self) -> None:
        weigher = by_episode(refresh_interval=3)
        seen = []
        for step in range(1, 7):
            weigher.weigh(of_every_episode(seed=step), BETA, True, Draws(0))
            weigher.after_step(step, True)
            seen.append(weigher.memory.weight.clone())
        changed = [bool((after != before).any()) for before, after in pairwise(seen)]
        assert changed == [False, True, False, False, True]

    def test_a_step_of_several_micro_batches_is_remembered_whole(self) -> None:
        one, several = by_episode(), by_episode()
        evidence = of_every_episode()
        one.weigh(evidence, BETA, True, Draws(0))
        for rows in (slice(0, 3), slice(3, 8)):
            part = make_evidence(8, index=make_table(LENGTHS).first)
            keep = torch.zeros(8, dtype=torch.bool)
            keep[rows] = True
            several.weigh(type(part)(**{**vars(part), "chunk_valid": keep}), BETA, True, Draws(0))
        for weigher in (one, several):
            weigher.after_step(1, True)
        assert torch.equal(one.memory.mean[:, 0], several.memory.mean[:, 0])
        assert torch.equal(one.memory.weight, several.memory.weight)

    def test_chunks_past_the_end_are_not_remembered(self) -> None:
        weigher = by_episode()
        weigher.weigh(of_every_episode(chunk_valid=torch.arange(8) < 5), BETA, True, Draws(0))
        weigher.after_step(1, True)
        assert weigher.memory.count[:, 0].tolist() == [1.0] * 5 + [0.0] * 3

    def test_evaluation_neither_remembers_nor_weighs(self) -> None:
        weigher = by_episode()
        for step in range(1, 4):
            weigher.weigh(of_every_episode(), BETA, True, Draws(0))
            weigher.after_step(step, True)
        weigher.eval()
        before = {name: value.clone() for name, value in weigher.state_dict().items()}
        # another dataset's episodes, more than the memory has
        other = make_evidence(20, index=1000 * torch.arange(20))
        assert weigher.weigh(other, BETA, True, Draws(0)).weight.tolist() == [1.0] * 20
        weigher.after_step(4, True)
        for name, value in weigher.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_training_on_unknown_episodes_is_refused(self) -> None:
        weigher = ScoreWeigher({"loss": Reading("loss")}, SlotMemory(0, 0, 1))
        with pytest.raises(ValueError, match=r"episodes to be weighed are unknown: call PTRPolicy.set_episodes"):
            weigher.weigh(make_evidence(4), BETA, False, Draws(0))
        assert weigher.eval().weigh(make_evidence(4), BETA, True, Draws(0)).weight.tolist() == [1.0] * 4

    @pytest.mark.parametrize("choice", ["one", "episode", "batch"])
    def test_a_chunk_without_a_verdict(self, choice: str) -> None:
        weigher = by_episode(missing_future=choice)
        for step in range(1, 4):
            weigher.weigh(of_every_episode(loss=torch.arange(8.0)), BETA, True, Draws(0))
            weigher.after_step(step, True)
        loss = torch.arange(8.0)
        loss[6] = torch.nan
        weight = weigher.weigh(of_every_episode(loss=loss), BETA, True, Draws(0)).weight
        known = torch.arange(8) != 6
        assert torch.equal(weight[known], weigher.memory.weight[known])
        expected = {"one": 1.0, "episode": weigher.memory.weight[6], "batch": weight[known].mean()}
        assert weight[6].item() == pytest.approx(float(expected[choice]))
        assert weigher.memory.weight[6] < 0.2


class TestMaps:
    def test_slots_that_nobody_knows_get_the_mean_weight(self) -> None:
        weigher = by_episode()
        values = torch.arange(8.0)[:, None]
        values[3] = torch.nan
        weight = weigher.slot_weights(values, torch.zeros(8, dtype=torch.int64))
        known = torch.arange(8) != 3
        assert weight[3].item() == pytest.approx(float(weight[known].mean()))
        nothing = torch.full((8, 1), torch.nan)
        assert weigher.slot_weights(nothing, torch.zeros(8, dtype=torch.int64)).tolist() == [1.0] * 8

    @pytest.mark.parametrize("weight_map", ["paper", "rejection", "exponential", "calibrated"])
    def test_every_map_rises_stays_in_bounds_and_obeys_alpha(self, weight_map: str) -> None:
        values = torch.linspace(-3, 3, 41)[:, None]
        group = torch.zeros(41, dtype=torch.int64)
        weight = by_episode(weight_map=weight_map).slot_weights(values, group)
        assert (weight.diff() >= 0).all()
        assert weight.min() >= 0.02 - 1e-6
        assert weight.max() <= 4.0
        assert weight[-1] > 1.5 * weight[0]
        half = by_episode(weight_map=weight_map, alpha=0.5).slot_weights(values, group)
        torch.testing.assert_close(half, 1 + 0.5 * (weight - 1))

    def test_the_exponential_map_of_several_scores(self) -> None:
        table = make_table(LENGTHS)
        memory = SlotMemory(8, 8, 2)
        weigher = ScoreWeigher({"loss": Reading("loss"), "motion": Reading("motion")}, memory, refresh_interval=1)
        weigher.lay_out(table)
        assert weigher.names == ("loss", "motion")
        evidence = of_every_episode()
        verdicts = weigher.weigh(evidence, BETA, True, Draws(0)).verdicts
        torch.testing.assert_close(verdicts, torch.stack([-evidence.loss, evidence.motion], dim=1))
        weigher.after_step(1, True)
        middle = verdicts.sort(dim=0).values[3]
        spread = 1.4826 * (verdicts - middle).abs().sort(dim=0).values[3]
        z = ((verdicts - middle) / spread).clamp(-8, 8)
        torch.testing.assert_close(memory.weight, torch.exp(3 * z.sum(dim=1) / 2**0.5).clamp(0.02, 4.0))

    def test_groups_are_compared_apart(self) -> None:
        table = make_table((10,) * 12, groups=(0, 1) * 6)
        memory = SlotMemory(12, 12, 1)
        weigher = ScoreWeigher({"loss": Reading("loss")}, memory, refresh_interval=1)
        weigher.lay_out(table)
        # the second group's losses are all higher, and that is how it is
        loss = torch.arange(12.0) // 2 + torch.tensor([0.0, 100.0]).repeat(6)
        weigher.weigh(make_evidence(12, loss=loss, index=table.first), BETA, True, Draws(0))
        weigher.after_step(1, True)
        torch.testing.assert_close(memory.weight[::2], memory.weight[1::2])


class TestHeads:
    def weigher(self, **options: Any) -> ScoreWeigher:
        torch.manual_seed(0)
        scores = {
            "action_identification": ActionIdentification(6, 6, 16),
            "instruction_identification": InstructionIdentification(6, 2, 16),
        }
        memory = SlotMemory(8, 8, 2)
        weigher = ScoreWeigher(scores, memory, **options)
        weigher.lay_out(make_table(LENGTHS))
        return weigher

    def test_their_losses_add_up_and_are_weighted_by_what_is_trusted(self) -> None:
        weigher = self.weigher()
        weigher.memory.weight.copy_(torch.linspace(0.02, 4, 8))
        evidence = of_every_episode(target_valid=torch.arange(8) != 2, chunk_valid=torch.arange(8) != 7)
        weighing = weigher.weigh(evidence, BETA, True, Draws(0))
        parts = [score(evidence, Draws(0)).loss for score in weigher.scores.values()]
        torch.testing.assert_close(weighing.head_loss, sum(parts))
        learns = (torch.arange(8) != 2) & (torch.arange(8) != 7)
        torch.testing.assert_close(weighing.head_weight, weigher.memory.weight * learns)
        weigher.self_weighting = False
        assert torch.equal(weigher.weigh(evidence, BETA, True, Draws(0)).head_weight, learns.float())

    def test_verdicts_are_remembered_in_the_order_of_the_names(self) -> None:
        weigher = self.weigher()
        evidence = of_every_episode()
        weighing = weigher.weigh(evidence, BETA, True, Draws(0))
        weigher.after_step(1, True)
        assert weigher.names == ("action_identification", "instruction_identification")
        torch.testing.assert_close(weigher.memory.mean, weighing.verdicts)
        assert weighing.verdicts.isfinite().all()
        assert weighing.nulls.isfinite().all()

    def test_only_their_own_gradients_flow(self) -> None:
        objective = make_objective(ScoreWeigher({"action_identification": ActionIdentification(8, 6, 16)}, None,
                                                weight_map="paper", floor=0.25))  # fmt: skip
        chunks = make_chunks()
        terms = objective.combine(objective(chunks))
        terms["heads"].backward(retain_graph=True)
        for given in (chunks.context, chunks.action, chunks.loss):
            assert given.grad is None or given.grad.eq(0).all()
        assert any(p.grad.norm() > 0 for p in objective.weigher.parameters())
        torch.testing.assert_close(
            terms["loss"],
            terms["action"]
            + 0.05 * terms["identification"]
            + 0.25 * terms["ranking"]
            + terms["tokenizer"]
            + terms["heads"],
        )


def test_what_is_known_before_training_is_laid_out() -> None:
    weigher = ScoreWeigher(
        {"random": OfEpisode(torch.zeros(8)), "length": OfEpisode(torch.zeros(8))}, SlotMemory(8, 8, 2)
    )
    table = make_table(LENGTHS)
    weigher.lay_out(table, seed=5)
    assert torch.equal(weigher.scores["random"].values, known_beforehand("random", table, 5))
    assert weigher.scores["length"].values.tolist() == [float(length) for length in LENGTHS]
