"""From the questions' answers to what is flagged: episodes, windows of episodes, their weights and their reasons.

Every question gives each episode a chance that a good one scores so low: of its mean over the frames, and of its worst window,
by part; corrected for the number of parts. The worst question decides, corrected for the number of questions, and an episode
is flagged where that chance is below the rate of false alarms that was asked for. An episode that fails only in windows that
begin at fewer than half of its frames, and passes without these frames, keeps the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from ptr_hf.scoring.calibration import (
    LEAST_TO_JUDGE,
    Standard,
    judged_within,
    lowest_of_minima,
    of_the_lowest,
    standard,
)
from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.question import Answer, Question
from ptr_hf.scoring.recordings import Recordings

ROUNDS = 3
"""Good episodes are found, and what they spread like, in so many rounds."""
TRIMMED = 0.01
"""An episode that a question gives a lower chance is left out where the spread of good ones is found."""
WORST = -12.0
"""The lowest z that is told."""


@dataclass(frozen=True)
class Verdicts:
    """What the questions say of every episode and frame; what they say of frames is `on_disk`.

    Attributes:
        z: (episodes, questions), normal: 1 % of good episodes lie below -2.33 in each.
        worst: (episodes,) the same of all questions together.
        curves: (frames, questions) z of the window that begins at a frame; NaN where a question says nothing of windows.
        flagged: (episodes,) bool.
        weight: (frames,) float32, weight_min where flagged, else 1.
        reasons: (episodes,) a sentence where flagged, else "".
    """

    z: np.ndarray
    worst: np.ndarray
    curves: np.ndarray
    flagged: np.ndarray
    weight: np.ndarray
    reasons: list[str]


class _Judged:
    """One question's answer against the spread of good episodes."""

    def __init__(self, question: Question, answer: Answer, recordings: Recordings, window: int) -> None:
        self.question, self.answer, self.recordings = question, answer, recordings
        self.window = window
        if answer.frames is None:
            assert answer.episodes is not None
            self.episodes, self.lowest = answer.episodes, None
        else:
            self.episodes = answer.level(recordings.means(answer.frames))
            self.lowest = recordings.over(
                answer.frames, lambda frames, first: episode_minima(self._windows(frames, first), first)
            )

    def _windows(self, frames: np.ndarray, first: np.ndarray) -> np.ndarray:
        return self.answer.level(forward_means(frames, first, self.window))

    def calibrate(self, group: np.ndarray, good: np.ndarray) -> None:
        """Find the spread of good episodes."""
        resolution = self.answer.resolution
        self.whole = standard(self.episodes, group, good, resolution)
        self.pooled: Standard | None = None
        if self.episodes.shape[1] > 1:
            self.pooled = standard(self._mean(self.episodes), group, good)
        self.worst: Standard | None = None
        if self.lowest is not None:
            self.worst = standard(self.lowest, group, good, resolution)

    def _mean(self, scores: np.ndarray) -> np.ndarray:
        """(episodes, 1) mean z over the parts."""
        z = self.whole.z(scores)
        known = np.isfinite(z)
        total, count = np.where(known, z, 0).sum(axis=1, keepdims=True), known.sum(axis=1, keepdims=True)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    def chance_of_whole(self, scores: np.ndarray) -> np.ndarray:
        """(episodes,) of the means over the frames, corrected for the parts."""
        lowest = of_the_lowest(self.whole.chance(scores), self.whole.parts)
        if self.pooled is None:
            return lowest
        return of_the_lowest(np.stack([lowest, self.pooled.chance(self._mean(scores))[:, 0]], axis=1), 2)

    def chance_of_windows(self) -> np.ndarray:
        """(episodes,) of the worst window, corrected for the parts."""
        if self.worst is None or self.lowest is None:
            return np.ones(len(self.episodes))
        return of_the_lowest(self.worst.chance_of_minima(self.lowest), self.worst.parts)

    def chance(self) -> np.ndarray:
        """(episodes,) of the question."""
        whole = self.chance_of_whole(self.episodes)
        return whole if self.worst is None else of_the_lowest(np.stack([whole, self.chance_of_windows()], axis=1), 2)

    def read_windows(self, chance: float, curve: np.ndarray, low: np.ndarray) -> None:
        """Of the window that begins at each frame, write to (frames,) the worst part's z, and whether any part's is so low."""
        if self.worst is None or self.answer.frames is None:
            curve[:] = np.nan
            return
        limit, recordings = lowest_of_minima(chance / self.worst.parts), self.recordings
        for own, span in recordings.blocks:
            windows = self._windows(self.answer.frames[span], recordings.first[own] - span.start)
            z = self.worst.z(windows, recordings.episode[span])
            curve[span], low[span] = np.fmin.reduce(z, axis=1), (np.nan_to_num(z) < limit).any(axis=1)

    def passes_without(self, low: np.ndarray, chance: float) -> np.ndarray:
        """(episodes,) whether fewer than half of the windows are low, and the other frames are not of so small a chance."""
        frames, means = self.answer.frames, self.recordings.means
        assert frames is not None
        share = means(lambda span: low[span, None].astype(np.float32))[:, 0]
        rest = means(lambda span: np.where(low[span, None], np.nan, frames[span]))
        return (share > 0) & (share < 0.5) & (self.chance_of_whole(self.answer.level(rest)) >= chance)

    def worst_parts(self, episode: int) -> tuple[str, ...]:
        """The parts that an episode fails in, the worst first; empty where it is all of them a little."""
        z = np.nan_to_num(self.whole.z(self.episodes)[episode])
        if self.worst is not None and self.lowest is not None:
            z = np.minimum(z, np.nan_to_num(self.worst.z(self.lowest)[episode]))
        order = np.argsort(z)
        low = [part for part in order if z[part] < min(-3.0, z[order[0]] / 2)]
        if len(low) > max(3, len(z) // 2):
            return ()
        return tuple(self.answer.parts[part] for part in low)


def judge(
    recordings: Recordings,
    answers: Mapping[Question, Answer],
    group: np.ndarray,
    *,
    false_alarms: float,
    weight_min: float,
    window: int,
) -> Verdicts:
    """Weigh what the questions have found.

    Args:
        recordings: of one dataset.
        answers: by question.
        group: (episodes,) within which episodes are compared.
        false_alarms: share of good episodes that may be flagged.
        weight_min: weight of flagged frames.
        window: frames whose scores are pooled.
    """
    episodes = len(recordings.length)
    weight = on_disk((len(recordings),), np.float32)
    weight[:] = 1
    if not answers:
        nothing = np.full((episodes, 0), np.nan)
        unknown = np.full((len(recordings), 0), np.nan, np.float32)
        return Verdicts(nothing, np.full(episodes, np.nan), unknown, np.zeros(episodes, bool), weight, [""] * episodes)
    judged = [_Judged(question, answer, recordings, window) for question, answer in answers.items()]
    group = judged_within(group)
    enough = episodes >= LEAST_TO_JUDGE
    good = np.ones(episodes, bool)
    for _ in range(ROUNDS):
        for one in judged:
            one.calibrate(group, good)
        chance = np.stack([one.chance() for one in judged], axis=1)
        together = of_the_lowest(chance, len(judged))
        good = chance.min(axis=1) >= TRIMMED
    flagged = (together < false_alarms) & enough & (group >= 0)
    reasons = [""] * episodes
    limit = -np.expm1(np.log1p(-false_alarms) / len(judged))
    # a question's frames lie together
    curves, bad_frames = (on_disk((len(judged), len(recordings)), dtype) for dtype in (np.float32, np.bool_))
    for one, curve, low in zip(judged, curves, bad_frames, strict=True):
        one.read_windows(limit / 2, curve, low)
    if flagged.any():
        partly = _partly(judged, bad_frames, limit, recordings)
        for episode in np.flatnonzero(flagged).tolist():
            span = slice(recordings.first[episode], recordings.last[episode] + 1)
            failing = [number for number in chance[episode].argsort().tolist() if chance[episode, number] < limit]
            if partly[episode]:
                bad = np.logical_or.reduce([bad_frames[number][span] for number in failing])
                weight[span] = np.where(bad, weight_min, 1)
            else:
                weight[span] = weight_min
            reasons[episode] = _reason(judged[failing[0]], episode, weight[span] < 1, recordings)
    z = np.maximum(stats.norm.ppf(np.clip(chance, 1e-40, 1 - 1e-12)), WORST)
    worst = np.maximum(stats.norm.ppf(np.clip(together, 1e-40, 1 - 1e-12)), WORST)
    return Verdicts(z, worst, curves.T, flagged, weight, reasons)


def _partly(judged: list[_Judged], bad_frames: np.ndarray, limit: float, recordings: Recordings) -> np.ndarray:
    """(episodes,) whether what fails is confined to some windows, and the rest of the episode passes on its own."""
    partly = np.ones(len(recordings.length), bool)
    some = np.zeros(len(recordings.length), bool)
    for one, bad in zip(judged, bad_frames, strict=True):
        fails = one.chance() < limit
        if one.answer.frames is None:
            partly &= ~fails
            continue
        partly &= ~fails | one.passes_without(bad, limit / 2)
        some |= fails
    return partly & some


def _reason(one: _Judged, episode: int, bad: np.ndarray, recordings: Recordings) -> str:
    sentence = one.question.reason(one.worst_parts(episode))
    if bad.all() or not bad.any():
        return sentence
    times = np.flatnonzero(bad) / recordings.fps
    return f"{sentence}, from {times[0]:.1f} s to {times[-1]:.1f} s"


def forward_means(values: np.ndarray, first: np.ndarray, window: int) -> np.ndarray:
    """Means over the window that begins at each frame and ends with the episode at the latest; NaN are left out.

    The last windows of an episode are as long as the others: they begin earlier.

    Args:
        values: (frames, K) of whole episodes.
        first: (episodes,) places at which these begin.
        window: frames.
    """
    known = np.isfinite(values)
    total = np.concatenate(
        [np.zeros((1, values.shape[1])), np.cumsum(np.where(known, values, 0), axis=0, dtype=np.float64)]
    )
    count = np.concatenate([np.zeros((1, values.shape[1]), np.int64), np.cumsum(known, axis=0)])
    begin, end = (
        np.repeat(edge, np.diff(first, append=len(values))) for edge in (first, np.append(first[1:], len(values)))
    )
    start = np.maximum(np.minimum(np.arange(len(values)), end - window), begin)
    stop = np.minimum(start + window, end)
    number = count[stop] - count[start]
    sums = total[stop] - total[start]
    return np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)


def episode_minima(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(episodes, K) the lowest of values (frames, K) from each episode's first on; NaN where it has none."""
    lowest = np.minimum.reduceat(np.where(np.isfinite(values), values, np.inf), first, axis=0)
    return np.where(np.isfinite(lowest), lowest, np.nan)
