"""Eq. 30 bounds the shares of sources by the weights that were given, and says nothing where one of them is 0."""

import numpy as np
import pytest

from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.publishing.model_card import _share_bounds
from ptr_hf.scores import FrameWeights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([0.5, 1.0, 2.0], (0.5, 2.0)), ([0.0, 1.0], (0.0, 1.0)), ([0.25, 0.5], (0.25, 1.0)), ([1.0, 1.0], (1.0, 1.0))],
)
def test_the_range_of_weights(weights: list[float], expected: tuple[float, float]) -> None:
    assert FrameWeights.of_array(np.array(weights)).range == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [({"smallest": 0.5, "largest": 2.0}, (0.25, 4.0)), ({"smallest": 0.0, "largest": 1.0}, None), ({}, None)],
)
def test_the_card_states_no_bound_that_does_not_hold(record: dict[str, float], expected: tuple | None) -> None:
    config = PTRHyperparameters(weights="weights.csv")
    config.weights_record = record  # type: ignore[attr-defined]
    assert _share_bounds(config) == expected
