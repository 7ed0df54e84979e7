"""Identification posterior and score (Section 4.2, Eq. 12-14; losses Eq. 13 and 31).

Given the context h and the action chunk e, can the chunk's real consequence be picked out of the pool?

    u = f(h, e),   d_i = clamp(cos(u, y_i) / τ, ±20),   p̂ = softmax(d)_0,   T = log( p̂ · |Y| )
    L_id = -log p̂,   L_rank = -log σ(d⁺_0 - d⁻_0)   with d⁻ from the same context under another sample's action

T is 0 for a posterior that knows nothing and at most log|Y|. The Bayes-optimal logits are log p⁺/p⁻ up to a constant
of the context, so that E[T] tends to KL(p⁺‖p⁻) as the pool grows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.method.numerics import NeverLowered, full_precision, upcast


def masked_mean(x: Float[Tensor, "batch steps dim"], mask: Bool[Tensor, "batch steps"]) -> Float[Tensor, "batch dim"]:
    """Mean over the masked-in steps; zeros for a row without any. Half precision is summed in float32."""
    total = upcast(x).masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


class TransitionScorer(NeverLowered):
    """The light projection head f(h, e) → u. It works in its own precision (float32), also under autocast.

    Args:
        context_dim: width of h.
        action_dim: width of e.
        target_dim: width of u, that of a target.
        hidden_dim: width inside.
    """

    def __init__(self, context_dim: int, action_dim: int, target_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, hidden_dim))
        self.action_in = nn.Linear(action_dim, hidden_dim)
        self.action_out = nn.Linear(hidden_dim, hidden_dim)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(2 * hidden_dim, hidden_dim), nn.GELU())
        self.query = nn.Linear(hidden_dim, target_dim)
        for layer in (self.action_in, self.action_out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, context: Float[Tensor, "batch context_dim"], action: Float[Tensor, "batch action_dim"]
    ) -> Float[Tensor, "batch target_dim"]:
        """u, not normalised (the cosine does that)."""
        dtype = self.query.weight.dtype
        with full_precision(context.device):
            summary = self.action_out(functional.gelu(self.action_in(action.to(dtype))))
            return self.query(self.head(torch.cat([self.context(context.to(dtype)), summary], dim=-1)))


def identification_logits(
    query: Float[Tensor, "batch dim"],
    candidates: Float[Tensor, "batch candidates dim"],
    temperature: float | Float[Tensor, ""],
    clamp: float = 20.0,
) -> Float[Tensor, "batch candidates"]:
    """The logits d_i = clamp(cos(u, y_i) / τ, ±clamp) of every candidate, the match at index 0 (Eq. 12).

    Args:
        query: u, one a sample; it need not be normalised.
        candidates: y of every sample, the true consequence first.
        temperature: τ, positive.
        clamp: largest absolute logit.

    Returns:
        One logit a candidate, in float32 or wider.
    """
    query = upcast(query)
    with full_precision(query.device):
        unit_query = functional.normalize(query, dim=-1, eps=1e-6)
        unit_candidates = functional.normalize(candidates.to(query.dtype), dim=-1, eps=1e-6)
        cosine = torch.einsum("bd,bcd->bc", unit_query, unit_candidates)
    return (cosine / temperature).clamp(-clamp, clamp)


def _log_posterior(
    logits: Float[Tensor, "batch candidates"], mask: Bool[Tensor, "batch candidates"] | None
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """log p̂ and log|Y| per sample, both 0 where the match itself is masked."""
    logits = upcast(logits)
    if mask is None:
        mask = torch.ones_like(logits, dtype=torch.bool)
    no_target = ~mask[:, 0]
    # a row without a target must not send NaN back, so its logits are replaced before the softmax
    logits = logits.masked_fill(~mask, -torch.inf).masked_fill(no_target[:, None], 0.0)
    log_posterior = logits.log_softmax(dim=1)[:, 0].masked_fill(no_target, 0.0)
    log_count = mask.sum(dim=1).to(logits.dtype).log().masked_fill(no_target, 0.0)
    return log_posterior, log_count


def ptr_score(
    logits: Float[Tensor, "batch candidates"], mask: Bool[Tensor, "batch candidates"] | None = None
) -> Float[Tensor, " batch"]:
    """The score T = log(p̂ · |Y|): how much likelier than a uniform guess the match was (Eq. 14).

    Args:
        logits: d, the match at index 0.
        mask: True where there is a candidate; |Y| counts these. All are candidates by default.

    Returns:
        Nats, one a sample, at most log|Y|; 0 for a uniform posterior, for |Y| = 1 and without a target.

    Example:
        >>> ptr_score(torch.zeros(1, 8))
        tensor([0.])
    """
    log_posterior, log_count = _log_posterior(logits, mask)
    return log_posterior + log_count


def identification_loss(
    logits: Float[Tensor, "batch candidates"], mask: Bool[Tensor, "batch candidates"] | None = None
) -> Float[Tensor, " batch"]:
    """The identification loss L_id = -log p̂ (Eq. 13).

    Args:
        logits: d, the match at index 0.
        mask: True where there is a candidate; all by default.

    Returns:
        Nats, one a sample; 0 without a target.
    """
    return -_log_posterior(logits, mask)[0]


def ranking_loss(positive: Float[Tensor, " batch"], negative: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The action-ranking loss L_rank = -log σ(d⁺_0 - d⁻_0), so that the scorer cannot ignore the action (Eq. 31).

    Args:
        positive: d⁺_0, the match's logit under the recorded action.
        negative: d⁻_0, its logit under another sample's action.

    Returns:
        Nats, one a sample.
    """
    return -functional.logsigmoid(upcast(positive) - upcast(negative))


def masked_derangement(
    valid: Bool[Tensor, " batch"], keys: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """A random permutation of the valid rows in which none stays in place, without host sync.

    Args:
        valid: rows to permute.
        keys: random numbers in [0, 1), whose order makes the permutation.

    Returns:
        The permutation (other rows stay where they are), and where it can be used: nowhere with fewer than 2 valid.
    """
    rows = torch.arange(valid.shape[0], device=valid.device)
    # valid rows in random order come first; each takes the next one's place, the last the first one's
    order = keys.masked_fill(~valid, 2.0).argsort()
    count = valid.sum()
    successor = order[(rows + 1) % count.clamp(min=1)]
    index = torch.empty_like(order).scatter(0, order, torch.where(rows < count, successor, order))
    return index, valid & (count >= 2)


class IdentificationMetrics(NamedTuple):
    """Per sample: is the match's logit the highest of all, by how much, and is there anything to compare it with."""

    correct: Bool[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]


@torch.no_grad()
def identification_metrics(
    logits: Float[Tensor, "batch candidates"], mask: Bool[Tensor, "batch candidates"] | None = None
) -> IdentificationMetrics:
    """What the controller watches (Section 4.5); a tie is not correct, and |Y| < 2 gives False, 0 and False."""
    logits = upcast(logits)
    if mask is None:
        mask = torch.ones_like(logits, dtype=torch.bool)
    valid = mask[:, 0] & (mask.sum(dim=1) > 1)
    if logits.shape[1] == 1:
        return IdentificationMetrics(valid, torch.zeros_like(logits[:, 0]), valid)
    best_other = logits[:, 1:].masked_fill(~mask[:, 1:], -torch.inf).amax(dim=1)
    margin = (logits[:, 0] - best_other).masked_fill(~valid, 0.0)
    return IdentificationMetrics(margin > 0, margin, valid)
