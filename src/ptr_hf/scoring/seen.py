"""Image features as the questions read them: few numbers a picture, and linear models that judge only what they have not seen."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

COMPONENTS = 48
"""Numbers kept of a picture."""
RIDGE = 1e-3
"""Penalty of the linear models, in the mean square of an input."""
BLOCK, LEARNED = 4096, 20_000
"""Pictures that are turned at once, and from which the components are found."""


@dataclass(frozen=True)
class ImageFeatures:
    """Encoded frames of a dataset.

    Attributes:
        rows: (looked,) int64 rows of the frames in `Recordings`, ascending.
        values: (looked, cameras, width) float32; NaN where a picture could not be read.
        cameras: their names, without prefixes.
        encoder: name of what encoded them.
        thumbnails: (looked, cameras, colours, pixels) float32, whatever the encoder is; None where nobody made them.
    """

    rows: np.ndarray
    values: np.ndarray
    cameras: tuple[str, ...]
    encoder: str
    thumbnails: np.ndarray | None = None

    @cached_property
    def components(self) -> tuple[np.ndarray, ...]:
        """Of each camera, see `components`."""
        return tuple(components(self.values[:, place]) for place in range(len(self.cameras)))


def components(values: np.ndarray, most: int = COMPONENTS) -> np.ndarray:
    """The first principal components of one camera's pictures, the largest at deviation 1.

    Args:
        values: (looked, width); NaN where a picture could not be read.
        most: components that are kept.

    Returns:
        (looked, at most `most`) float32; NaN where a picture could not be read.
    """
    read = np.flatnonzero(np.isfinite(values[:, 0]))
    if not len(read):
        return np.full((len(values), 0), np.nan, np.float32)
    known = values[read[np.linspace(0, len(read) - 1, min(len(read), LEARNED)).astype(np.int64)]].astype(np.float64)
    center = known.mean(axis=0)
    strength, directions = np.linalg.eigh((known - center).T @ (known - center) / len(known))
    kept = np.flatnonzero(strength > 1e-6 * max(strength[-1], 1e-12))[::-1][:most]
    turned = directions[:, kept] / np.sqrt(max(strength[-1], 1e-12))
    blocks = [(values[first : first + BLOCK] - center) @ turned for first in range(0, len(values), BLOCK)]
    return np.concatenate(blocks).astype(np.float32)


def predicted(inputs: np.ndarray, targets: np.ndarray, fold: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Targets as a ridge regression tells them, fold by fold from the rows of the others.

    Args:
        inputs: (n, P), standardised inside.
        targets: (n, T) at mean 0 and deviation 1.
        fold: (n,) the fold of each row.
        weight: (n,) how much to learn from it.

    Returns:
        (n, T).
    """
    spread = inputs.std(axis=0)
    scaled = np.divide(inputs - inputs.mean(axis=0), spread, out=np.zeros(inputs.shape), where=spread > 1e-6)
    design = np.concatenate([np.ones((len(inputs), 1)), np.clip(scaled, -6, 6)], axis=1)
    found = np.zeros(targets.shape)
    for number in np.unique(fold):
        own = fold == number
        others, trusted = design[~own], design[~own] * weight[~own, None]
        square = trusted.T @ others
        square[np.diag_indices(len(square))] += RIDGE * np.trace(square) / len(square) + 1e-9
        found[own] = design[own] @ np.linalg.solve(square, trusted.T @ targets[~own])
    return found
