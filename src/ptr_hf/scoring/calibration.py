"""From scores to z and to the chance that a good episode scores so low.

Bad episodes lie below, so the upper half of a group alone says how much good episodes spread: its centre is the median of
those that are not flagged, its scale comes from the deviations above it. How heavy the tails are is estimated there too (the
degrees of freedom of Student's t), and the lower tail is taken to be as heavy.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

LEAST_GROUP = 4
"""Episodes of a group that is judged by itself; smaller ones are pooled."""
LEAST_TO_JUDGE = 8
"""Episodes of a dataset below which nothing is judged."""
PRIOR = 8.0
"""Episodes' worth of the pooled scale in a group's own."""
DEGREES = (4.0, 10.0)
NORMAL_MEDIAN = float(stats.norm.ppf(0.75))
GUMBEL = math.log(2) / NORMAL_MEDIAN
"""Of a standard Gumbel distribution of minima, upper quartile minus median, in units of z."""


@dataclass(frozen=True)
class Standard:
    """Where good episodes lie.

    Attributes:
        center, scale: (episodes, parts) of each episode's own group.
        degrees: (parts,) of freedom of the tails.
    """

    center: np.ndarray
    scale: np.ndarray
    degrees: np.ndarray

    def z(self, scores: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Deviations from the centre; (n, parts) of episodes, or of rows that name each score's episode."""
        center, scale = (self.center, self.scale) if rows is None else (self.center[rows], self.scale[rows])
        return (scores - center) / scale

    def chance(self, scores: np.ndarray) -> np.ndarray:
        """(episodes, parts) the probability that a good episode scores so low; 1 where there is no score."""
        return np.nan_to_num(stats.t.cdf(self.z(scores), self.degrees), nan=1.0)

    def chance_of_minima(self, scores: np.ndarray) -> np.ndarray:
        """The same of minima over many windows, whose lower tail is Gumbel's: exponential, and heavier than the upper one."""
        return np.nan_to_num(-np.expm1(-np.exp(self.z(scores) * GUMBEL + math.log(math.log(2)))), nan=1.0)

    @property
    def parts(self) -> int:
        """How many parts are judged, at least 1."""
        return max(int(np.isfinite(self.center).any(axis=0).sum()), 1)


def lowest_of_minima(chance: float) -> float:
    """The z that a good episode's lowest window falls below with this chance."""
    return (math.log(-math.log1p(-chance)) - math.log(math.log(2))) / GUMBEL


def of_the_lowest(chances: np.ndarray, number: int) -> np.ndarray:
    """(episodes,) the chance that the lowest of so many chances (episodes, n) is so low, were they independent (Šidák)."""
    with np.errstate(divide="ignore"):
        return -np.expm1(number * np.log1p(-chances.min(axis=1)))


def judged_within(group: np.ndarray) -> np.ndarray:
    """Groups with the smaller ones put together: (episodes,) numbers, -1 where even together they are too few."""
    number, count = np.unique(group, return_counts=True)
    small = np.isin(group, number[count < LEAST_GROUP])
    rest = group.max(initial=0) + 1 if small.sum() >= LEAST_GROUP else -1
    return np.where(small, rest, group)


def standard(scores: np.ndarray, group: np.ndarray, good: np.ndarray, resolution: float = 0.25) -> Standard:
    """How good episodes spread, group by group.

    Args:
        scores: (episodes, parts); NaN where there is none.
        group: (episodes,) of `judged_within`.
        good: (episodes,) whether an episode is taken to be good.
        resolution: added to the scale: differences below it mean nothing.

    Returns:
        NaN centres for groups that cannot be judged.
    """
    center, scale = np.full(scores.shape, np.nan), np.full(scores.shape, np.nan)
    degrees = np.full(scores.shape[1], DEGREES[1])
    numbers = [number for number in np.unique(group) if number >= 0]
    for part in range(scores.shape[1]):
        value = scores[:, part]
        usable = np.isfinite(value) & good
        above: dict[int, np.ndarray] = {}
        for number in numbers:
            own = value[usable & (group == number)]
            if len(own) < LEAST_GROUP:
                continue
            middle = np.median(own)
            center[group == number, part] = middle
            above[number] = (own - middle)[own > middle]
        if not above:
            continue
        pooled = _scale(np.concatenate(list(above.values())))
        for number, deviations in above.items():
            weight = 2 * len(deviations)
            squared = (weight * _scale(deviations) ** 2 + PRIOR * pooled**2) / (weight + PRIOR)
            scale[group == number, part] = np.sqrt(squared) + resolution
            above[number] = deviations / (np.sqrt(squared) + 1e-9)
        degrees[part] = _degrees(np.concatenate(list(above.values())))
    return Standard(center, scale, degrees)


def _scale(deviations: np.ndarray) -> float:
    """σ of deviations above the median."""
    return float(np.median(deviations)) / NORMAL_MEDIAN if len(deviations) else 0.0


def _degrees(deviations: np.ndarray) -> float:
    """Degrees of freedom whose 90 % quantile of |t|, by its median, is that of the deviations above the centre."""
    if len(deviations) < 10 or np.median(deviations) <= 0:
        return DEGREES[0]
    ratio = np.quantile(deviations, 0.9) / np.median(deviations)
    grid = np.linspace(*DEGREES, 53)
    return float(grid[np.abs(stats.t.ppf(0.95, grid) / stats.t.ppf(0.75, grid) - ratio).argmin()])
