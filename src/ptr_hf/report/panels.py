"""The panels of the figures: each draws one question into given axes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import Dynamics, WeightCounts, weight_bin_edges, weight_histogram
from ptr_hf.report.evaluation import (
    CLEAN,
    corruption_kinds,
    detection,
    episode_weights,
    is_kind,
    main_run,
    ordered_runs,
    quality_labels,
    run_label,
)
from ptr_hf.report.style import (
    BLUE,
    GREY,
    INK,
    KIND_COLOURS,
    ORANGE,
    SKY,
    TEXT_SIZE,
    TICK_SIZE,
    curve,
    legend,
    log_ticks,
    name_axes,
    run_style,
    say_absent,
    step_axis,
)
from ptr_hf.report.text import drawable

LONGEST_NAME = 30
SETTINGS = ("temperature", "beta", "hard_negative_ratio")


def metric_panel(ax: Axes, dynamics: Dynamics, column: str, title: str, unit: str = "", percent: bool = False) -> None:
    """One column over training, every run that logged it; what the controller sets is drawn as it was set."""
    name_axes(ax, title, unit)
    runs = [run for run in ordered_runs(dynamics) if dynamics.logged(column, run)]
    if not runs:
        say_absent(ax, "not logged by these runs")
        return
    for run in runs:
        colour, line = run_style(run, dynamics.runs)
        steps = dynamics.steps(run).astype(np.float64)
        label = drawable(run_label(run)) if len(runs) > 1 else None
        curve(ax, steps, dynamics.column(column, run), colour, label, line, smooth=column not in SETTINGS)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    step_axis(ax)
    legend(ax)


def accuracy_panel(ax: Axes, dynamics: Dynamics, chance: float | None = None) -> None:
    """How often the match has the top logit, over the share that guessing reaches."""
    metric_panel(ax, dynamics, "accuracy", "Identification accuracy", percent=True)
    if ax.axison:
        if chance is not None:
            ax.axhline(chance, color=INK, linewidth=1.0, linestyle=":", label=f"chance ({chance:.1%})")
            legend(ax)
        ax.set_ylim(bottom=0.0)


def score_panel(ax: Axes, dynamics: Dynamics, chance: float | None = None) -> None:
    """Mean T, between 0 (the posterior is uniform) and log |Y| (the match is certain)."""
    metric_panel(ax, dynamics, "score", "Mean score T", "nats")
    if ax.axison:
        ax.axhline(0.0, color=INK, linewidth=1.0, linestyle=":")
        if chance is not None:
            ax.axhline(-math.log(chance), color=INK, linewidth=1.0, linestyle=":", label="upper bound log |Y|")
            legend(ax)


def loss_panel(ax: Axes, dynamics: Dynamics) -> None:
    """Action loss of all runs; logarithmic when it falls by more than a factor of ten."""
    metric_panel(ax, dynamics, "loss_action", "Action loss")
    values = np.concatenate([dynamics.column("loss_action", run) for run in dynamics.runs])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0.0 and values.max() / values.min() > 10.0:
        log_ticks(ax)


def clip_panel(ax: Axes, dynamics: Dynamics) -> None:
    """How much of the weighting is still a choice: effective sample size, and the shares stuck at either bound."""
    run = main_run(dynamics)
    clips = dynamics.logged("weight_at_floor", run) or dynamics.logged("weight_at_ceiling", run)
    name_axes(ax, "Effective sample size, clipping" if clips else "Effective sample size")
    if not dynamics.logged("effective_sample_size", run):
        say_absent(ax, "no weights in this run")
        return
    steps = dynamics.steps(run).astype(np.float64)
    for column, label, colour, line in (
        ("effective_sample_size", "effective sample size", BLUE, "-"),
        ("weight_at_ceiling", "at upper bound", ORANGE, "--"),
        ("weight_at_floor", "at lower bound", GREY, "-."),
    ):
        if dynamics.logged(column, run):
            curve(ax, steps, dynamics.column(column, run), colour, label, line)
    ax.set_ylim(-0.03, 1.05)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    step_axis(ax)
    legend(ax)


def weight_histogram_panel(ax: Axes, dynamics: Dynamics) -> None:
    """Weights early and late in training, with the bounds they cannot leave."""
    run = main_run(dynamics)
    name_axes(ax, "Weights, early and late", x="weight w")
    counts = dynamics.weight_counts(run)
    if not dynamics.logged("weight_max", run):
        say_absent(ax, "no weights in this run")
        return
    if counts is None:
        say_absent(ax, "all weights are equal (α = 0, or still warming up)")
        return
    early, late = counts
    # A run too short for two windows has only one to show.
    windows = ((early, SKY, "early"), (late, BLUE, "late"))[early.first_step == late.first_step :]
    for part, colour, style in windows:
        share = part.counts / max(1, int(part.counts.sum()))
        ax.stairs(share, part.edges, fill=True, color=colour, alpha=0.35)
        ax.stairs(share, part.edges, color=colour, linewidth=1.5, label=f"{style} ({_steps(part)})")
    weight_axis(ax, float(late.edges[0]), float(late.edges[-1]))
    for bound in (late.edges[0], late.edges[-1]):
        ax.axvline(float(bound), color=INK, linewidth=1.0, linestyle=":")
    ax.set_ylabel("share of chunks", fontsize=TEXT_SIZE, color=INK)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    legend(ax)


def given_weights_panel(ax: Axes, record: Mapping[str, Any]) -> None:
    """The weights of all chunks, of which a run has known before training; the share of chunks is drawn logarithmically."""
    name_axes(ax, "Weights of the data", x="weight w")
    shares, edges = np.asarray(record["histogram"], np.float64), np.asarray(record["edges"], np.float64)
    ax.stairs(shares, edges, fill=True, color=BLUE, alpha=0.45, baseline=0)
    ax.stairs(shares, edges, color=BLUE, linewidth=1.5, baseline=0)
    ax.set_xlim(float(edges[0]), float(edges[-1]))
    ax.set_ylim(0.0, 1.12)
    ax.set_ylabel("share of chunks", fontsize=TEXT_SIZE, color=INK)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    below, size = float(record["below"]), float(record["effective_sample_size"])
    words = f"{below:.1%} weigh less than 1\neffective sample size {size:.1%}"
    ax.text(0.03, 0.96, words, transform=ax.transAxes, va="top", fontsize=TICK_SIZE, color=INK)


def quality_panel(ax: Axes, scores: ChunkScores, truth: Mapping[int, str]) -> None:
    """Weights of clean data and of every corruption: chunks as a filled density, episodes as dots, and the AUC."""
    name_axes(ax, "Weights by quality of the data", x="weight w")
    labels, means = quality_labels(scores, truth), episode_weights(scores)
    if not (scores.weight[scores.usable] > 0.0).any():
        say_absent(ax, "no scored chunk with a recorded future has a weight")
        return
    weight = scores.weight[scores.usable].astype(np.float64)
    # A logarithmic axis has no zero: weights below a thousandth of the largest stand at its left end.
    lower, upper = max(float(weight[weight > 0.0].min()), float(weight.max()) / 1000.0), float(weight.max())
    edges = weight_bin_edges(lower, upper, 40)
    episodes = zip(scores.source.tolist(), scores.episode_index.tolist(), strict=True)
    label_of_chunk = np.array([labels[episode] for episode in episodes], dtype=object)[scores.usable]
    kinds = [CLEAN, *corruption_kinds(truth)]
    for place, kind in enumerate(kinds):
        colour = BLUE if kind == CLEAN else KIND_COLOURS[(place - 1) % len(KIND_COLOURS)]
        base = float(len(kinds) - 1 - place)
        counts = weight_histogram(weight[[is_kind(label, kind) for label in label_of_chunk]], edges).astype(np.float64)
        if counts.any():
            ax.stairs(base + 0.62 * counts / counts.max(), edges, baseline=base, fill=True, color=colour, alpha=0.55)
        dots = [max(means[episode], lower) for episode, label in labels.items() if is_kind(label, kind)]
        ax.plot(dots, np.full(len(dots), base - 0.1), "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
    weight_axis(ax, float(edges[0]), float(edges[-1]), below=bool((weight < lower).any()))
    ax.set_ylim(-0.35, len(kinds) - 0.25)
    places = np.arange(len(kinds)) + 0.2
    ax.set_yticks(places, [_kind_label(scores, truth, kind) for kind in reversed(kinds)])
    ax.tick_params(axis="y", length=0, labelsize=TICK_SIZE)
    ax.grid(visible=False)


def weight_axis(ax: Axes, lower: float, upper: float, below: bool = False) -> None:
    """Logarithmic, ticked at both ends and at 1; `below` says that the left end also holds smaller weights."""
    ax.set_xscale("log")
    inner = [1.0] if 1.3 * lower < 1.0 < upper / 1.3 else []
    sign = "≤ " if below else ""
    ax.set_xticks([lower, *inner, upper], [f"{sign}{lower:.3g}", *(["1"] if inner else []), f"{upper:.3g}"])
    ax.xaxis.set_minor_locator(NullLocator())


def _kind_label(scores: ChunkScores, truth: Mapping[int, str], kind: str) -> str:
    readable = drawable(kind.replace("_", " "), LONGEST_NAME)
    if kind == CLEAN:
        return f"{readable}\n{detection(scores, truth).clean} episodes"
    found = detection(scores, truth, kind=kind)
    chunks = detection(scores, truth, "chunk", kind)
    aucs = f"{_auc('AUC', found.auc)}, {_auc('by chunk', chunks.auc)}"
    return "\n".join([readable, f"{found.corrupted} episodes", aucs])


def _auc(label: str, value: float) -> str:
    return f"{label} –" if math.isnan(value) else f"{label} {value:.2f}"


def _steps(part: WeightCounts) -> str:
    short = [f"{step / 1000:.3g}k" if step >= 1000 else str(step) for step in (part.first_step, part.last_step)]
    return f"step {short[0]}" if short[0] == short[1] else f"steps {short[0]}–{short[1]}"
