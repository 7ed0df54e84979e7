"""From a slot's verdict to its weight.

    paper         w = clip(exp(s / β), floor, ceiling)                         Eq. 21, on the verdict itself
    rejection     w = floor + (1 - floor) σ(4 (z + 1.5))                       METHOD section 13, on standardised verdicts
    exponential   w = clip(exp(3 z), floor, ceiling)                           METHOD section 13, likewise
    calibrated    w = floor + (1 - floor) σ(3 (z + 3)), standardised by good data alone         ours

z = Σ_i z_i / √n over the scores that take part, each standardised by median and MAD within its group (``calibrated``: by
the upper half of its group).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method import weight_bounds

WeightMapName = Literal["paper", "rejection", "exponential", "calibrated"]
WEIGHT_MAPS: tuple[WeightMapName, ...] = ("paper", "rejection", "exponential", "calibrated")

NEVER_ABOVE_ONE: tuple[WeightMapName, ...] = ("rejection", "calibrated")

MAD_TO_STD = 1.4826
Z_CLAMP = 8.0
SMALLEST_GROUP = 5
ENOUGH_FOR_PERCENTILES = 20
LARGE_GROUP = 64
"""Slots of a group, on average, from which a selection in each takes less time than sorting all."""
NORMAL_75, NORMAL_95 = 0.6745, 1.6449
"""Percentiles of the standard normal distribution."""


def map_range(weight_map: WeightMapName, alpha: float, floor: float, ceiling: float) -> tuple[float, float]:
    """The range that a map's weights cannot leave, whatever the verdicts and whatever a chunk without a future gets.

    ``paper`` and ``exponential`` are clipped to [floor, ceiling]; ``rejection`` and ``calibrated`` lie between the floor and 1
    by their sigmoid. α moves both ends towards 1. No map rescales its weights, so this needs no observed extremes.

    Raises:
        ValueError: see ``weight_bounds``.
    """
    low, high = weight_bounds(alpha, floor, ceiling)
    return low, 1.0 if weight_map in NEVER_ABOVE_ONE else high


def grouped_quantile(
    values: Float[Tensor, " slots"],
    group: Int[Tensor, " slots"],
    known: Bool[Tensor, " slots"],
    quantile: float,
) -> Float[Tensor, " slots"]:
    """The quantile (lower one of two) of the known values of each slot's group, for each slot; no host sync on an accelerator.

    NaN for a group without a known value. On a CPU, where groups are large, nothing is sorted by value: the time grows with the
    slots.
    """
    number = int(group.max()) + 1 if group.device.type == "cpu" and len(group) else len(group)
    if number * LARGE_GROUP <= len(group):
        place = group[known]
        size = torch.bincount(place, minlength=number)
        rank = 1 + ((size - 1).clamp(min=0) * quantile).long()
        together = values[known] if number == 1 else values[known][place.argsort(stable=True)]
        none = values.new_tensor(torch.nan)
        chosen = [
            part.kthvalue(nth).values if len(part) else none
            for part, nth in zip(together.split(size.tolist()), rank.tolist(), strict=True)
        ]
        return torch.stack(chosen)[group] if chosen else torch.empty_like(values)
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
    group: Int[Tensor, " slots"],
    has_chance: Bool[Tensor, " channels"],
    floor: float,
) -> Float[Tensor, " slots"]:
    """Reject what lies far below good data, and leave good data alone (ours).

    Up to half of a group may be corrupted, so what good data looks like is read off its upper half: with its 75th and 95th
    percentile taken as those of a normal distribution, z_i = (s_i - mean) / std, and

        w = floor + (1 - floor) σ(3 (z + 3)),        z = Σ_i min(z_i, 1) / √n.

    On clean data nearly every slot keeps a weight near 1, however little the scores spread, and no score's praise makes up
    for another's objection. A score in nats above chance whose typical verdict is not above chance is left out.

    Args:
        values: mean verdicts, NaN where there is none.
        group: of the slots; one of fewer than 20 known slots is compared with everyone.
        has_chance: True for the scores for which 0 is chance.
        floor: smallest weight.
    """
    everyone = torch.zeros_like(group)
    columns = []
    for column, in_nats in zip(values.unbind(1), has_chance, strict=True):
        known = column.isfinite()
        counted = torch.zeros_like(column).index_add_(0, group, known.to(column))[group]
        upper, top = (
            torch.where(
                counted >= ENOUGH_FOR_PERCENTILES,
                grouped_quantile(column, group, known, quantile),
                grouped_quantile(column, everyone, known, quantile),
            )
            for quantile in (0.75, 0.95)
        )
        std = ((top - upper) / (NORMAL_95 - NORMAL_75)).clamp(min=1e-6)
        mean = upper - NORMAL_75 * std
        says_nothing = ~known | (in_nats & (mean <= 0))
        columns.append(torch.where(says_nothing, torch.nan, ((column - mean) / std).clamp(-Z_CLAMP, 1.0)))
    z = combined(torch.stack(columns, dim=1))
    return floor + (1.0 - floor) * torch.sigmoid(3.0 * (torch.where(z.isfinite(), z, 0.0) + 3.0))
