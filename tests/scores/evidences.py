"""What the tests of the scores build again and again: evidence, and data whose consequences follow from actions."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ptr_hf.method import (
    AdaptiveScaleController,
    CandidateQueue,
    ChunkBatch,
    ObjectiveConfig,
    PTRObjective,
    Samples,
    TransitionScorer,
)
from ptr_hf.method.evidence import Evidence, Weigher
from ptr_hf.scores import EpisodeTable


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_evidence(rows: int, seed: int = 0, dim: int = 6, **columns: Any) -> Evidence:
    """Chunks at random; any column can be given. Every chunk starts an episode of its own."""
    source = seeded(seed)
    values: dict[str, Any] = {
        "loss": torch.rand(rows, generator=source),
        "action": torch.randn(rows, 2, 3, generator=source),
        "current": torch.randn(rows, dim, generator=source),
        "target": torch.randn(rows, dim, generator=source),
        "target_valid": torch.ones(rows, dtype=torch.bool),
        "chunk_valid": torch.ones(rows, dtype=torch.bool),
        "posterior": torch.randn(rows, generator=source),
        "contrast": torch.randn(rows, generator=source),
        "contrast_valid": torch.ones(rows, dtype=torch.bool),
        "motion": torch.rand(rows, generator=source),
        "task": torch.arange(rows) % 2,
        "episode": torch.arange(rows),
        "index": 10 * torch.arange(rows),
    }
    return Evidence(**(values | columns))


def rows_of(evidence: Evidence, rows: Tensor) -> Evidence:
    """Some of the rows."""
    return replace(
        evidence, **{item.name: vars(evidence)[item.name][rows] for item in fields(Evidence) if item.name != "among"}
    )


def make_table(lengths: tuple[int, ...], groups: tuple[int, ...] | None = None, num_tasks: int = 2) -> EpisodeTable:
    """Episodes one after the other; all in one group unless said otherwise."""
    length = torch.tensor(lengths)
    group = torch.tensor(groups) if groups else torch.zeros_like(length)
    return EpisodeTable(length.cumsum(0) - length, length, group, torch.zeros_like(length, dtype=torch.bool), num_tasks)


def make_objective(weigher: Weigher | None = None, seed: int = 0, **options: Any) -> PTRObjective:
    """The paper's objective, small; the same weights for every weigher."""
    torch.manual_seed(seed)
    parts = TransitionScorer(10, 5, 8, hidden_dim=16), CandidateQueue(32, 8, 3), AdaptiveScaleController()
    warmup = options.pop("warmup_steps", 0)
    config = ObjectiveConfig(**({"queue_negatives": 8} | options))
    return PTRObjective(*parts, config, weigher=weigher, warmup_steps=warmup)


def make_chunks(rows: int = 8, seed: int = 0) -> ChunkBatch:
    """A step's chunks with all that a weigher reads; the third has no future, the last lies past its episode."""
    source = seeded(seed + 100)
    count = torch.arange(rows)
    samples = Samples(
        targets=torch.nn.functional.normalize(torch.randn(rows, 8, generator=source), dim=-1),
        valid=count != 2,
        task=count % 2,
        source=torch.zeros_like(count),
        episode=count // 2,
        frame=count,
        state=torch.randn(rows, 3, generator=source),
    )
    return ChunkBatch(
        loss=torch.rand(rows, generator=source).requires_grad_(),
        context=torch.randn(rows, 10, generator=source).requires_grad_(),
        action=torch.randn(rows, 5, generator=source).requires_grad_(),
        samples=samples,
        chunk_valid=count < rows - 1,
        entropy=torch.full((rows,), 0.3),
        diversity=torch.full((rows,), 1.7),
        stretches=torch.randn(rows, 2, 3, generator=source),
        current=torch.randn(rows, 8, generator=source),
        motion=torch.rand(rows, generator=source),
        index=8 * count,
    )
