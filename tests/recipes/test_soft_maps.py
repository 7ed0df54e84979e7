"""The maps that were tried on top of rejection change what they claim to; nothing is trained here."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.corruption import soft_maps
from ptr_hf.scoring.dataset_scores import DatasetScores

QUESTIONS = (*soft_maps.LEARNED, "roughness")
EPISODES, FRAMES = 16, 3


def scores(weight: np.ndarray, z: dict[str, np.ndarray]) -> DatasetScores:
    """Of 16 episodes of one task with three frames each."""
    asked = {name: z.get(name, np.zeros(EPISODES)) for name in QUESTIONS}
    table = {"episode_index": np.arange(EPISODES), "weight": weight, "task": "reach", **asked}
    frames = {"episode_index": np.repeat(np.arange(EPISODES), FRAMES), "weight": np.repeat(weight, FRAMES)}
    settings = {"questions": dict.fromkeys(QUESTIONS, ""), "weight_min": 0.02}
    return DatasetScores(pd.DataFrame(frames), pd.DataFrame(table), settings)


def test_without_a_flag_every_map_leaves_every_weight_at_1() -> None:
    found = soft_maps.soft_maps(scores(np.ones(EPISODES), {"instruction": np.linspace(-2, 2, EPISODES)}))
    assert set(found) == {"exp", "thin", "keep"}
    assert all((weight == 1).all() for weight in found.values())


def test_each_map_moves_what_it_says() -> None:
    weight = np.ones(EPISODES)
    weight[:2] = 0.02
    short = np.where(np.arange(EPISODES) == 0, -5.0, 0.0)
    rough = np.where(np.arange(EPISODES) == 1, -5.0, 0.0)
    hard = np.linspace(-2, 2, EPISODES)
    found = soft_maps.soft_maps(scores(weight, {"completeness": short, "roughness": rough, "instruction": hard}))
    by_episode = {name: value.reshape(EPISODES, FRAMES) for name, value in found.items()}
    for value in by_episode.values():
        assert (value == value[:, :1]).all()
    assert by_episode["keep"][:, 0] == pytest.approx([1, 0.02, *[1] * 14])
    assert by_episode["exp"][:2, 0] == pytest.approx(0.02)
    rest = by_episode["exp"][2:, 0]
    assert (np.diff(rest) >= 0).all()
    assert (rest.min(), rest.max()) == (pytest.approx(0.505, abs=0.05), pytest.approx(1.95, abs=0.2))
    assert by_episode["thin"][:, 0] == pytest.approx([0.02, 0.02, 0.5, 2 / 3, 5 / 6, *[1] * 11])
