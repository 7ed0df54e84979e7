"""Scores that learn nothing of their own: the paper's, and the controls every claim stands beside."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ptr_hf.method.draws import Draws
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores.aggregation import EpisodeTable
from ptr_hf.scores.score import Score, Scored

READINGS: dict[str, Callable[[Evidence], Scored]] = {
    # the paper's T = log(p̂ · |Y|) in nats (Eq. 14): can the real consequence be picked out, given context and action?
    "posterior": lambda evidence: Scored(evidence.posterior, evidence.target_valid),
    # d(h, e, y) - d(h, e′, y): by how much the recorded action explains the consequence better than another's (ours)
    "action_margin": lambda evidence: Scored(evidence.contrast, evidence.contrast_valid),
    # weights that are all alike
    "uniform": lambda evidence: Scored(torch.zeros_like(evidence.loss), evidence.chunk_valid),
    # -ℓ, the small-loss baseline of learning with noisy labels
    "loss": lambda evidence: Scored(-evidence.loss, evidence.chunk_valid & evidence.loss.isfinite()),
    # -log ℓ, the same order on a scale where good and bad data spread alike
    "log_loss": lambda evidence: Scored(
        -torch.log(evidence.loss.clamp(min=1e-6)), evidence.chunk_valid & evidence.loss.isfinite()
    ),
    # mean square of the normalised actions
    "motion": lambda evidence: Scored(evidence.motion, evidence.chunk_valid),
}
"""What the scores without a head make of a step's chunks."""
READS_POSTERIOR = ("posterior", "action_margin")


class Reading(Score):
    """A score that is read off the evidence.

    Args:
        name: of the score, in `READINGS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.has_chance = name in READS_POSTERIOR

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """What the evidence says."""
        return READINGS[self.name](evidence)


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
