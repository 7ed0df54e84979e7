"""The figures of the page: a panel a condition, a row a preset, methods and controls told apart by colour and marker."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.corruption.report.presets import origin
from benchmarks.corruption.report.runs import BIN_EDGES, Runs
from benchmarks.corruption.report.statistics import estimate, paired
from benchmarks.corruption.report.variants import SweepPoint
from ptr_hf.report.panels import weight_axis
from ptr_hf.report.style import BLUE, GREEN, GREY, INK, ORANGE, TEXT_SIZE, TICK_SIZE, board, name_axes, say_absent

LOOKS: dict[str, tuple[str, str, str]] = {
    "baseline": (GREY, "s", "SFT"),
    "paper": (BLUE, "o", "the paper's"),
    "ours": (GREEN, "D", "ours"),
    "control": (ORANGE, "^", "controls"),
    "bound": (INK, "*", "oracle"),
}
COLUMNS = 4
Panel = Callable[[Axes, str], None]


def success_figure(runs: Runs) -> Figure:
    """Mean success ± SE over single seeds (faint), with the lines of SFT and the oracle."""

    def panel(ax: Axes, condition: str) -> None:
        for place, name in enumerate(reversed(runs.presets)):
            values = runs.success(name, condition)
            if found := estimate(values):
                colour, marker, _ = LOOKS[origin(runs, name)]
                ax.plot(
                    [100 * value for value in values.values()],
                    np.full(len(values), place),
                    ".",
                    color=colour,
                    alpha=0.35,
                )
                error = 0.0 if math.isnan(found.se) else 100 * found.se
                ax.errorbar(100 * found.mean, place, xerr=error, fmt=marker, color=colour, capsize=2.5, markersize=6)
        for name, line in (("sft", "--"), ("oracle", ":")):
            if level := estimate(runs.success(name, condition)):
                ax.axvline(
                    100 * level.mean, linestyle=line, color=LOOKS[origin(runs, name)][0], linewidth=1.1, zorder=0
                )
        ax.set_xlabel("success (%)", fontsize=TEXT_SIZE, color=INK)

    return _panels(runs, runs.conditions, runs.presets, panel)


def difference_figure(runs: Runs) -> Figure:
    """Paired differences to SFT with 95 % intervals; filled where the interval leaves out 0."""
    names = tuple(name for name in runs.presets if name != "sft")

    def panel(ax: Axes, condition: str) -> None:
        ax.axvline(0.0, color=GREY, linestyle="--", linewidth=1.1, zorder=0)
        for place, name in enumerate(reversed(names)):
            found = paired(runs.success(name, condition), runs.success("sft", condition))
            if found is None:
                continue
            colour, marker, _ = LOOKS[origin(runs, name)]
            half = 0.0 if math.isnan(found.low) else 100 * (found.high - found.mean)
            face = "white" if found.undecided else colour
            ax.errorbar(
                100 * found.mean, place, xerr=half, fmt=marker, color=colour, mfc=face, capsize=2.5, markersize=6
            )
        ax.set_xlabel("difference to SFT (pp)", fontsize=TEXT_SIZE, color=INK)

    figure = _panels(runs, runs.conditions, names, panel)
    drawn = [ax for ax in figure.axes if ax.axison]
    limits = [ax.get_xlim() for ax in drawn]
    for ax in drawn:
        ax.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    return figure


def auc_figure(runs: Runs) -> Figure | None:
    """AUC of the weights by episode and by chunk, at a quarter and at the end of training; None without any."""
    conditions = runs.corrupted
    names = tuple(
        name for name in runs.presets if any(runs.values("auc_episode", name, condition) for condition in conditions)
    )
    if not names:
        return None

    def panel(ax: Axes, condition: str) -> None:
        ax.axvline(0.5, color=GREY, linestyle="--", linewidth=1.1, zorder=0)
        for place, name in enumerate(reversed(names)):
            for number, marker, shift in (("auc_episode", "o", 0.14), ("auc_chunk", "s", -0.14)):
                colour = LOOKS[origin(runs, name)][0]
                end = estimate(runs.values(number, name, condition))
                start = estimate(runs.values(f"{number}_25", name, condition))
                if end and start:
                    ax.plot([start.mean, end.mean], [place + shift] * 2, color=colour, linewidth=1.0, alpha=0.6)
                for found, face in ((start, "white"), (end, colour)):
                    if found:
                        ax.plot(found.mean, place + shift, marker, color=colour, mfc=face, markersize=5)
        ax.set_xlim(-0.03, 1.03)
        ax.set_xlabel("AUC", fontsize=TEXT_SIZE, color=INK)

    return _panels(runs, conditions, names, panel, marker="s")


def weight_figure(runs: Runs) -> Figure | None:
    """The distribution of the weights at the end of training, all seeds together; None without any."""
    names = tuple(
        name
        for name in runs.presets
        if any(runs.histogram(name, condition) is not None for condition in runs.conditions)
    )
    if not names:
        return None

    def panel(ax: Axes, condition: str) -> None:
        for place, name in enumerate(reversed(names)):
            share = runs.histogram(name, condition)
            if share is not None:
                colour = LOOKS[origin(runs, name)][0]
                ax.stairs(
                    place - 0.4 + 0.8 * share / share.max(), BIN_EDGES, baseline=place - 0.4, fill=True, color=colour
                )
        ax.set_xlabel("weight", fontsize=TEXT_SIZE, color=INK)
        weight_axis(ax, float(BIN_EDGES[0]), float(BIN_EDGES[-1]))
        ax.axvline(1.0, color=GREY, linestyle="--", linewidth=1.0, zorder=0)

    return _panels(runs, runs.conditions, names, panel, marker="s")


def sweep_figure(runs: Runs, condition: str, swept: Sequence[SweepPoint]) -> Figure:
    """Success ± SE over the value of each swept setting; the preset's own value is filled."""
    settings = tuple(dict.fromkeys(point.setting for point in swept))
    columns = min(COLUMNS, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure, axes = board(rows, columns, max(4.0, 2.9 * columns), 2.7 * rows)
    for ax, setting in zip(axes, settings, strict=False):
        points = [point for point in swept if point.setting == setting]
        found = [estimate(runs.success(point.run, condition)) for point in points]
        measured = [(point, value) for point, value in zip(points, found, strict=True) if value is not None]
        ax.plot(
            [point.value for point, _ in measured],
            [100 * value.mean for _, value in measured],
            color=BLUE,
            linewidth=1.2,
        )
        for point, value in measured:
            error = 0.0 if math.isnan(value.se) else 100 * value.se
            face = BLUE if point.run == point.base else "white"
            ax.errorbar(point.value, 100 * value.mean, yerr=error, fmt="o", color=BLUE, mfc=face, capsize=2.5)
        name_axes(ax, setting, x="value")
        ax.set_ylabel("success (%)", fontsize=TEXT_SIZE, color=INK)
    for ax in axes[len(settings) :]:
        ax.set_axis_off()
    return figure


def _panels(
    runs: Runs, conditions: Sequence[str], names: Sequence[str], panel: Panel, marker: str | None = None
) -> Figure:
    """A panel a condition, presets named at the left of every row; `marker` where the marker does not tell whose they are."""
    columns = max(1, min(COLUMNS, len(conditions)))
    rows = max(1, math.ceil(len(conditions) / columns))
    width = 2.0 + 2.3 * columns
    figure, axes = board(rows, columns, max(6.6, width), rows * (1.1 + 0.27 * len(names)) + 0.4)
    for place, (ax, condition) in enumerate(zip(axes, conditions, strict=False)):
        name_axes(ax, condition)
        if not any(runs.of(name, condition) for name in names):
            say_absent(ax, "not run")
            continue
        panel(ax, condition)
        ax.set_ylim(-0.7, len(names) - 0.3)
        left = place % columns == 0
        ax.set_yticks(range(len(names)), list(reversed(names)) if left else [""] * len(names))
        ax.tick_params(axis="y", length=0, labelsize=TICK_SIZE)
        ax.tick_params(axis="x", labelsize=TICK_SIZE)
        ax.grid(axis="y", color="#EEEEEE", linewidth=0.7)
    for ax in axes[len(conditions) :]:
        ax.set_axis_off()
    shown = dict.fromkeys(origin(runs, name) for name in names)
    handles = [
        Line2D([], [], color=LOOKS[kind][0], marker=marker or LOOKS[kind][1], linestyle="", label=LOOKS[kind][2])
        for kind in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=TEXT_SIZE)
    return figure
