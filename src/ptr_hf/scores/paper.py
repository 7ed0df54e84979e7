"""The scores read off the paper's own scorer f(h, e): T and, from its ranking loss, the action margin."""

from ptr_hf.method.draws import Draws
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores.score import Score, Scored


class Posterior(Score):
    """T = log(p̂ · |Y|) in nats (Eq. 14): can the real consequence be picked out, given context and action?"""

    reads_futures = True
    reads_posterior = True
    has_chance = True

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """T of every chunk with a future."""
        return Scored(evidence.posterior, evidence.target_valid)


class ActionMargin(Score):
    """R = d(h, e, y) - d(h, e′, y): by how much the recorded action explains the consequence better than another's (ours)."""

    reads_futures = True
    reads_posterior = True
    has_chance = True

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """R of every chunk with a future and another action to compare with."""
        return Scored(evidence.contrast, evidence.contrast_valid)
