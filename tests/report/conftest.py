"""A finished SFT run beside a finished PTR run, and a scored dataset whose truth is known."""

from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import ptr_rows, sft_rows

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import Dynamics, DynamicsLog, read_dynamics

KINDS = ("clean", "noise", "truncation", "wrong_instruction")


@pytest.fixture
def dynamics(tmp_path: Path) -> Dynamics:
    path = tmp_path / "ptr_dynamics.parquet"
    DynamicsLog(path, run="sft").append(*sft_rows())
    DynamicsLog(path, run="ptr").append(*ptr_rows())
    return read_dynamics(path)


@pytest.fixture
def truth() -> dict[int, str]:
    return {episode: KINDS[0] if episode % 2 else KINDS[1 + episode // 2 % 3] for episode in range(60)}


@pytest.fixture
def scores(truth: dict[int, str]) -> ChunkScores:
    """Sixty episodes of ten chunks, the last without a future; wrong instructions are detected, truncation is not."""
    draw = np.random.default_rng(2)
    quality = {"clean": 2.0, "noise": 0.6, "truncation": 1.9, "wrong_instruction": -1.2}
    episode = np.repeat(np.arange(60), 10)
    valid = np.tile(np.arange(10) < 9, 60)
    level = np.array([quality[truth[index]] for index in range(60)]) + draw.normal(0, 0.35, 60)
    score = np.where(valid, level[episode] + draw.normal(0, 0.9, 600), 0.0)
    return ChunkScores(
        index=np.arange(600),
        episode_index=episode,
        frame_index=np.tile(np.arange(10) * 16, 60),
        task=np.array([f"put the {('cup', 'plate', 'spoon')[index % 3]} away" for index in episode], dtype=object),
        source=np.full(600, "lab/demos", dtype=object),
        target_valid=valid,
        score=score,
        weight=np.where(valid, np.clip(np.exp(score / 1.3), 0.25, 4.0), 1.0),
        loss=draw.gamma(2.0, 0.05, 600),
    )
