"""The controls say what they claim to know, and nothing of what they cannot."""

import pytest
import torch
from evidences import make_evidence, make_table

from ptr_hf.method import Draws
from ptr_hf.scores import OfEpisode, Reading, known_beforehand

EVIDENCE = make_evidence(
    6,
    loss=torch.tensor([0.5, 2.0, torch.nan, 0.1, 1.0, 0.0]),
    chunk_valid=torch.arange(6) != 3,
    target_valid=torch.arange(6) != 1,
    contrast_valid=torch.arange(6) > 1,
)
INSIDE = [True, True, True, False, True, True]


def test_uniform_is_0_everywhere() -> None:
    scored = Reading("uniform")(EVIDENCE, Draws(0))
    assert scored.value.tolist() == [0.0] * 6
    assert scored.valid.tolist() == INSIDE
    assert scored.loss is None
    assert scored.null is None


def test_small_losses_are_good_and_a_broken_one_says_nothing() -> None:
    scored = Reading("loss")(EVIDENCE, Draws(0))
    assert scored.value[[0, 1, 4]].tolist() == [-0.5, -2.0, -1.0]
    assert scored.valid.tolist() == [True, True, False, False, True, True]


def test_motion() -> None:
    scored = Reading("motion")(EVIDENCE, Draws(0))
    assert torch.equal(scored.value, EVIDENCE.motion)
    assert scored.valid.tolist() == INSIDE


def test_what_the_papers_scorer_says() -> None:
    posterior, margin = Reading("posterior")(EVIDENCE, Draws(0)), Reading("action_margin")(EVIDENCE, Draws(0))
    assert torch.equal(posterior.value, EVIDENCE.posterior)
    assert torch.equal(posterior.valid, EVIDENCE.target_valid)
    assert torch.equal(margin.value, EVIDENCE.contrast)
    assert torch.equal(margin.valid, EVIDENCE.contrast_valid)


class TestKnownBeforehand:
    TABLE = make_table((30, 24, 40))

    def test_length(self) -> None:
        assert known_beforehand("length", self.TABLE, 0).tolist() == [30.0, 24.0, 40.0]

    def test_oracle_rejects_what_the_truth_calls_corrupted(self) -> None:
        self.TABLE.corrupted[1] = True
        try:
            values = known_beforehand("oracle", self.TABLE, 0)
        finally:
            self.TABLE.corrupted[1] = False
        assert values.tolist() == [0.0, -100.0, 0.0]

    def test_random_depends_on_the_seed_alone(self) -> None:
        torch.manual_seed(1)
        first = known_beforehand("random", self.TABLE, 3)
        torch.manual_seed(2)
        assert torch.equal(known_beforehand("random", self.TABLE, 3), first)
        assert not torch.equal(known_beforehand("random", self.TABLE, 4), first)
        many = known_beforehand("random", make_table((5,) * 2000), 0)
        assert abs(float(many.mean())) < 0.1
        assert abs(float(many.std()) - 1) < 0.1

    def test_another_score_is_not(self) -> None:
        with pytest.raises(ValueError, match=r"'motion' is not known before training; random, length and oracle are"):
            known_beforehand("motion", self.TABLE, 0)

    def test_each_chunk_gets_its_episodes_number(self) -> None:
        score = OfEpisode(torch.tensor([7.0, 8.0, 9.0]))
        evidence = make_evidence(4, episode=torch.tensor([2, 0, 2, 1]))
        assert score(evidence, Draws(0)).value.tolist() == [9.0, 7.0, 9.0, 8.0]

    def test_an_episode_of_other_data_has_none(self) -> None:
        score = OfEpisode(torch.tensor([7.0, 8.0]))
        scored = score(make_evidence(3, episode=torch.tensor([1, 2, 50])), Draws(0))
        assert scored.valid.tolist() == [True, False, False]
        assert scored.value[0].item() == 8.0
