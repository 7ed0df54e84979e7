"""Weights that are known before training: one for every frame of the training data, looked up by the frame a chunk begins at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method import ObjectiveOutput, effective_sample_size, global_self_normalized_loss
from ptr_hf.method.chunks import Identified


@dataclass
class FrameWeights:
    """The weight of the chunk that begins at each frame.

    Attributes:
        values: (frames,) float32, finite and 0 or more, at the positions that a batch's `index` counts.
        record: where they come from and what they are in sum, for checkpoint, card and report: JSON values alone.
    """

    values: Float[Tensor, " frames"]
    record: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_array(
        cls, values: np.ndarray, alpha: float = 1.0, record: Mapping[str, Any] | None = None
    ) -> "FrameWeights":
        """Weights 1 + α(w - 1).

        Args:
            values: (frames,) w.
            alpha: in [0, 1], how far they may leave 1.
            record: as the attribute.
        """
        weights = torch.from_numpy(np.array(values, dtype=np.float32))
        return cls(weights if alpha == 1.0 else 1.0 + alpha * (weights - 1.0), record or {})

    def __post_init__(self) -> None:
        self.move = bool((self.values != 1.0).any())
        """Whether some weight is not 1; where none is, training is plain post-training."""
        positive = self.values[self.values > 0]
        low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 1.0)
        self.bounds = min(low, 1.0), max(high, 1.0)
        """The smallest that is not 0 and the largest, with 1 between them."""
        self.range = (0.0 if bool((self.values == 0).any()) else self.bounds[0]), self.bounds[1]
        """Likewise, with 0 where some weight is: then nothing bounds a source's share from below."""

    def of(self, index: Int[Tensor, " chunks"]) -> Float[Tensor, " chunks"]:
        """The weights of chunks by their first frames; one past the end of the data gets some weight, and has no say."""
        if self.values.device != index.device:
            self.values = self.values.to(index.device)
        return self.values[index.clamp(0, len(self.values) - 1)]


def weighed_chunks(
    loss: Float[Tensor, " chunks"],
    weight: Float[Tensor, " chunks"],
    valid: Bool[Tensor, " chunks"],
    task: Int[Tensor, " chunks"] | None,
    source: Int[Tensor, " chunks"] | None,
) -> ObjectiveOutput:
    """Chunks that are weighed and not scored, as the objective would give them.

    Args:
        loss: of the policy.
        weight: as given.
        valid: False where a chunk has no say.
        task, source: numbers, for the log.
    """
    zero = torch.zeros_like(loss.detach())
    return ObjectiveOutput(
        # every chunk has a weight that counts
        **vars(Identified.nothing(valid, loss)),
        loss=loss,
        weight=weight.to(zero).masked_fill(~valid, 0.0),
        chunk_valid=valid,
        entropy=zero,
        diversity=zero,
        source=source,
        task=task,
    )


def weighed_loss(output: ObjectiveOutput) -> Float[Tensor, ""]:
    """Σ w ℓ / Σ w over all ranks' chunks, of `weighed_chunks`."""
    return global_self_normalized_loss(output.loss, output.weight)


@torch.no_grad()
def weight_metrics(output: ObjectiveOutput) -> dict[str, Float[Tensor, ""]]:
    """This rank's figures for the log, 0-d and still on the device."""
    weight, valid = output.weight, output.chunk_valid
    chunks = valid.sum().clamp(min=1)
    return {
        "weight_mean": weight.sum() / chunks,
        "weight_min": torch.where(valid.any(), weight.masked_fill(~valid, torch.inf).amin(), 0.0),
        "weight_max": weight.amax(),
        "effective_sample_size": effective_sample_size(weight, valid) / chunks,
    }
