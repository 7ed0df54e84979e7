"""What the weights say about the data: detection of known corruptions, shares, and the table of runs side by side."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import DYNAMICS_COLUMNS, Dynamics

CLEAN, SEVERAL = "clean", "+"
Level = Literal["episode", "chunk"]
Episode = tuple[str, int]


class Detection(NamedTuple):
    """AUC of telling corrupted from clean data by a low weight; `reason` says why where the AUC is NaN."""

    auc: float
    corrupted: int
    clean: int
    reason: str = ""


class WeightShare(NamedTuple):
    """How a group of chunks fared: its share of the chunks, and its share of the weight in the loss (Eq. 27).

    `mean_weight` is over the chunks with a recorded future; NaN when there are none.
    """

    name: str
    episodes: int
    chunks: int
    mean_weight: float
    chunk_share: float
    weight_share: float


def episode_weights(scores: ChunkScores) -> dict[Episode, float]:
    """Mean weight of every (source, episode index) over its chunks with a recorded future; NaN when it has none."""
    usable = scores.usable
    return {episode: _mean(scores.weight[rows[usable[rows]]]) for episode, rows in _groups(scores).items()}


def quality_labels(scores: ChunkScores, truth: Mapping[int, str]) -> dict[Episode, str]:
    """The kind of every scored episode: `clean`, or what was done to it, several kinds joined by `+`.

    Raises ValueError when an episode has no entry, or an episode index of `truth` means episodes of several sources.
    """
    episodes = list(_groups(scores))
    indices = [index for _, index in episodes]
    missing = sorted(set(indices) - set(truth))
    if missing:
        raise ValueError(
            f"The truth says nothing about {len(missing)} of the scored episodes (the first is {missing[0]}), "
            f"give every episode its kind, {CLEAN!r} where nothing was done to it."
        )
    if len(set(indices)) < len(indices):
        raise ValueError("Several sources share an episode index, so the truth is ambiguous: evaluate one at a time.")
    return {episode: truth[episode[1]] for episode in episodes}


def detection(
    scores: ChunkScores, truth: Mapping[int, str], level: Level = "episode", kind: str | None = None
) -> Detection:
    """How well a low weight tells corrupted episodes (of one `kind`, or of all) from clean ones.

    An episode with several kinds of corruption counts for each of them.

    At the level `episode` every episode counts once, with its mean weight; at `chunk` every chunk with a recorded
    future does. Ties count half, so weights that all sit at a bound give 0.5.
    """
    if level not in ("episode", "chunk"):
        raise ValueError(f"Unknown level {level!r}, expected 'episode' or 'chunk'.")
    labels = quality_labels(scores, truth)
    usable = scores.usable
    positive, weight = [], []
    for episode, rows in _groups(scores).items():
        values = scores.weight[rows[usable[rows]]].astype(np.float64)
        label = labels[episode]
        if not len(values) or (label != CLEAN and kind is not None and not is_kind(label, kind)):
            continue
        values = values if level == "chunk" else values.mean(keepdims=True)
        weight.append(values)
        positive.append(np.full(len(values), label != CLEAN))
    corrupted = sum(int(part.sum()) for part in positive)
    clean = sum(len(part) for part in positive) - corrupted
    if corrupted and clean:
        auc = roc_auc_score(np.concatenate(positive), -np.concatenate(weight))
        return Detection(float(auc), corrupted, clean)
    absent = "clean" if corrupted else (kind or "corrupted")
    reason = f"no {absent} {level} with a recorded future was scored, so there is nothing to tell apart"
    return Detection(math.nan, corrupted, clean, reason)


def corruption_kinds(truth: Mapping[int, str]) -> tuple[str, ...]:
    """The kinds of corruption in the truth, sorted."""
    return tuple(sorted({kind for label in truth.values() for kind in label.split(SEVERAL)} - {CLEAN}))


def is_kind(label: str, kind: str) -> bool:
    """Whether an episode's label, e.g. `noise+truncation`, names this kind."""
    return kind in label.split(SEVERAL)


def weight_shares(scores: ChunkScores, by: Literal["task", "source"] = "task") -> tuple[WeightShare, ...]:
    """One row per task or source, in alphabetical order.

    By Eq. 30 the ratio of `weight_share` to `chunk_share` stays within the ratio of the weight bounds either way.
    """
    if by not in ("task", "source"):
        raise ValueError(f"Unknown grouping {by!r}, expected 'task' or 'source'.")
    names = scores.task if by == "task" else scores.source
    finite = np.where(np.isfinite(scores.weight), scores.weight, 0.0)
    total = float(finite.sum())
    shares = []
    for name in sorted(set(names.tolist())):
        rows = names == name
        episodes = set(zip(scores.source[rows].tolist(), scores.episode_index[rows].tolist(), strict=True))
        mean_weight = _mean(scores.weight[rows & scores.usable])
        weight_share = float(finite[rows].sum()) / total if total else math.nan
        chunks = int(rows.sum())
        shares.append(WeightShare(str(name), len(episodes), chunks, mean_weight, chunks / len(scores), weight_share))
    return tuple(shares)


def effective_sample_share(scores: ChunkScores) -> float:
    """(Σw)² / (n Σw²) over the chunks with a recorded future; 1 for equal weights, NaN without chunks."""
    weight = scores.weight[scores.usable].astype(np.float64)
    square = float((weight**2).sum())
    return float(weight.sum()) ** 2 / (len(weight) * square) if square else math.nan


class SummaryRow(NamedTuple):
    """One line of the summary table: a value per run, NaN where the run has none."""

    label: str
    unit: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class SummaryTable:
    """Runs side by side: one column per run, the baseline first."""

    runs: tuple[str, ...]
    rows: tuple[SummaryRow, ...]


SUMMARY_METRICS = (
    "loss_action",
    "accuracy",
    "margin",
    "score",
    "weight_mean",
    "weight_at_floor",
    "weight_at_ceiling",
    "effective_sample_size",
    "valid_target_ratio",
    "temperature",
    "beta",
    "hard_negative_ratio",
    "belief_entropy",
)


def summary_table(dynamics: Dynamics, results: Mapping[str, Mapping[str, float]] | None = None) -> SummaryTable:
    """SFT beside the other runs: the results a recipe measured (run → name → value), then the end of the dynamics.

    The dynamics are means over the last tenth of the logged rows; metrics that no run logged are left out.
    Raises ValueError when `results` names a run that has no dynamics, or nothing was logged.
    """
    runs = ordered_runs(dynamics)
    unknown = sorted(set(results or {}) - set(runs))
    if unknown:
        raise ValueError(f"There are results for {unknown}, but the dynamics hold the runs {list(runs)}.")
    rows = []
    for name in dict.fromkeys(name for values in (results or {}).values() for name in values):
        measured = tuple(float((results or {}).get(run, {}).get(name, math.nan)) for run in runs)
        rows.append(SummaryRow(name, "", measured))
    last = tuple(float(dynamics.steps(run)[-1]) for run in runs)
    rows.append(SummaryRow("training steps", "", last))
    for metric in SUMMARY_METRICS:
        values = tuple(dynamics.tail(metric, run) for run in runs)
        if not all(math.isnan(value) for value in values):
            rows.append(SummaryRow(DYNAMICS_COLUMNS[metric].meaning, DYNAMICS_COLUMNS[metric].unit, values))
    return SummaryTable(runs, tuple(rows))


def ordered_runs(dynamics: Dynamics) -> tuple[str, ...]:
    """The runs, SFT first, the others as logged."""
    return tuple(sorted(dynamics.runs, key=lambda run: run != "sft"))


def main_run(dynamics: Dynamics) -> str:
    """The run a report is about: `ptr`, else the last one with a scorer, else the last one.

    Raises:
        ValueError: nothing was logged.
    """
    if not dynamics.runs:
        raise ValueError(
            "No step was logged, so there is nothing to report: set logging_steps to the run's length or below."
        )
    if "ptr" in dynamics.runs:
        return "ptr"
    scored = [run for run in dynamics.runs if dynamics.logged("accuracy", run)]
    return (scored or list(dynamics.runs))[-1]


def run_label(run: str) -> str:
    """How a run is called in figures and tables."""
    return {"sft": "SFT", "sft_belief": "SFT + belief", "ptr": "PTR"}.get(run, run)


def number(value: float) -> str:
    """A value for a table: four significant digits at most, a dash for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.3g}"


def titled(row: SummaryRow) -> str:
    """The label with its unit."""
    return f"{row.label} ({row.unit})" if row.unit else row.label


def _groups(scores: ChunkScores) -> dict[Episode, Int[np.ndarray, " rows"]]:
    """Row numbers of every episode, episodes in order."""
    rows: dict[Episode, list[int]] = {}
    for row, episode in enumerate(zip(scores.source.tolist(), scores.episode_index.tolist(), strict=True)):
        rows.setdefault(episode, []).append(row)
    return {episode: np.asarray(rows[episode], dtype=np.int64) for episode in sorted(rows)}


def _mean(values: Float[np.ndarray, " values"]) -> float:
    return float(values.astype(np.float64).mean()) if len(values) else math.nan
