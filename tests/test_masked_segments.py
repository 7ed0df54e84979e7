"""Where many of the segments that are read hold nothing to learn from, a run says so once, and so does scoring."""

import logging
from pathlib import Path

import pytest
import torch
from bad_frames import spoiled, trainer_for
from small_policies import ptr_policy, train_batch

from ptr_hf.data.masked_segments import many_masked, saying_masked

SAYS = "are wholly masked"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    return [message for message in ours if SAYS in message]


@pytest.mark.full
def test_a_run_says_it_once(points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {("action", frame): float("nan") for frame in range(0, 112, 6)}
    trainer = trainer_for(
        "act", points, spoiled(points, tmp_path / "bad", bad), tmp_path / "out", max_steps=4, logging_steps=1
    )
    trainer.train()
    (sentence,) = said(caplog)
    assert "of the 8 segments read up to step 1" in sentence
    caplog.clear()
    trainer_for("act", points, points, tmp_path / "good", max_steps=2, logging_steps=1).train()
    assert said(caplog) == []


def test_rows_that_fill_the_last_batch_do_not_count(points: Path, tmp_path: Path) -> None:
    trainer = trainer_for("act", points, points, tmp_path / "out")
    trainer.guard.masked.discount(torch.tensor([False, True, True]))
    trainer.guard.masked.add(torch.tensor([False, True, True]))
    assert trainer.guard.masked.read(trainer.accelerator, 1) is None


def test_scoring_says_it(caplog: pytest.LogCaptureFixture) -> None:
    pads = torch.zeros(10, 8, dtype=torch.bool)
    pads[:2] = True
    assert len(list(saying_masked([{"action_is_pad": pads}] * 3))) == 3
    (sentence,) = said(caplog)
    assert sentence.startswith("6 of the 30 segments that were read")


def test_the_policy_says_it_under_lerobots_own_loop(points: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = ptr_policy("act", points, segment_length=2, consequence_offset=4, num_belief_tokens=0)
    batch = train_batch(policy, points, [0, 30, 60])
    policy(batch)
    assert said(caplog) == []
    masked = {**batch, "action_is_pad": torch.ones_like(batch["action_is_pad"])}
    for _ in range(2):
        policy(masked)
    assert len(said(caplog)) == 1


def test_a_few_are_no_matter() -> None:
    assert many_masked(1, 4, "read") is None
    assert many_masked(5, 100, "read") is None
    assert many_masked(6, 100, "read") is not None
