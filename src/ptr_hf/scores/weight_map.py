"""From a slot's verdict to its weight.

    paper         w = clip(exp(s / β), floor, ceiling)                         Eq. 21, on the verdict itself
    rejection     w = floor + (1 - floor) σ(4 (z + 1.5))                       METHOD section 13, on standardised verdicts
    exponential   w = clip(exp(3 z), floor, ceiling)                           METHOD section 13, likewise
    calibrated    see ``calibrated``

z = Σ_i z_i / √n over the scores that take part, each standardised by median and MAD within its group.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

WeightMapName = Literal["paper", "rejection", "exponential", "calibrated"]
WEIGHT_MAPS: tuple[WeightMapName, ...] = ("paper", "rejection", "exponential", "calibrated")

MAD_TO_STD = 1.4826
Z_CLAMP = 8.0
SMALLEST_GROUP = 5


def grouped_quantile(
    values: Float[Tensor, " slots"],
    group: Int[Tensor, " slots"],
    known: Bool[Tensor, " slots"],
    quantile: float,
) -> Float[Tensor, " slots"]:
    """The quantile (lower one of two) of the known values of each slot's group, for each slot; no host sync.

    NaN for a group without a known value.
    """
    groups = len(group) + 1
    place = torch.where(known, group, groups - 1)
    order = torch.where(known, values, torch.inf).argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    size = torch.zeros(groups, dtype=torch.int64, device=group.device).index_add_(0, place, torch.ones_like(place))
    start = size.cumsum(0) - size
    picked = start + ((size - 1).clamp(min=0) * quantile).long()
    ordered = values[order]
    found = torch.where(size > 0, ordered[picked.clamp(max=len(values) - 1)], torch.nan)
    return found[group]


def standardized(
    values: Float[Tensor, "slots channels"], group: Int[Tensor, " slots"]
) -> Float[Tensor, "slots channels"]:
    """Robust z-scores, (value - median) / (1.4826 MAD) within each group, clamped to ±8; NaN values stay NaN.

    A group with fewer than five known slots is compared with everyone.
    """
    columns = []
    for column in values.unbind(1):
        known = column.isfinite()
        counted = torch.zeros_like(column).index_add_(0, group, known.to(column))[group]
        everyone = torch.zeros_like(group)
        z = []
        for groups in (group, everyone):
            median = grouped_quantile(column, groups, known, 0.5)
            spread = MAD_TO_STD * grouped_quantile((column - median).abs(), groups, known, 0.5)
            # a channel that is the same everywhere says nothing
            z.append((column - median) / spread.clamp(min=1e-6))
        columns.append(torch.where(counted >= SMALLEST_GROUP, z[0], z[1]).clamp(-Z_CLAMP, Z_CLAMP))
    return torch.stack(columns, dim=1)


def combined(z: Float[Tensor, "slots channels"]) -> Float[Tensor, " slots"]:
    """Σ z_i / √n over the scores that know the slot; NaN where none does."""
    known = z.isfinite()
    count = known.sum(dim=1)
    total = torch.where(known, z, 0.0).sum(dim=1) / count.clamp(min=1).sqrt()
    return torch.where(count > 0, total, torch.nan)


def rejection(z: Float[Tensor, " slots"], floor: float) -> Float[Tensor, " slots"]:
    """floor + (1 - floor) σ(4 (z + 1.5)): 1 for most, the floor for outliers below."""
    return floor + (1.0 - floor) * torch.sigmoid(4.0 * (z + 1.5))


def exponential(z: Float[Tensor, " slots"], floor: float, ceiling: float) -> Float[Tensor, " slots"]:
    """clip(exp(3 z), floor, ceiling)."""
    return torch.exp(3.0 * z).clamp(floor, ceiling)


def calibrated(
    values: Float[Tensor, "slots channels"],
    nulls: Float[Tensor, "slots channels"],
    group: Int[Tensor, " slots"],
    floor: float,
) -> Float[Tensor, " slots"]:
    """Weights on the scale between chance and what is typical of good data (ours).

    t = (value - chance) / (typical - chance), with chance the group's median null and typical the upper quartile of its
    verdicts; w = floor + (1 - floor) Π_i σ(12 (t_i - 0.5)): clean data lies around t = 1 and keeps its weight however tight
    it is spread; what looks like chance is rejected.
    """
    weight = torch.ones_like(values[:, 0])
    for value, null in zip(values.unbind(1), nulls.unbind(1), strict=True):
        known = value.isfinite()
        chance = grouped_quantile(null, group, null.isfinite(), 0.5)
        typical = grouped_quantile(value, group, known, 0.75)
        t = (value - chance) / (typical - chance).clamp(min=1e-6)
        factor = torch.sigmoid(12.0 * (t - 0.5))
        weight = weight * torch.where(known & chance.isfinite(), factor, 1.0)
    return floor + (1.0 - floor) * weight
