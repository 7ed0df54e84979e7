"""The conservative weight and what it can do at most (Section 4.4, Eq. 21-30).

    w = 1 + α ( clip( exp(T / β), w_min, w_max ) - 1 )        (Eq. 21),  a constant to every gradient
    L*_act = Σ w ℓ / Σ w                                      (Eq. 27),  over the whole global batch

With w in [w̲, w̄], training on the weighted data is training on q ∝ p·w with KL(q‖p) ≤ log(w̄ / w̲), and no source's
share of the data moves by more than a factor w̄ / w̲ (Eq. 30). α = 0 is plain post-training.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ptr_hf.method.distributed import sum_over_ranks, world_size
from ptr_hf.method.numerics import upcast


def weight_bounds(alpha: float = 1.0, w_min: float = 0.25, w_max: float = 4.0) -> tuple[float, float]:
    """[w̲, w̄] = [1 + α(w_min - 1), 1 + α(w_max - 1)], the range of Eq. 21.

    Raises:
        ValueError: unless 0 ≤ alpha ≤ 1 and 0 < w_min ≤ 1 ≤ w_max.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; choose it in [0, 1], where 0 is plain post-training.")
    if not 0.0 < w_min <= 1.0 <= w_max:
        raise ValueError(f"w_min is {w_min} and w_max is {w_max}; they must satisfy 0 < w_min <= 1 <= w_max.")
    return 1.0 + alpha * (w_min - 1.0), 1.0 + alpha * (w_max - 1.0)


def kl_bound(alpha: float = 1.0, w_min: float = 0.25, w_max: float = 4.0) -> float:
    """log(w̄ / w̲) in nats: the most KL(q‖p) can be, and the most a source's log share can move (Eq. 30)."""
    low, high = weight_bounds(alpha, w_min, w_max)
    return math.log(high / low)


@torch.no_grad()
def conservative_weight(
    score: Float[Tensor, " batch"],
    beta: float | Float[Tensor, ""],
    alpha: float = 1.0,
    w_min: float = 0.25,
    w_max: float = 4.0,
    valid: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """w of Eq. 21, detached.

    Args:
        score: T in nats; a score that is not finite says nothing and gets weight 1.
        beta: β, positive; the score that moves a weight by a factor e.
        alpha: 0 gives all ones, 1 the clipped exponential itself.
        w_min: floor of the clip.
        w_max: ceiling of the clip.
        valid: False where there is no target (or none is to be used yet): weight 1.

    Raises:
        ValueError: if a bound, alpha or a float beta is out of range.
    """
    weight_bounds(alpha, w_min, w_max)
    if not isinstance(beta, Tensor) and beta <= 0:
        raise ValueError(f"beta is {beta}; pass a positive number.")
    score = upcast(score)
    weight = 1.0 + alpha * (torch.exp(score / beta).clamp(w_min, w_max) - 1.0)
    known = score.isfinite() if valid is None else score.isfinite() & valid
    return torch.where(known, weight, 1.0)


def self_normalized_loss(
    loss: Float[Tensor, "*terms batch"], weight: Float[Tensor, "*terms batch"]
) -> Float[Tensor, "*terms"]:
    """Σ w ℓ / Σ w over the last axis (Eq. 27), the weight constant.

    Rows whose loss or weight is not finite are left out of both sums; with nothing left the loss is 0, still
    attached to the graph.
    """
    numerator, denominator = _weighted_sums(loss, weight)
    return numerator / torch.where(denominator > 0, denominator, 1.0)


def global_self_normalized_loss(
    loss: Float[Tensor, "*terms batch"], weight: Float[Tensor, "*terms batch"]
) -> Float[Tensor, "*terms"]:
    """Eq. 27 over every rank's rows: R · Σ_local w ℓ / Σ_global w, with one all-reduce for all terms.

    Data-parallel training averages gradients over the R ranks, so the factor R makes them equal those of one rank
    holding the union batch; the mean of the returned values over ranks is the global loss.
    """
    numerator, denominator = _weighted_sums(loss, weight)
    total = sum_over_ranks(denominator)
    return world_size() * numerator / torch.where(total > 0, total, 1.0)


def _weighted_sums(
    loss: Float[Tensor, "*terms batch"], weight: Float[Tensor, "*terms batch"]
) -> tuple[Float[Tensor, "*terms"], Float[Tensor, "*terms"]]:
    loss, weight = upcast(loss), upcast(weight.detach())
    usable = loss.isfinite() & weight.isfinite()
    loss, weight = torch.where(usable, loss, 0.0), torch.where(usable, weight, 0.0)
    return (weight * loss).sum(dim=-1), weight.sum(dim=-1)


@torch.no_grad()
def effective_sample_size(
    weight: Float[Tensor, " batch"], valid: Bool[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    """(Σ w)² / Σ w² of the valid rows, between 1 and their number; 0 where there are none."""
    weight = upcast(weight)
    if valid is not None:
        weight = torch.where(valid, weight, 0.0)
    squares = weight.square().sum()
    return weight.sum().square() / torch.where(squares > 0, squares, 1.0)
