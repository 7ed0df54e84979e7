"""The controls every claim stands beside: what can be had without consequences, and what perfect knowledge would give."""

import torch
from jaxtyping import Float
from torch import Tensor

from ptr_hf.method.draws import Draws
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores.aggregation import EpisodeTable
from ptr_hf.scores.score import Score, Scored


class Uniform(Score):
    """0 for every chunk: weights that are all alike."""

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """Zeros."""
        return Scored(torch.zeros_like(evidence.loss), evidence.chunk_valid)


class NegativeLoss(Score):
    """The policy's own loss, negated: the small-loss baseline of learning with noisy labels."""

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """-ℓ of every chunk with a finite loss."""
        return Scored(-evidence.loss, evidence.chunk_valid & evidence.loss.isfinite())


class NegativeLogLoss(Score):
    """-log ℓ: the same order as the negated loss, on a scale where good and bad data spread alike."""

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """-log ℓ of every chunk with a finite loss."""
        return Scored(-torch.log(evidence.loss.clamp(min=1e-6)), evidence.chunk_valid & evidence.loss.isfinite())


class Motion(Score):
    """How much the chunk's actions move, as the mean square of the normalised actions."""

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """Motion of every chunk."""
        return Scored(evidence.motion, evidence.chunk_valid)


class OfEpisode(Score):
    """A number that is known of every episode before training starts."""

    values: Float[Tensor, " episodes"]

    def __init__(self, values: Float[Tensor, " episodes"]) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """The episode's number, for each of its chunks; nothing of an episode that the training data lacks."""
        known = evidence.episode < len(self.values)
        values = torch.cat([self.values, self.values.new_zeros(1)])
        return Scored(values[torch.where(known, evidence.episode, len(self.values))], evidence.chunk_valid & known)


def known_beforehand(name: str, episodes: EpisodeTable, seed: int) -> Float[Tensor, " episodes"]:
    """The values of ``OfEpisode`` for a dataset.

    ``random`` gives a standard normal number, so that the same map spreads it like any score's; ``length`` the frames;
    ``oracle`` 0 for an untouched episode and -100 for a corrupted one, from the truth sidecar: the upper bound.
    """
    match name:
        case "random":
            return torch.randn(episodes.num_episodes, generator=torch.Generator().manual_seed(seed))
        case "length":
            return episodes.length.float()
        case "oracle":
            return -100.0 * episodes.corrupted.float()
    raise ValueError(f"The score {name!r} is not known before training; random, length and oracle are.")
