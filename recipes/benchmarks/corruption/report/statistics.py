"""Means over seeds, differences paired by seed, and the share of the SFT → oracle gap, with 95 % confidence intervals."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student  # type: ignore[import-untyped]

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds, its standard error and its confidence interval; NaN but the mean where there is one seed."""

    mean: float
    se: float
    low: float
    high: float
    seeds: tuple[int, ...]

    @property
    def above_zero(self) -> bool:
        return self.low > 0.0

    @property
    def below_zero(self) -> bool:
        return self.high < 0.0

    @property
    def undecided(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return not (self.above_zero or self.below_zero)


class GapShare(NamedTuple):
    """Share of the gap between SFT and oracle that a method closes; `reason` says why where it is NaN."""

    share: float
    low: float
    high: float
    seeds: tuple[int, ...]
    reason: str = ""


def estimate(values: Mapping[int, float]) -> Estimate | None:
    """Mean over seeds with Student's t interval; None without any value."""
    if not values:
        return None
    seeds = tuple(sorted(values))
    numbers = np.array([values[seed] for seed in seeds], dtype=np.float64)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, seeds)
    se = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    half = _quantile(len(numbers)) * se
    return Estimate(mean, se, mean - half, mean + half, seeds)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Difference `values - baseline` over the seeds that both have; None if there are none."""
    return estimate(differences(values, baseline))


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Seed → difference, for the seeds that both have."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(set(values) & set(baseline))}


def gap_share(method: Mapping[int, float], sft: Mapping[int, float], oracle: Mapping[int, float]) -> GapShare:
    """(method - SFT) / (oracle - SFT), means over the seeds that all three have.

    The interval is Fieller's for a ratio of paired means. It exists where the gap's own interval lies above 0; where it
    does not, the gap is too small to tell a share of it.
    """
    seeds = tuple(sorted(set(method) & set(sft) & set(oracle)))
    if not seeds:
        return GapShare(math.nan, math.nan, math.nan, (), "missing")
    gain = np.array([method[seed] - sft[seed] for seed in seeds])
    gap = {seed: oracle[seed] - sft[seed] for seed in seeds}
    whole = estimate(gap)
    assert whole is not None
    if len(seeds) < 2:
        return GapShare(math.nan, math.nan, math.nan, seeds, "one seed")
    if not whole.above_zero:
        return GapShare(math.nan, math.nan, math.nan, seeds, "gap too small to tell")
    covariance = np.cov(gain, np.array([gap[seed] for seed in seeds])) / len(seeds)
    a, b, factor = float(gain.mean()), whole.mean, _quantile(len(seeds)) ** 2
    slope, denominator = a * b - factor * covariance[0, 1], b**2 - factor * covariance[1, 1]
    root = math.sqrt(max(0.0, slope**2 - denominator * (a**2 - factor * covariance[0, 0])))
    return GapShare(a / b, float(slope - root) / denominator, float(slope + root) / denominator, seeds)


def _quantile(count: int) -> float:
    return float(student.ppf(0.5 + CONFIDENCE / 2.0, count - 1))
