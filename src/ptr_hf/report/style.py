"""How the figures look: Figure objects drawn by Agg, no pyplot state, colours that colour-blind readers can tell."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ptr_hf.report.files import replacing

# Okabe and Ito's palette; the baseline is grey and dashed so that it also reads without colour.
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK, FAINT = "#7A7A7A", "#222222", "#DDDDDD"
KIND_COLOURS = (VERMILION, PINK, ORANGE, GREEN, SKY)
TITLE_SIZE, TEXT_SIZE, TICK_SIZE = 11.0, 9.5, 9.0


def board(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` × `columns` styled axes (row by row), `width` × `height` in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(labelsize=TICK_SIZE, color=GREY, labelcolor=INK)
        ax.grid(axis="y", color=FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def name_axes(ax: Axes, title: str, unit: str = "", x: str = "") -> None:
    """Title with its unit to the left above the axes, where there is most room."""
    label = f"{title} ({unit})" if unit else title
    ax.set_title(label, fontsize=TITLE_SIZE, loc="left", color=INK, fontweight="bold")
    if x:
        ax.set_xlabel(x, fontsize=TEXT_SIZE, color=INK)


def step_axis(ax: Axes) -> None:
    """Whole training steps, thousands as `k`."""
    ax.set_xlabel("training step", fontsize=TEXT_SIZE, color=INK)
    left, right = ax.get_xlim()
    if right - left < 2.0:
        # A single logged step has no extent of its own.
        middle = round((left + right) / 2.0)
        ax.set_xlim(middle - 1.5, middle + 1.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend(ax: Axes) -> None:
    """A legend without a frame, for axes that hold labelled artists."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=TICK_SIZE, frameon=False, handlelength=1.8, labelcolor=INK)


def log_ticks(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of every decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def say_absent(ax: Axes, reason: str) -> None:
    """Instead of an empty plot, a line that says why there is none."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", fontsize=TEXT_SIZE, color=GREY)


def curve(
    ax: Axes,
    x: Float[np.ndarray, " rows"],
    y: Float[np.ndarray, " rows"],
    colour: str,
    label: str | None = None,
    line: str = "-",
    smooth: bool = True,
) -> None:
    """The logged values, faint, under their running mean; short runs and settings are drawn as they are.

    Values that are not finite leave a gap.
    """
    window = len(y) // 25
    if window < 3 or not smooth:
        marker = "o" if len(y) <= 12 else None
        ax.plot(x, y, line, color=colour, label=label, linewidth=1.8, marker=marker, markersize=3.5)
        return
    ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    ax.plot(x, running_mean(y, window), line, color=colour, label=label, linewidth=1.9)


def running_mean(values: Float[np.ndarray, " rows"], window: int) -> Float[np.ndarray, " rows"]:
    """Centred mean over at most `window` (rounded up to odd) finite values; NaN stays NaN."""
    half = window // 2
    finite = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(finite.astype(np.float64), kernel)[half : half + len(values)]
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def run_style(run: str, runs: Sequence[str]) -> tuple[str, str]:
    """Colour and line of a run: SFT grey and dashed, PTR blue, others by their place."""
    if run == "sft":
        return GREY, "--"
    others = [name for name in runs if name not in ("sft", "ptr")]
    return (BLUE, "-") if run == "ptr" else ((GREEN, ORANGE, PINK, SKY, VERMILION)[others.index(run) % 5], "-")


def save_figure(figure: Figure, path: str | Path, dpi: int = 160) -> Path:
    """Write a PNG in one move and return its path; at 160 dpi the summary is sharp at twice a README's width.

    Raises ValueError for a path that does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"Figures are saved as PNG, got {path.name!r}: give a path that ends in .png.")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")
    return path
