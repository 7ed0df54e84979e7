"""The figures of a run, each a matplotlib Figure; `save_figure` writes one as PNG."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import corruption_kinds
from ptr_hf.report.panels import (
    accuracy_panel,
    clip_panel,
    given_weights_panel,
    loss_panel,
    metric_panel,
    quality_panel,
    score_panel,
    weight_histogram_panel,
)
from ptr_hf.report.style import board


def dynamics_figure(dynamics: Dynamics, chance: float | None = None) -> Figure:
    """The curves the paper plots over training, all runs together: a panel of every column that some run has logged.

    `chance` is the identification accuracy of guessing, 1 / |Y|; with it the chance line and T's upper bound log |Y|
    are drawn.
    """
    check_chance(chance)
    panels: dict[str, Callable[[Axes], None]] = {
        "accuracy": lambda ax: accuracy_panel(ax, dynamics, chance),
        "score": lambda ax: score_panel(ax, dynamics, chance),
        "margin": lambda ax: metric_panel(ax, dynamics, "margin", "Margin to the best other", "logits"),
        "loss_action": lambda ax: loss_panel(ax, dynamics),
        "belief_entropy": lambda ax: metric_panel(ax, dynamics, "belief_entropy", "Belief entropy $H_{tok}$", "nats"),
        "effective_sample_size": lambda ax: clip_panel(ax, dynamics),
        "temperature": lambda ax: metric_panel(ax, dynamics, "temperature", "Temperature τ"),
        "beta": lambda ax: metric_panel(ax, dynamics, "beta", "Weight scale β", "nats"),
        "hard_negative_ratio": lambda ax: metric_panel(
            ax, dynamics, "hard_negative_ratio", "Hard-negative ratio ρ", percent=True
        ),
    }
    logged = [draw for name, draw in panels.items() if any(dynamics.logged(name, run) for run in dynamics.runs)]
    # without any, the panel that says so
    shown = logged or [panels["loss_action"]]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = board(rows, columns, 11.0 if columns == 3 else 5.0 * columns, 0.6 + 2.6 * rows)
    for ax, draw in zip(axes, shown, strict=False):
        draw(ax)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


def weight_histogram_figure(dynamics: Dynamics) -> Figure:
    """The weights of the first and the last tenth of training (warm-up left out) between their bounds."""
    figure, axes = board(1, 1, 6.4, 3.6)
    weight_histogram_panel(axes[0], dynamics)
    return figure


def weights_by_quality_figure(scores: ChunkScores, truth: Mapping[int, str]) -> Figure:
    """Weights of clean data and of each kind of corruption, one row each, with the AUC of telling them apart.

    Needs a truth entry for every scored episode (ValueError otherwise).
    """
    figure, axes = board(1, 1, 7.2, 1.5 + 0.95 * (1 + len(corruption_kinds(truth))))
    quality_panel(axes[0], scores, truth)
    return figure


def given_weights_figure(dynamics: Dynamics, record: Mapping[str, Any]) -> Figure:
    """A run whose weights were known before training: their distribution, the action loss, the effective sample size."""
    figure, axes = board(1, 3, 11.0, 3.4)
    given_weights_panel(axes[0], record)
    loss_panel(axes[1], dynamics)
    clip_panel(axes[2], dynamics)
    return figure


def check_chance(chance: float | None) -> None:
    """Raise ValueError unless the chance of a right guess lies in (0, 1]."""
    if chance is not None and not 0.0 < chance <= 1.0:
        raise ValueError(f"The chance of a right guess is 1 / |Y| in (0, 1], got {chance}.")
