"""Does every source get its due? Shares of chunks and of weight per source and task, over training and at its end."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import main_run
from ptr_hf.report.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    board,
    curve,
    legend,
    name_axes,
    running_mean,
    step_axis,
)
from ptr_hf.report.text import drawable

Kind = Literal["sources", "tasks"]
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, GREY, INK)
DRAWN = len(COLOURS)
"""Sources that the figure shows, those with the most chunks."""
LONGEST_NAME = 30
RATIO_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SOURCES_CAPTION = (
    "Does every source get its due? First panel: q(m) / π(m), a source's share of the weight over its share of the chunks; "
    "1 is its due. Other panels: q(m), coloured, beside π(m), dashed; the grey band is where Eq. 30 keeps q(m). Faint lines are "
    "logged values, strong ones their running mean."
)


class GroupShare(NamedTuple):
    """How a source or task fared, as means over some logging windows.

    `share` is π(m), its part of the chunks, `weight_share` q(m), its part of the weight in the action loss; `weight`, `score`
    (T) and `loss` are means over its chunks, `at_floor` and `at_ceiling` fractions of its weights. NaN where nothing was
    logged.
    """

    name: str
    chunks: int
    share: float
    weight_share: float
    weight: float
    score: float
    loss: float
    at_floor: float
    at_ceiling: float

    @property
    def ratio(self) -> float:
        """q(m) / π(m), which Eq. 30 bounds."""
        return self.weight_share / self.share if self.share > 0.0 else math.nan


def group_shares(dynamics: Dynamics, run: str, kind: Kind = "sources", share: float = 0.1) -> tuple[GroupShare, ...]:
    """Every source or task over the last `share` of the run's logged rows (at least one); empty where none was logged.

    Shares are means over the rows, a group that a row leaves out having had none; what is measured per chunk is weighed by the
    chunks of each row, T and the fractions by those with a recorded future. Sources are in the mixture's order, tasks by their
    number of chunks.
    """
    rows = _rows(dynamics, run, kind)
    rows = rows[-max(1, round(share * len(rows))) :]
    found = []
    for name in _names(rows):
        own = [group for row in rows for group in row if group["name"] == name]
        means = {
            field: _mean([(group[field], group[count]) for group in own])
            for field, count in (
                ("weight", "chunks"),
                ("loss", "chunks"),
                ("score", "targets"),
                ("at_floor", "targets"),
                ("at_ceiling", "targets"),
            )
        }
        shares = {field: sum(group[field] or 0.0 for group in own) / len(rows) for field in ("share", "weight_share")}
        found.append(GroupShare(name=name, chunks=sum(group["chunks"] for group in own), **shares, **means))
    return tuple(found if kind == "sources" else sorted(found, key=lambda group: -group.chunks))


def logged_share_bound(dynamics: Dynamics, run: str) -> float:
    """The factor that q(m) and π(m) differ by at most either way (Eq. 30), as last logged; NaN where none was."""
    values = dynamics.column("share_bound", run)
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan


def sources_figure(dynamics: Dynamics) -> Figure | None:
    """q(m) and π(m) of every source over training, of the run the report is about; None where there is one source.

    Of more than eight sources the eight with the most chunks are drawn.
    """
    run = main_run(dynamics)
    most = sorted(group_shares(dynamics, run, share=1.0), key=lambda group: -group.chunks)[:DRAWN]
    names = [group.name for group in group_shares(dynamics, run, share=1.0) if group in most]
    if not names:
        return None
    bound = logged_share_bound(dynamics, run)
    columns = 2 if len(names) == 3 else 3
    rows = math.ceil((1 + len(names)) / columns)
    figure, axes = board(rows, columns, 11.0, 2.9 * rows)
    series = {name: _series(dynamics, run, name) for name in names}
    _ratio_panel(axes[0], series, bound)
    for ax, (name, (steps, share, weight_share)), colour in zip(axes[1:], series.items(), COLOURS, strict=False):
        _share_panel(ax, name, steps, share, weight_share, bound, colour)
    legend(axes[1])
    for ax in axes[1 + len(names) :]:
        ax.set_axis_off()
    return figure


def _ratio_panel(ax: Axes, series: "dict[str, _Series]", bound: float) -> None:
    name_axes(ax, "q(m) / π(m) of every source")
    lowest, highest = 0.8, 1.25
    for (name, (steps, share, weight_share)), colour in zip(series.items(), COLOURS, strict=False):
        ratio = weight_share / np.where(share > 0.0, share, np.nan)
        curve(ax, steps, ratio, colour, drawable(name, LONGEST_NAME))
        smooth = running_mean(ratio, max(1, len(ratio) // 25))
        if np.isfinite(smooth).any():
            lowest, highest = min(lowest, float(np.nanmin(smooth))), max(highest, float(np.nanmax(smooth)))
    ax.axhline(1.0, color=INK, linewidth=1.0)
    low, high = lowest / 1.15, highest * 1.15
    for edge in (1.0 / bound, bound):
        if low <= edge <= high and bound > 1.0:
            ax.axhline(edge, color=INK, linewidth=1.0, linestyle=":")
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ticks = [tick for tick in RATIO_TICKS if low <= tick <= high]
    ax.set_yticks(ticks if len(ticks) > 2 else [0.8, 0.9, 1.0, 1.1, 1.25])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    if math.isfinite(bound):
        ax.plot([], [], ":", color=INK, linewidth=1.0, label=f"bounds {1 / bound:.3g} and {bound:.3g}")
    step_axis(ax)
    legend(ax)


def _share_panel(
    ax: Axes,
    name: str,
    steps: Float[np.ndarray, " rows"],
    share: Float[np.ndarray, " rows"],
    weight_share: Float[np.ndarray, " rows"],
    bound: float,
    colour: str,
) -> None:
    name_axes(ax, drawable(name, LONGEST_NAME))
    if math.isfinite(bound):
        level = running_mean(share, max(1, len(share) // 25))
        high = np.minimum(1.0, level * bound)
        ax.fill_between(steps, level / bound, high, color=FAINT, alpha=0.4, linewidth=0, label="bound on q(m)")
    curve(ax, steps, share, INK, "π(m), of the chunks", "--")
    curve(ax, steps, weight_share, colour, "q(m), of the weight")
    ax.set_ylim(0.0, min(1.02, 1.5 * float(np.nanmax([*share, *weight_share, 0.01]))))
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    step_axis(ax)


type _Series = tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]


def _series(dynamics: Dynamics, run: str, name: str) -> _Series:
    """Steps, π and q of a source; a row that leaves it out is a gap."""
    steps = dynamics.steps(run)
    rows = dynamics.groups("sources", run)
    found = [next((group for group in row or () if group["name"] == name), None) for row in rows]
    share, weight_share = (
        np.array([math.nan if group is None or group[field] is None else group[field] for group in found])
        for field in ("share", "weight_share")
    )
    return steps.astype(np.float64), share, weight_share


def _rows(dynamics: Dynamics, run: str, kind: Kind) -> list[list[dict[str, Any]]]:
    return [row for row in dynamics.groups(kind, run) if row]


def _names(rows: list[list[dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(group["name"] for row in rows for group in row))


def _mean(values: list[tuple[float | None, int]]) -> float:
    known = [(value, count) for value, count in values if value is not None and count]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else math.nan
