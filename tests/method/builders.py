"""What the tests of the method build again and again."""

import math
from typing import Any

import torch
from hypothesis import settings
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ptr_hf.method import (
    AdaptiveScaleController,
    CandidateQueue,
    ChunkBatch,
    ObjectiveConfig,
    PTRObjective,
    Samples,
    TransitionScorer,
)

property_test = settings(max_examples=40)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Float[Tensor, "{rows} {dim}"]:
    return functional.normalize(torch.randn(rows, dim, generator=seeded(seed), dtype=dtype), dim=-1)


def make_samples(rows: int, dim: int = 8, seed: int = 0, state_dim: int = 3, **columns: Any) -> Samples:
    """Samples of as many different frames; any column can be given."""
    count = torch.arange(rows)
    values: dict[str, Any] = {
        "targets": unit_rows(rows, dim, seed),
        "valid": torch.ones(rows, dtype=torch.bool),
        "task": count % 2,
        "source": torch.zeros_like(count),
        "episode": torch.full_like(count, seed),
        "frame": count,
        "state": torch.randn(rows, state_dim, generator=seeded(seed + 1)),
    }
    return Samples(**(values | columns))


def make_chunks(rows: int = 6, seed: int = 0, context_dim: int = 10, action_dim: int = 5, **columns: Any) -> ChunkBatch:
    source = seeded(seed + 100)
    values: dict[str, Any] = {
        "loss": torch.rand(rows, generator=source).requires_grad_(),
        "context": torch.randn(rows, context_dim, generator=source).requires_grad_(),
        "action": torch.randn(rows, action_dim, generator=source).requires_grad_(),
        "samples": make_samples(rows, seed=seed),
        "chunk_valid": torch.ones(rows, dtype=torch.bool),
        "entropy": torch.full((rows,), 0.3),
        "diversity": torch.full((rows,), 1.7),
    }
    return ChunkBatch(**(values | columns))


def make_objective(seed: int = 0, capacity: int = 32, dim: int = 8, **options: Any) -> PTRObjective:
    torch.manual_seed(seed)
    own = {"warmup_steps": options.pop("warmup_steps", 0)}
    config = ObjectiveConfig(**({"queue_negatives": 8} | options))
    scorer, queue = TransitionScorer(10, 5, dim, hidden_dim=16), CandidateQueue(capacity, dim, 3)
    return PTRObjective(scorer, queue, AdaptiveScaleController(), config, **own)


class HostReads:
    """Records the operations that make the host wait for an accelerator, and the largest tensor any operation saw."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __enter__(self) -> "HostReads":
        self.profile = torch.autograd.profiler.profile(record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.profile.__exit__(*details)
        events = self.profile.function_events
        assert events, "the profiler saw nothing"
        self.reads = [event.name for event in events if event.name in self.READS]
        self.largest = max(math.prod(shape) for event in events for shape in event.input_shapes)
