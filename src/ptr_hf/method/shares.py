"""What weighing does to the parts of a mixture: sums per source or per task, and how far a share can move (Eq. 30, Prop. 3).

Data p(x) = Σ_m π(m) p_m(x) weighed by w is data of shares

    q(m) = π(m) E_m[w] / Σ_n π(n) E_n[w],

which for w = exp(J/β) are Proposition 3's.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method.chunks import ObjectiveOutput

GROUP_STATISTICS = ("chunks", "weight", "targets", "score", "at_floor", "at_ceiling", "loss")
"""Columns of ``group_statistics``: chunks counted, Σ w, chunks with a target, Σ T and weights at either bound among those,
Σ ℓ (unweighted)."""


def share_bound(low: float, high: float) -> tuple[float, float]:
    """The range of q(m) / π(m) for weights in [low, high]: (low / high, high / low), Eq. 30.

    A source's mean weight and that of all the data both lie in [low, high], and q(m) / π(m) is their quotient. The scale
    of the weights drops out, so weights that are normalised to some mean have the same bound, from their smallest and
    largest value.

    Args:
        low: the smallest weight.
        high: the largest weight.

    Returns:
        The factors by which a share can shrink and grow.

    Raises:
        ValueError: unless 0 < low <= high.
    """
    if not 0.0 < low <= high:
        raise ValueError(f"Weights in [{low}, {high}] bound no share: pass 0 < low <= high.")
    return low / high, high / low


def at_bounds(
    weight: Float[Tensor, " batch"], bounds: tuple[float, float]
) -> tuple[Bool[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Which weights sit at the lower and which at the upper bound; at a bound of 1 there is no clip to sit at."""
    low, high = bounds
    tolerance = 1e-6 * high
    return (weight <= low + tolerance) & (low < 1.0), (weight >= high - tolerance) & (high > 1.0)


@torch.no_grad()
def group_statistics(
    output: ObjectiveOutput, group: Int[Tensor, " batch"], num_groups: int, bounds: tuple[float, float]
) -> Float[Tensor, "groups statistics"]:
    """Sums per group over the chunks that have a say, in float64; the host waits for nothing.

    A chunk has a say where it lies in its episode and its loss and weight are finite, as in Eq. 27's sums.

    Args:
        output: of the step's chunks.
        group: number of each chunk's source or task; one outside [0, num_groups) is left out.
        num_groups: rows of the result.
        bounds: of Eq. 21's weight, ``weight_bounds``.

    Returns:
        one row a group, the columns those of ``GROUP_STATISTICS``.
    """
    loss, weight = output.loss.detach().double(), output.weight.double()
    known = (group >= 0) & (group < num_groups)
    counts = output.chunk_valid & loss.isfinite() & weight.isfinite()
    judged = counts & output.target_valid
    at_floor, at_ceiling = at_bounds(output.weight, bounds)
    columns = (
        counts,
        weight.where(counts, 0.0),
        judged,
        output.score.double().where(judged, 0.0),
        judged & at_floor,
        judged & at_ceiling,
        loss.where(counts, 0.0),
    )
    values = torch.stack([column.double() for column in columns], dim=1)
    # those of no group go into a row that is dropped
    place = torch.where(known, group, num_groups)
    return values.new_zeros(num_groups + 1, len(columns)).index_add_(0, place, values)[:num_groups]
