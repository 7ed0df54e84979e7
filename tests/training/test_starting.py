"""How a run starts: weights that depend on the seed alone, options that are what was given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policies import base_policy, tensors_equal

from ptr_hf import PTRTrainer, PTRTrainingArguments


def starting_weights(folder: Path, points: Path, fresh: bool, seed: int, **settings: Any) -> dict[str, torch.Tensor]:
    base = base_policy("act", points)
    model = base.config if fresh else base
    args = PTRTrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        report_to="none",
        segment_length=2,
        queue_size=0,
        queue_negatives=0,
        **settings,
    )
    return PTRTrainer(model, args, points).policy.state_dict()


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "fresh"),
    [({"preset": "ptr"}, False), ({"preset": "ptr_calibrated"}, False), ({"preset": "sft"}, True)],
    ids=["ptr", "ptr_calibrated", "a configuration"],
)
def test_starting_weights_depend_on_the_seed_alone(
    tmp_path: Path, points: Path, settings: dict[str, Any], fresh: bool
) -> None:
    found = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        np.random.seed(drawn)
        found.append(starting_weights(tmp_path, points, fresh, 5, **settings))
    assert tensors_equal(*found)
    assert not tensors_equal(found[0], starting_weights(tmp_path, points, fresh, 6, **settings))


@pytest.mark.full
def test_the_papers_score_under_another_presets_map(tmp_path: Path, points: Path) -> None:
    """What is given is also what trains."""
    options = {"max_steps": 4, "logging_steps": 1, "segment_length": 2, "score_refresh_steps": 1, "queue_size": 0}
    args = PTRTrainingArguments(
        output_dir=str(tmp_path),
        preset="ptr_calibrated",
        score="posterior",
        queue_negatives=0,
        scorer_warmup_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = PTRTrainer(base_policy("act", points), args, points)
    trainer.train()
    config = trainer.policy.config
    assert (config.preset, config.score, config.weight_map) == ("ptr_calibrated", "posterior", "calibrated")
    assert set(trainer.policy.objective.weigher.scores) == {"posterior"}
    rows = [row for row in trainer.state.log_history if "weight_mean" in row]
    assert len(rows) == 4
    assert all(row["loss"] == row["loss"] for row in rows)


@pytest.mark.full
def test_a_warm_up_as_long_as_the_run_is_said(tmp_path: Path, points: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = PTRTrainingArguments(
        output_dir=str(tmp_path),
        preset="ptr",
        max_steps=1,
        scorer_warmup_steps=3000,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    PTRTrainer(base_policy("act", points), args, points).train()
    assert "The scorer's warm-up of 3000 steps is not shorter than the run of 1: every weight stays 1." in caplog.text
