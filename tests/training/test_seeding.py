"""The starting weights are the seed's, whatever was drawn before."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_policies import base_policy, tensors_equal

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.training.seeding import seeded


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


def test_what_is_drawn_afterwards_is_not_changed() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def start() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    start()
    expected = draws()
    start()
    with seeded(0):
        inside = draws()
    assert draws() == expected
    with seeded(0):
        assert draws() == inside
