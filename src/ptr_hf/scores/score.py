"""The contract of a score: a number per chunk that says how well its labels agree with what followed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method import NeverLowered
from ptr_hf.method.draws import Draws
from ptr_hf.method.evidence import Evidence


@dataclass(frozen=True)
class Scored:
    """A score's verdict on a step's chunks, higher is better.

    Attributes:
        value: constant.
        valid: where the value means something.
        null: the same score of the chunk under labels that are not its own: what chance looks like. NaN without one.
        loss: what trains the score's own head, 0 where it does not learn; None for a score without a head.
        correct: where the chunk's own label was the most likely one of all; None for a score that does not identify.
        candidates: number of labels it was picked from.
    """

    value: Float[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    null: Float[Tensor, " batch"] | None = None
    loss: Float[Tensor, " batch"] | None = None
    correct: Bool[Tensor, " batch"] | None = None
    candidates: Int[Tensor, ""] | None = None


class Score(NeverLowered, ABC):
    """One score.

    Attributes:
        has_chance: whether a verdict of 0 is what chance gives.
    """

    has_chance = False

    @abstractmethod
    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """The chunks' verdicts.

        Args:
            evidence: this rank's chunks.
            draws: random numbers of the step.
        """
