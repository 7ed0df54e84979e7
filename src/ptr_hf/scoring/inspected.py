"""An inspection beside the truth about what was done to the demonstrations, and what it is worth in simulation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import roc_auc_score

from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import CLEAN, corruption_kinds, is_kind, run_label
from ptr_hf.report.panels import loss_panel
from ptr_hf.report.style import BLUE, INK, KIND_COLOURS, TEXT_SIZE, TICK_SIZE, board, name_axes, run_style, say_absent
from ptr_hf.report.text import drawable
from ptr_hf.scoring.dataset_scores import DatasetScores

SUCCESS = "success on held-out starts"
SUCCESS_OF_TASK = "success, "
AUC = "AUC, bad episodes have a lower z (chance 0.5)"
INSPECTION_CAPTION = (
    "Left: z of every episode as the inspection found it before training, by what was done to the episode (several things "
    "count for each); open circles keep their full weight. Middle: action loss, weighted where there are weights. Right: "
    "success in simulation on starts that no demonstration begins at."
)


def inspection_by_truth(scores: DatasetScores, truth: Mapping[int, str]) -> dict[str, float]:
    """How well an inspection of one dataset tells what was done to its episodes: AUC of z, and shares that weigh less.

    Args:
        scores: of the dataset.
        truth: kind of every episode, several joined by `+`; an AUC is NaN where one class is absent.

    Raises:
        ValueError: the truth leaves out scored episodes.
    """
    labels, z, flagged = _labelled(scores, truth)
    bad = labels != CLEAN
    found = {AUC: _auc(bad, z)}
    for kind in corruption_kinds(truth):
        own = _of_kind(labels, kind)
        found[f"AUC, {kind.replace('_', ' ')}"] = _auc(own[own | ~bad], z[own | ~bad])
    return found | {
        "bad episodes that weigh less": _share(flagged[bad]),
        "clean episodes that weigh less": _share(flagged[~bad]),
    }


def inspection_figure(
    scores: DatasetScores,
    truth: Mapping[int, str],
    dynamics: Dynamics,
    results: Mapping[str, Mapping[str, float]],
) -> Figure:
    """One picture: who is bad, what is learned from the others, and what that is worth.

    Args:
        scores: of the dataset that the runs were trained on.
        truth: kind of every episode.
        dynamics: of all runs.
        results: run -> name -> value, with `SUCCESS` and, for every task, `SUCCESS_OF_TASK` and its name.
    """
    figure, axes = board(1, 3, 11.0, 4.2)
    _z_panel(axes[0], scores, truth)
    loss_panel(axes[1], dynamics)
    _success_panel(axes[2], results)
    return figure


def _z_panel(ax: Axes, scores: DatasetScores, truth: Mapping[int, str]) -> None:
    labels, z, flagged = _labelled(scores, truth)
    name_axes(ax, f"Who is bad? AUC {_auc(labels != CLEAN, z):.3f}", x="z of the worst question (lower is worse)")
    kinds = (CLEAN, *corruption_kinds(truth))
    draws = np.random.default_rng(0)
    for place, kind in enumerate(kinds):
        colour = BLUE if kind == CLEAN else KIND_COLOURS[(place - 1) % len(KIND_COLOURS)]
        own = _of_kind(labels, kind)
        height = len(kinds) - 1 - place + draws.uniform(-0.28, 0.28, len(labels))
        for chosen, face in ((own & flagged, colour), (own & ~flagged, "none")):
            ax.scatter(z[chosen], height[chosen], s=13, facecolors=face, edgecolors=colour, alpha=0.7, linewidths=0.8)
    ax.set_ylim(-0.5, len(kinds) - 0.5)
    names = [f"{drawable(kind.replace('_', ' '), 20)}\n{_of_kind(labels, kind).sum()} episodes" for kind in kinds]
    ax.set_yticks(range(len(kinds)), names[::-1])
    ax.tick_params(axis="y", length=0, labelsize=TICK_SIZE)
    ax.grid(visible=False)


def _success_panel(ax: Axes, results: Mapping[str, Mapping[str, float]]) -> None:
    name_axes(ax, "Success on held-out starts")
    measured = {run: values for run, values in results.items() if SUCCESS in values}
    if not measured:
        say_absent(ax, "not measured")
        return
    names = [name for name in next(iter(measured.values())) if name == SUCCESS or name.startswith(SUCCESS_OF_TASK)]
    width = 0.8 / len(measured)
    for place, (run, values) in enumerate(measured.items()):
        colour, _ = run_style(run, tuple(measured))
        heights = np.arange(len(names))[::-1] + (len(measured) / 2 - place - 0.5) * width
        label = drawable(run_label(run))
        ax.barh(heights, [values[name] for name in names], height=width, color=colour, label=label)
        ax.text(
            values[SUCCESS] + 0.02, heights[0], f"{values[SUCCESS]:.0%}", va="center", fontsize=TEXT_SIZE, color=INK
        )
    shown = ["all tasks" if name == SUCCESS else drawable(name.removeprefix(SUCCESS_OF_TASK)) for name in names]
    ax.set_yticks(range(len(names)), shown[::-1])
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0.0, 1.0)
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    ax.grid(visible=False, axis="y")
    ax.legend(
        fontsize=TICK_SIZE, frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.4, -0.07), ncols=2
    )


def _labelled(scores: DatasetScores, truth: Mapping[int, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    episodes: Any = scores.episodes
    missing = sorted(set(episodes["episode_index"]) - set(truth))
    if missing:
        raise ValueError(f"The truth says nothing about {len(missing)} of the episodes (the first is {missing[0]}).")
    labels = np.array([truth[episode] for episode in episodes["episode_index"]])
    return labels, episodes["z"].to_numpy(float), (episodes["weight"] < 1).to_numpy()


def _of_kind(labels: np.ndarray, kind: str) -> np.ndarray:
    return np.array([is_kind(label, kind) for label in labels], dtype=bool)


def _share(flagged: np.ndarray) -> float:
    return float(flagged.mean()) if len(flagged) else float("nan")


def _auc(bad: np.ndarray, z: np.ndarray) -> float:
    known = np.isfinite(z)
    bad, z = bad[known], z[known]
    return float(roc_auc_score(bad, -z)) if bad.any() and not bad.all() else float("nan")
