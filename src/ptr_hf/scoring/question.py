"""What a question about a dataset is: it scores every episode, and every frame where it can."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ptr_hf.scoring.crossfit import CrossFit, Reweigh


@dataclass(frozen=True)
class Answer:
    """A question's scores; higher is better. Either `frames` or `episodes` is given.

    Attributes:
        parts: what is scored apart, e.g. an action's dimensions.
        frames: (frames, parts) float32; NaN where the question says nothing. An episode's score is the mean over its frames.
        floor: where the frames are negated squared errors: their means m are then turned into -log(-m + floor), so that an
            error twice as large costs the same everywhere. None takes the means as they are.
        episodes: (episodes, parts), of questions that say nothing of single frames.
        resolution: differences below it mean nothing, however alike the episodes are.
    """

    parts: tuple[str, ...]
    frames: np.ndarray | None = None
    floor: float | None = None
    episodes: np.ndarray | None = None
    resolution: float = 0.25

    def level(self, mean: np.ndarray) -> np.ndarray:
        """A mean over frames as the score of these frames."""
        return mean if self.floor is None else -np.log(np.maximum(-mean, 0) + self.floor)


class CannotAskError(Exception):
    """The dataset does not hold what a question needs; the sentence says what is missing."""


class Question(ABC):
    """One question about every episode.

    Attributes:
        name: of its column.
        title: as a user reads it.
        sentence: about an episode that fails, where it is the same for all.
    """

    name: str
    title: str
    sentence = ""

    @abstractmethod
    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """The scores.

        Args:
            fit: the recordings, their folds and tensors.
            reweigh: how much to trust the episodes, from their scores.

        Raises:
            CannotAskError: the dataset does not hold what the question needs.
        """

    def reason(self, parts: tuple[str, ...]) -> str:
        """A sentence about an episode that fails in these parts, the worst first."""
        return self.sentence
