"""What goes into the objective and what comes out of it, one row a chunk."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method.candidates import Samples
from ptr_hf.method.evidence import Weighing


@dataclass
class ChunkBatch:
    """What one step's chunks bring, one row each (time-major over the segments).

    Attributes:
        loss: the policy's own loss per chunk.
        context: h, the masked mean of the backbone's context states.
        action: e, the masked mean of the clean chunk's action tokens.
        samples: targets and where they come from.
        chunk_valid: False where the whole chunk lies past its episode's end.
        entropy: H_tok, 0 without belief.
        diversity: D_tok, 0 without belief.
        segment_length: T, chunks of a segment; the rows are those of len(loss) / T segments.
        stretches, current, motion, index: what only a ``Weigher`` reads, see ``Evidence``; None when the paper's T weighs.
    """

    loss: Float[Tensor, " batch"]
    context: Float[Tensor, "batch context_dim"]
    action: Float[Tensor, "batch action_dim"]
    samples: Samples
    chunk_valid: Bool[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]
    diversity: Float[Tensor, " batch"]
    segment_length: int = 1
    stretches: Float[Tensor, "batch stretches _"] | None = None
    current: Float[Tensor, "batch dim"] | None = None
    motion: Float[Tensor, " batch"] | None = None
    index: Int[Tensor, " batch"] | None = None


def joined(parts: Sequence[ChunkBatch]) -> ChunkBatch:
    """The chunks of several batches of segments as those of one, time-major over all of their segments."""
    return parts[0] if len(parts) == 1 else _joined(parts, parts[0].segment_length)


def in_time_order(parts: Sequence[Tensor], segment_length: int) -> Tensor:
    """Rows (T·b, ...) of several batches, each time-major, as one time-major (T·Σb, ...)."""
    return torch.cat([part.unflatten(0, (segment_length, -1)) for part in parts], dim=1).flatten(0, 1)


def _joined(parts: Sequence[Any], segment_length: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return in_time_order(parts, segment_length)
    if not isinstance(first, ChunkBatch | Samples):
        return first
    names = [item.name for item in fields(first)]
    together = {name: _joined([vars(part)[name] for part in parts], segment_length) for name in names}
    return type(first)(**together)


@dataclass
class Identified:
    """What the identification posterior says of each chunk (Eq. 12-14, 31)."""

    target_valid: Bool[Tensor, " batch"]
    score: Float[Tensor, " batch"]
    identification: Float[Tensor, " batch"]
    ranking: Float[Tensor, " batch"]
    ranking_valid: Bool[Tensor, " batch"]
    contrast: Float[Tensor, " batch"]
    correct: Bool[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    candidates: Int[Tensor, " batch"]

    @classmethod
    def nothing(cls, target_valid: Bool[Tensor, " batch"], loss: Float[Tensor, " batch"]) -> "Identified":
        """Nothing is identified: no score, no loss, no candidate."""
        zero, never = torch.zeros_like(loss.detach()), torch.zeros_like(target_valid)
        return cls(
            target_valid=target_valid,
            score=zero,
            identification=zero,
            ranking=zero,
            ranking_valid=never,
            contrast=zero,
            correct=never,
            margin=zero,
            candidates=torch.zeros_like(target_valid, dtype=torch.int64),
        )


@dataclass
class ObjectiveOutput(Identified):
    """Per chunk: what identifies it, its losses and weight (0 where not ``chunk_valid``), and what each may be averaged over.

    ``weighing`` is what a ``Weigher`` said, its heads' losses among it; None when the paper's T weighs. ``source`` and
    ``task`` are those of ``ChunkBatch.samples``.
    """

    loss: Float[Tensor, " batch"]
    weight: Float[Tensor, " batch"]
    chunk_valid: Bool[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]
    diversity: Float[Tensor, " batch"]
    weighing: Weighing | None = None
    source: Int[Tensor, " batch"] | None = None
    task: Int[Tensor, " batch"] | None = None
