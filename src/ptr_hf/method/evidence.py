"""What the objective hands to a strategy that weighs the loss by something else than the paper's T, and what it gets back.

The strategies themselves live in ``ptr_hf.scores``; the objective knows only this contract.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method.distributed import GlobalRows
from ptr_hf.method.draws import Draws
from ptr_hf.method.numerics import NeverLowered


@dataclass(frozen=True)
class ComparisonSet:
    """The rows of all ranks that a step's chunks are compared with.

    Attributes:
        rows: how they are numbered.
        valid: which of them have a recorded future.
    """

    rows: GlobalRows
    valid: Bool[Tensor, " all_rows"]


@dataclass(frozen=True)
class Evidence:
    """What a score may read of a step's chunks, one row each; all of it constant.

    Attributes:
        loss: the policy's own loss per chunk.
        action: the clean chunk's action tokens, averaged within consecutive stretches of time.
        current: consequence embedding of o_t, zeros where no score needs it.
        target: consequence embedding of o_{t+Δ}, zeros where there is none.
        target_valid: the chunk has a recorded future.
        chunk_valid: the chunk lies in its episode.
        posterior: T (Eq. 14), 0 without an identification posterior.
        contrast: d⁺_0 - d⁻_0 (Eq. 31), by how much the real action beats another one.
        contrast_valid: where ``contrast`` means something.
        motion: mean square of the chunk's normalised actions.
        task, episode, index: instruction, episode and first frame of the chunk, as the dataset numbers them.
        among: what the chunks are compared with; None for each other.
    """

    loss: Float[Tensor, " batch"]
    action: Float[Tensor, "batch stretches action_dim"]
    current: Float[Tensor, "batch dim"]
    target: Float[Tensor, "batch dim"]
    target_valid: Bool[Tensor, " batch"]
    chunk_valid: Bool[Tensor, " batch"]
    posterior: Float[Tensor, " batch"]
    contrast: Float[Tensor, " batch"]
    contrast_valid: Bool[Tensor, " batch"]
    motion: Float[Tensor, " batch"]
    task: Int[Tensor, " batch"]
    episode: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    among: ComparisonSet | None = None

    @property
    def compared_with(self) -> ComparisonSet:
        """What the chunks are compared with."""
        return self.among or ComparisonSet(GlobalRows(1, len(self.loss)), self.target_valid)


@dataclass(frozen=True)
class Weighing:
    """What a strategy says of a step's chunks.

    Attributes:
        weight: per chunk, constant; rows outside their episode are set to 0 by the objective.
        verdicts: of every score that took part, one column each, NaN where it says nothing.
        nulls: what each would have said under labels that are not the chunk's own, NaN where it has none.
        head_loss: per chunk, the loss that trains the scores' own heads; zeros without any.
        head_weight: what ``head_loss`` is averaged with.
        identified: what the first identifying score says, for the log; None without one.
    """

    weight: Float[Tensor, " batch"]
    verdicts: Float[Tensor, "batch scores"]
    nulls: Float[Tensor, "batch scores"]
    head_loss: Float[Tensor, " batch"]
    head_weight: Float[Tensor, " batch"]
    identified: "IdentifiedBy | None" = None


@dataclass(frozen=True)
class IdentifiedBy:
    """What a score that picks the chunk's own label out of several says of each chunk.

    Attributes:
        verdict: in nats above chance, 0 where it says nothing.
        correct: the chunk's own label was the most likely.
        candidates: labels it was picked from, 0 where it says nothing.
    """

    verdict: Float[Tensor, " batch"]
    correct: Bool[Tensor, " batch"]
    candidates: Int[Tensor, " batch"]


class Weigher(NeverLowered, ABC):
    """A strategy: Score × Aggregation × WeightMap. Its buffers are equal on every rank.

    Attributes:
        step_verdicts: what ``weigh`` has kept of this step for ``after_step``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step_verdicts: list[tuple[Tensor, Tensor]] = []

    @abstractmethod
    def weigh(self, evidence: Evidence, beta: Float[Tensor, ""], warm: bool, draws: Draws) -> Weighing:
        """Weights of this rank's chunks; ``warm`` is False during the scorer's warm-up, when every weight is 1."""

    @abstractmethod
    def after_step(self, step: int, warm: bool) -> None:
        """After the optimiser step: take in what all ranks have seen."""
