"""From a dataset's evidence to a diagnosis: what is identifiable, what stands out, what the weights would do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from lerobot.datasets import LeRobotDatasetMetadata
from scipy.stats import rankdata, spearmanr  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score

from ptr_hf.diagnosis.identify import Verdicts, identify_actions, identify_instructions, two_folds
from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores import (
    SCORES,
    ActionIdentification,
    EpisodeTable,
    InstructionIdentification,
    NegativeLogLoss,
    NegativeLoss,
    Score,
    ScoreWeigher,
)
from ptr_hf.scores.weight_map import standardized

ACTIONS, INSTRUCTIONS, LOSS, LOG_LOSS = "action_identification", "instruction_identification", "loss", "log_loss"
WEIGHED = ("ptr_consequence", "ptr_calibrated", "small_loss")
"""Presets whose weights are foretold, where the scores they read are known."""
RESAMPLES = 1000
BAD_Z = -1.0
"""An episode this many robust standard deviations below its group's median is called bad by a score: a sixth of good ones are,
so that two scores that know nothing of each other agree on one in forty."""
OUT_Z, OUT_SHARE = -3.0, 0.5
"""An episode stands out where a consequence score lies this far below its task's median *and* gives it less than this share
of the typical episode's nats: either alone happens on clean data, where scores spread little or weakly."""

FloatArray = Float[np.ndarray, " episodes"]


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval, from resampling episodes."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Identifiability:
    """How well one kind of label is told from what followed, on episodes that the head has not learned from.

    Attributes:
        nats: of the typical (median) episode: log of how much likelier than a guess its own label is; 0 is chance.
        null: likewise, of a label that is not its own.
        without_future: likewise, by heads that were given another chunk's future.
        gain: by how much the typical episode's own future adds to that.
        accuracy: share of chunks whose own label is the likeliest, mean over episodes.
        chance: of that, 1 / candidates.
        candidates: labels to choose from.
        episodes: that have a verdict.
    """

    nats: Interval
    null: float
    without_future: Interval
    gain: Interval
    accuracy: Interval
    chance: float
    candidates: float
    episodes: int


@dataclass(frozen=True)
class Share:
    """A group's share of the chunks and of the weight."""

    name: str
    episodes: int
    chunk_share: float
    weight_share: float


@dataclass(frozen=True)
class Effect:
    """What a preset's weights would do.

    Attributes:
        effective_share: (Σw)² / (n Σw²) over chunks.
        below_half: share of the episodes that would weigh less than half the mean.
        motion, length: Spearman correlation of the episodes' weights with how much they move and how long they are, both
            compared within tasks.
        shares: by task.
    """

    preset: str
    effective_share: float
    below_half: float
    motion: float
    length: float
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class EpisodeRow:
    """One episode: mean verdicts, those that count as robust z-scores within its task, and its weights (mean 1)."""

    episode: int
    task: str
    frames: int
    motion: float
    verdicts: dict[str, float]
    z: dict[str, float]
    weights: dict[str, float]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found; `ptr_hf.diagnosis.advise` turns it into sentences.

    Attributes:
        source: name of the dataset.
        policy: whose features and whose loss were used.
        trained: whether that policy has learned anything.
        chunks, with_future: that were read, and those of them with a recorded future.
        folds: episodes with a verdict in either fold.
        identifiability: by score; without instruction_identification when there is a single instruction.
        correlations: Spearman, of the episodes' scores with each other, with motion and with length, within tasks.
        called_bad: episodes that every score calls bad.
        standing_out: episodes that some consequence score puts far below their task.
        effects: by preset.
        detection: where the truth is known, AUC of corrupted episodes lying lower, by score and preset.
        confirmed: how many of those standing out are corrupted, where the truth is known.
    """

    source: str
    policy: str
    trained: bool
    chunks: int
    with_future: int
    folds: tuple[int, int]
    identifiability: dict[str, Identifiability]
    correlations: dict[str, dict[str, float]]
    called_bad: tuple[int, ...]
    standing_out: tuple[int, ...]
    effects: tuple[Effect, ...]
    episodes: tuple[EpisodeRow, ...]
    detection: dict[str, float]
    confirmed: int | None = None


def diagnose(
    evidence: Evidence,
    meta: LeRobotDatasetMetadata,
    *,
    policy: str,
    trained: bool,
    steps: int = 400,
    seed: int = 0,
    truth: Mapping[int, str] | None = None,
) -> Diagnosis:
    """Train the heads, cross-fitted, on a dataset's evidence, and look at what they say.

    Args:
        evidence: from `collect`.
        meta: of the dataset.
        policy: name of the policy that was read with.
        trained: whether it has learned anything; the loss of one that has not is shown, but nobody judges by it.
        steps: of each head, at most.
        seed: of folds, heads and resampling.
        truth: kind of every episode, `clean` or what was done to it, where it is known; nothing but `detection` reads it.
    """
    episodes, slot = (column.numpy() for column in evidence.episode.unique(return_inverse=True))
    table = EpisodeTable.from_metadata(meta, "task")
    task_of = np.zeros(len(episodes), dtype=np.int64)
    task_of[slot] = evidence.task.numpy()
    group = table.group[torch.from_numpy(episodes)].unique(return_inverse=True)[1]

    verdicts, shuffled, fold = _heads(evidence, max(1, int(meta.total_tasks)), steps, seed)
    means = {name: _means(of.value.numpy(), slot) for name, of in verdicts.items()}
    loss = evidence.loss.clamp(min=1e-6)
    means[LOSS] = _means(-loss.numpy(), slot)
    judging = dict(means) if trained else {name: of for name, of in means.items() if name != LOSS}
    read = judging | ({LOG_LOSS: _means(-loss.log().numpy(), slot)} if trained else {})
    frames = table.length[torch.from_numpy(episodes)].numpy().astype(np.float64)
    others = {"motion": _means(evidence.motion.numpy(), slot), "length": frames}
    z = {name: standardized(torch.from_numpy(of)[:, None], group)[:, 0].numpy() for name, of in judging.items()}
    ranks = {name: _ranks(values, group) for name, values in (means | others).items()}

    weights = {preset: _weights(preset, read, meta, episodes) for preset in WEIGHED if read.keys() & _scores_of(preset)}
    chunks_of = np.bincount(slot, minlength=len(episodes))
    names = np.asarray(meta.tasks.index, dtype=object)
    effects = tuple(
        _effect(preset, weight, chunks_of, names[task_of].tolist(), ranks, group) for preset, weight in weights.items()
    )
    with_verdict = np.isfinite(means[ACTIONS])
    fold_of = np.zeros(len(episodes), dtype=np.int64)
    fold_of[slot] = fold.numpy()
    # an episode is called bad by all when no score that knows it speaks for it
    bad = np.all([(values < BAD_Z) | np.isnan(values) for values in z.values()], axis=0) & with_verdict
    identifiability = {name: _identifiability(of, shuffled[name], slot, seed) for name, of in verdicts.items()}
    low = [(z[name] < OUT_Z) & (means[name] < OUT_SHARE * of.nats.value) for name, of in identifiability.items()]
    standing_out = tuple(episodes[np.any(low, axis=0)].tolist())
    return Diagnosis(
        source=meta.repo_id,
        policy=policy,
        trained=trained,
        chunks=len(slot),
        with_future=int(evidence.target_valid.sum()),
        folds=(int((with_verdict & (fold_of == 0)).sum()), int((with_verdict & (fold_of == 1)).sum())),
        identifiability=identifiability,
        correlations={a: {b: spearman(ranks[a], ranks[b]) for b in ranks} for a in ranks},
        called_bad=tuple(episodes[bad].tolist()),
        standing_out=standing_out,
        effects=effects,
        episodes=tuple(
            EpisodeRow(
                episode=int(episodes[row]),
                task=str(names[task_of[row]]),
                frames=int(frames[row]),
                motion=float(others["motion"][row]),
                verdicts={name: float(values[row]) for name, values in means.items()},
                z={name: float(values[row]) for name, values in z.items()},
                weights={preset: float(values[row]) for preset, values in weights.items()},
            )
            for row in range(len(episodes))
        ),
        detection=_detection(means | weights, episodes, truth),
        confirmed=None if truth is None else sum(truth[episode] != "clean" for episode in standing_out),
    )


def _heads(
    evidence: Evidence, num_tasks: int, steps: int, seed: int
) -> tuple[dict[str, Verdicts], dict[str, Verdicts], Int[torch.Tensor, " chunks"]]:
    """Verdicts by score, the same of heads that see another chunk's future, and the folds."""
    fold = two_folds(evidence.task, evidence.episode, seed)
    real: dict[str, Verdicts] = {}
    control: dict[str, Verdicts] = {}
    for found, shuffled in ((real, False), (control, True)):
        found[ACTIONS] = identify_actions(evidence, fold, steps=steps, seed=seed, shuffled=shuffled)
        if num_tasks > 1:
            found[INSTRUCTIONS] = identify_instructions(
                evidence, fold, num_tasks, steps=steps, seed=seed, shuffled=shuffled
            )
    return real, control, fold


def _identifiability(
    verdicts: Verdicts, control: Verdicts, slot: Int[np.ndarray, " chunks"], seed: int
) -> Identifiability:
    value, null, correct, without = (
        _means(column.numpy(), slot) for column in (verdicts.value, verdicts.null, verdicts.correct, control.value)
    )
    known = np.isfinite(value) & np.isfinite(without)
    return Identifiability(
        nats=bootstrapped(value[known], np.median, seed),
        null=float(np.median(null[known])) if known.any() else float("nan"),
        without_future=bootstrapped(without[known], np.median, seed),
        gain=bootstrapped((value - without)[known], np.median, seed),
        accuracy=bootstrapped(correct[known], np.mean, seed),
        chance=1.0 / verdicts.candidates if verdicts.candidates else float("nan"),
        candidates=verdicts.candidates,
        episodes=int(known.sum()),
    )


def bootstrapped(values: FloatArray, statistic: object, seed: int = 0) -> Interval:
    """A statistic of the episodes with the middle 95 % of its values over resampled episodes; NaN without any.

    Args:
        values: one per episode.
        statistic: `np.mean` or `np.median`.
        seed: of the resampling.
    """
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    many = statistic(values[drawn], axis=1)  # type: ignore[operator]
    low, high = np.quantile(many, (0.025, 0.975))
    return Interval(float(statistic(values)), float(low), float(high))  # type: ignore[operator]


def _means(values: Float[np.ndarray, " chunks"], slot: Int[np.ndarray, " chunks"]) -> FloatArray:
    """Mean of every episode over the chunks that have a value, NaN without one."""
    known, size = np.isfinite(values), int(slot.max()) + 1
    total = np.bincount(slot[known], values[known].astype(np.float64), minlength=size)
    count = np.bincount(slot[known], minlength=size)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _ranks(values: FloatArray, group: Int[torch.Tensor, " episodes"]) -> FloatArray:
    """Rank of every episode among the known ones of its group, between 0 and 1."""
    ranks, members = np.full(len(values), np.nan), group.numpy()
    for number in np.unique(members):
        own = (members == number) & np.isfinite(values)
        ranks[own] = rankdata(values[own]) / (own.sum() + 1)
    return ranks


def _options(preset: str) -> PTRHyperparameters:
    return PTRHyperparameters(preset=preset)


def _scores_of(preset: str) -> set[str]:
    return set(SCORES[_options(preset).score])


def _weights(
    preset: str, means: Mapping[str, FloatArray], meta: LeRobotDatasetMetadata, episodes: Int[np.ndarray, " episodes"]
) -> FloatArray:
    """The weight that a preset would give every episode on these verdicts, mean 1."""
    options = _options(preset)
    names = SCORES[options.score]
    missing = np.full(len(episodes), np.nan)
    values = torch.from_numpy(np.stack([means.get(name, missing) for name in names], axis=1)).float()
    # of the scores, the weigher only asks what kind they are
    kinds: dict[str, Score] = {
        ACTIONS: ActionIdentification(1, 1, 1),
        INSTRUCTIONS: InstructionIdentification(1, 1, 1),
        LOSS: NegativeLoss(),
        LOG_LOSS: NegativeLogLoss(),
    }
    weigher = ScoreWeigher(
        {name: kinds[name] for name in names},
        None,
        weight_map=options.weight_map,
        floor=options.weight_min,
        ceiling=options.weight_max,
    )
    table = EpisodeTable.from_metadata(meta, options.standardize_by)
    group = table.group[torch.from_numpy(episodes)].unique(return_inverse=True)[1]
    weight = weigher.slot_weights(values, group).double().numpy()
    mean = weight.mean()
    return weight / mean if mean > 0.0 else np.ones_like(weight)


def _effect(
    preset: str,
    weight: FloatArray,
    chunks: Int[np.ndarray, " episodes"],
    task: Sequence[str],
    ranks: Mapping[str, FloatArray],
    group: Int[torch.Tensor, " episodes"],
) -> Effect:
    total, square = float((weight * chunks).sum()), float((weight**2 * chunks).sum())
    shares = []
    for name in sorted(set(task)):
        own = np.asarray([of == name for of in task])
        share = float((weight * chunks)[own].sum()) / total
        shares.append(Share(str(name), int(own.sum()), float(chunks[own].sum() / chunks.sum()), share))
    within = _ranks(weight, group)
    return Effect(
        preset=preset,
        effective_share=total**2 / (float(chunks.sum()) * square),
        below_half=float((weight < 0.5).mean()),
        motion=spearman(within, ranks["motion"]),
        length=spearman(within, ranks["length"]),
        shares=tuple(shares),
    )


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Rank correlation over the episodes that both know; NaN for fewer than three, or where one is the same everywhere."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(spearmanr(a[known], b[known]).statistic)


def _detection(
    values: Mapping[str, FloatArray], episodes: Int[np.ndarray, " episodes"], truth: Mapping[int, str] | None
) -> dict[str, float]:
    if truth is None:
        return {}
    corrupted = np.asarray([truth[episode] != "clean" for episode in episodes.tolist()])
    found = {}
    for name, column in values.items():
        known = np.isfinite(column)
        both = len(set(corrupted[known].tolist())) == 2
        found[name] = float(roc_auc_score(corrupted[known], -column[known])) if both else float("nan")
    return found
