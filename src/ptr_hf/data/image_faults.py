"""Faults that only the pictures of a camera show: it was moved, it hung, it shows something else. Pure functions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

Pictures = UInt8[np.ndarray, "steps height width 3"]


def shifted(pictures: Pictures, down: int, right: int) -> Pictures:
    """Every picture moved by so many pixels, as if the camera had been turned; its edge fills what comes into view."""
    rows = np.clip(np.arange(pictures.shape[1]) - down, 0, pictures.shape[1] - 1)
    columns = np.clip(np.arange(pictures.shape[2]) - right, 0, pictures.shape[2] - 1)
    return pictures[:, rows][:, :, columns]


def draw_shift(size: Sequence[int], seed: int, shift: float) -> tuple[int, int]:
    """Pixels down and right, in a drawn direction, as far as a share `shift` of the shorter side of (height, width)."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    far = shift * min(size)
    return round(far * np.sin(angle)), round(far * np.cos(angle))


def frozen(pictures: Pictures, start: int, steps: int) -> Pictures:
    """The picture of step `start` for `steps` steps; after them the camera shows the present again."""
    source = np.arange(len(pictures))
    source[start : start + steps] = start
    return pictures[source]


def held(pictures: Pictures, steps: int) -> UInt8[np.ndarray, "held height width 3"]:
    """The first `steps` pictures, or all and then the last one again and again."""
    return pictures[np.minimum(np.arange(steps), len(pictures) - 1)]


def draw_stretch(length: int, seed: int, share: float) -> tuple[int, int]:
    """First step and number of steps of a stretch of an episode, as long as a share of its `length`.

    Raises:
        ValueError: if the share is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"A stretch is a share of the episode above 0 and at most 1, not {share}.")
    steps = max(1, round(share * length))
    return int(np.random.default_rng(seed).integers(0, length - steps, endpoint=True)), steps
