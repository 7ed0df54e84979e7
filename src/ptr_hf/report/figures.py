"""The figures of a run, each a matplotlib Figure; `save_figure` writes one as PNG."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import corruption_kinds
from ptr_hf.report.panels import (
    accuracy_panel,
    clip_panel,
    controller_panel,
    given_weights_panel,
    loss_panel,
    metric_panel,
    quality_panel,
    score_panel,
    weight_histogram_panel,
)
from ptr_hf.report.style import INK, TITLE_SIZE, board, save_figure
from ptr_hf.report.text import drawable

__all__ = [
    "dynamics_figure",
    "given_weights_figure",
    "save_figure",
    "summary_figure",
    "weight_histogram_figure",
    "weights_by_quality_figure",
]


def dynamics_figure(dynamics: Dynamics, chance: float | None = None) -> Figure:
    """The curves the paper plots over training, all runs together.

    `chance` is the identification accuracy of guessing, 1 / |Y|; with it the chance line and T's upper bound log |Y|
    are drawn. Columns that no run logged leave a panel that says so.
    """
    check_chance(chance)
    figure, axes = board(3, 3, 11.0, 8.4)
    accuracy_panel(axes[0], dynamics, chance)
    score_panel(axes[1], dynamics, chance)
    metric_panel(axes[2], dynamics, "margin", "Margin to the best other", "logits")
    loss_panel(axes[3], dynamics)
    metric_panel(axes[4], dynamics, "belief_entropy", "Belief entropy $H_{tok}$", "nats")
    clip_panel(axes[5], dynamics)
    metric_panel(axes[6], dynamics, "temperature", "Temperature τ")
    metric_panel(axes[7], dynamics, "beta", "Weight scale β", "nats")
    metric_panel(axes[8], dynamics, "hard_negative_ratio", "Hard-negative ratio ρ", percent=True)
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


def summary_figure(
    dynamics: Dynamics,
    scores: ChunkScores | None = None,
    truth: Mapping[int, str] | None = None,
    chance: float | None = None,
    title: str = "",
) -> Figure:
    """One picture of a run, made for a README's width: the scorer learns, the weights spread, and whom they trust.

    The last panel shows the weights by quality where `scores` and `truth` are given, the belief's entropy otherwise.
    """
    check_chance(chance)
    figure, axes = board(2, 3, 11.0, 6.0)
    if title:
        figure.suptitle(drawable(title), fontsize=TITLE_SIZE + 2.0, color=INK, fontweight="bold")
    accuracy_panel(axes[0], dynamics, chance)
    score_panel(axes[1], dynamics, chance)
    loss_panel(axes[2], dynamics)
    controller_panel(axes[3], dynamics)
    weight_histogram_panel(axes[4], dynamics)
    if scores is not None and truth is not None:
        quality_panel(axes[5], scores, truth, compact=True)
    else:
        metric_panel(axes[5], dynamics, "belief_entropy", "Belief entropy $H_{tok}$", "nats")
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
