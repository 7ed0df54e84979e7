"""Small drawings as SVG inside the page: they follow its colours, light or dark, and stay sharp at every width."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

type Number = float | int | np.floating

WIDTH, HEIGHT = 500, 120
LEFT, BOTTOM, TOP = 30, 18, 6
LOWEST, HIGHEST, DEEPEST = -8.0, 3.0, -30.0
"""z beyond are drawn at the edge: of distributions, of both, and of curves."""
BINS = 33
LONGEST = 320
"""Points of a line; longer ones are thinned out, minima kept."""


def score_curve(
    z: np.ndarray,
    flagged: np.ndarray,
    window: int,
    fps: float,
    worst: int | None,
    shown: Sequence[int] = (),
    other: np.ndarray | None = None,
) -> Markup:
    """One question's z along an episode.

    Args:
        z: (frames,) of the window that begins at each frame; NaN leaves gaps.
        flagged: (frames,) whether a frame weighs less than 1; shaded.
        window: frames of a window.
        fps: frames per second.
        worst: first frame of the worst window, outlined; None outlines nothing.
        shown: frames of the filmstrip, marked on the axis.
        other: (frames of the good episode,) the same of it, drawn over the whole width.
    """
    length = len(z)
    low = max(DEEPEST, min(-4.0, float(np.nanmin(z)) - 0.5)) if np.isfinite(z).any() else -4.0

    def x(frame: Number) -> Number:
        return LEFT + (WIDTH - LEFT - 2) * frame / max(length - 1, 1)

    def y(value: Number) -> Number:
        return TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - min(max(value, low), HIGHEST)) / (HIGHEST - low)

    parts = []
    for begin, end in _runs(flagged):
        parts.append(_rect(x(begin), TOP, x(end - 1) - x(begin), HEIGHT - TOP - BOTTOM, "span"))
    for value, name in ((0.0, "0"), (-2.33, ""), (np.ceil(low), f"{np.ceil(low):.0f}".replace("-", "−"))):
        parts.append(_line(LEFT, y(value), WIDTH, y(value), "limit" if value == -2.33 else "zero"))
        parts.append(_text(LEFT - 4, y(value) + 4, name, "end"))
    if worst is not None:
        stop = min(worst + window, length - 1)
        parts.append(_rect(x(worst), TOP, max(x(stop) - x(worst), 2), HEIGHT - TOP - BOTTOM, "worst"))
    if other is not None:
        share = max(length - 1, 1) / max(len(other) - 1, 1)
        parts.append(_polyline([(x(frame * share), y(value)) for frame, value in _thinned(other)], "good"))
    parts.append(_polyline([(x(frame), y(value)) for frame, value in _thinned(z)], "curve"))
    parts += [f'<circle cx="{x(frame):.1f}" cy="{HEIGHT - BOTTOM:.1f}" r="3" class="mark"/>' for frame in shown]
    seconds = length / fps
    parts.append(_text(LEFT, HEIGHT - 2, "0 s", "start"))
    parts.append(_text(WIDTH - 2, HEIGHT - 2, f"{seconds:.1f} s", "end"))
    return _svg(WIDTH, HEIGHT, parts, "z along the episode")


def motion(values: np.ndarray, other: np.ndarray | None, name: str) -> Markup:
    """One dimension of an episode's states or actions, with the good episode's behind it, both over their whole length.

    Args:
        values: (frames,).
        other: (frames of the good episode,), or None.
        name: of the dimension.
    """
    width, height = 180, 72
    everything = values if other is None else np.concatenate([values, other])
    low, high = float(everything.min()), float(everything.max())

    def points(series: np.ndarray) -> list[tuple[Number, Number]]:
        places = np.linspace(4, width - 4, len(series))
        return [
            (places[frame], 18 + (height - 24) * (high - value) / max(high - low, 1e-9))
            for frame, value in _thinned(series, both=True)
        ]

    parts = [] if other is None else [_polyline(points(other), "good")]
    parts.append(_polyline(points(values), "bad"))
    parts.append(_text(4, 11, name, "start"))
    return _svg(width, height, parts, name)


def distribution(z: np.ndarray, flagged: np.ndarray) -> Markup:
    """How many episodes have which z in one question; those that are flagged (for whatever reason) in the warning colour.

    Args:
        z: (episodes,); NaN are left out.
        flagged: (episodes,) bool.
    """
    width, height, foot = 300, 110, 18
    edges = np.linspace(LOWEST, HIGHEST, BINS + 1)
    clipped = np.clip(z, LOWEST + 1e-6, HIGHEST - 1e-6)
    known = np.isfinite(z)
    bad = np.histogram(clipped[known & flagged], edges)[0]
    good = np.histogram(clipped[known & ~flagged], edges)[0]
    # square roots: a handful of bad episodes is to be seen beside thousands of good ones
    scale = (height - foot - 8) / np.sqrt(max(int((bad + good).max()), 1))
    parts = [_line(0, height - foot, width, height - foot, "zero")]
    step = width / BINS
    for place, (low, high) in enumerate(zip(bad, good, strict=True)):
        whole = scale * np.sqrt(low + high)
        part = whole * low / max(low + high, 1)
        base = height - foot
        if part:
            parts.append(_rect(place * step + 0.5, base - part, step - 1, part, "bad"))
        if whole > part:
            parts.append(_rect(place * step + 0.5, base - whole, step - 1, whole - part, "good"))
    for value in (-8, -6, -4, -2, 0, 2):
        tick = width * (value - LOWEST) / (HIGHEST - LOWEST)
        anchor = "start" if value == -8 else "middle"
        parts.append(_text(tick, height - 4, (f"≤ {value}" if value == -8 else str(value)).replace("-", "−"), anchor))
    return _svg(width, height, parts, "distribution of z")


def _thinned(values: np.ndarray, both: bool = False) -> list[tuple[int, float]]:
    """At most about LONGEST points, of each block the lowest (and the highest); NaN are left out."""
    block = max(1, -(-len(values) // LONGEST))
    found: list[tuple[int, float]] = []
    for begin in range(0, len(values), block):
        part = values[begin : begin + block]
        if not np.isfinite(part).any():
            continue
        places = {int(np.nanargmin(part)), *([int(np.nanargmax(part))] if both else [])}
        found += [(begin + place, float(part[place])) for place in sorted(places)]
    return found


def _runs(true: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], true, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> Markup:
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>')


def _rect(x: Number, y: Number, width: Number, height: Number, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="1.5" class="{kind}"/>'


def _line(x1: Number, y1: Number, x2: Number, y2: Number, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: Number, y: Number, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _polyline(points: Sequence[tuple[Number, Number]], kind: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'
