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
    """The range [w̲, w̄] = [1 + α(w_min - 1), 1 + α(w_max - 1)] of the weight of Eq. 21.

    Args:
        alpha: α in [0, 1], how far weights may leave 1.
        w_min: floor of the clip, in (0, 1].
        w_max: ceiling of the clip, at least 1.

    Returns:
        The smallest and the largest weight.

    Raises:
        ValueError: unless 0 ≤ alpha ≤ 1 and 0 < w_min ≤ 1 ≤ w_max.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; choose it in [0, 1], where 0 is plain post-training.")
    if not 0.0 < w_min <= 1.0 <= w_max:
        raise ValueError(f"w_min is {w_min} and w_max is {w_max}; they must satisfy 0 < w_min <= 1 <= w_max.")
    return 1.0 + alpha * (w_min - 1.0), 1.0 + alpha * (w_max - 1.0)


def kl_bound(alpha: float = 1.0, w_min: float = 0.25, w_max: float = 4.0) -> float:
    """The bound log(w̄ / w̲): the most KL(q‖p) can be, and the most a source's log share can move (Eq. 30).

    Args:
        alpha: α in [0, 1], how far weights may leave 1.
        w_min: floor of the clip, in (0, 1].
        w_max: ceiling of the clip, at least 1.

    Returns:
        Nats.

    Raises:
        ValueError: as `weight_bounds`.

    Example:
        >>> round(kl_bound(), 3)
        2.773
    """
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
    """The conservative weight w = 1 + α(clip(exp(T / β), w_min, w_max) - 1) of Eq. 21, a constant to every gradient.

    Args:
        score: T in nats, one a sample; a score that is not finite says nothing and gets weight 1.
        beta: β, positive; the score that moves a weight by a factor e.
        alpha: 0 gives all ones, 1 the clipped exponential itself.
        w_min: floor of the clip.
        w_max: ceiling of the clip.
        valid: False where there is no target (or none is to be used yet): weight 1. All are valid by default.

    Returns:
        One weight a sample, in `weight_bounds(alpha, w_min, w_max)`.

    Raises:
        ValueError: if a bound, alpha or a float beta is out of range.

    Example:
        >>> conservative_weight(torch.tensor([-9.0, 0.0, 9.0]), beta=1.5)
        tensor([0.2500, 1.0000, 4.0000])
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
    """The self-normalised loss Σ w ℓ / Σ w over the last axis (Eq. 27), the weight constant.

    Rows whose loss or weight is not finite are left out of both sums; with nothing left the loss is 0, still
    attached to the graph.

    Args:
        loss: ℓ, one a sample; leading axes are separate terms.
        weight: w of the same shape; no gradient flows into it.

    Returns:
        One loss a term.

    Example:
        >>> self_normalized_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.25]))
        tensor(1.4000)
    """
    numerator, denominator = _weighted_sums(loss, weight)
    return numerator / torch.where(denominator > 0, denominator, 1.0)


def global_self_normalized_loss(
    loss: Float[Tensor, "*terms batch"], weight: Float[Tensor, "*terms batch"]
) -> Float[Tensor, "*terms"]:
    """Eq. 27 over every rank's rows: R · Σ_local w ℓ / Σ_global w, with one all-reduce for all terms.

    Data-parallel training averages gradients over the R ranks, so the factor R makes them equal those of one rank
    holding the union batch; the mean of the returned values over ranks is the global loss.

    Args:
        loss: ℓ of this rank's rows.
        weight: w of this rank's rows, of the same shape.

    Returns:
        One loss a term.
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
    """The effective sample size (Σ w)² / Σ w² of the valid rows.

    Args:
        weight: w, one a sample.
        valid: the rows that count; all by default.

    Returns:
        Between 1 and the number of valid rows; 0 where there are none.
    """
    weight = upcast(weight)
    if valid is not None:
        weight = torch.where(valid, weight, 0.0)
    squares = weight.square().sum()
    return weight.sum().square() / torch.where(squares > 0, squares, 1.0)
