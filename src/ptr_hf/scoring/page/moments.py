"""Where to look: the worst moment of a bad episode, and the good episode that it is set beside."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ptr_hf.scoring.dataset_scores import DatasetScores, chunks_of
from ptr_hf.scoring.recordings import Recordings

PICTURES = 5
"""Frames of a filmstrip."""
AROUND = 1.5
"""A filmstrip reaches so many windows to both sides of the middle of the worst one."""


@dataclass(frozen=True)
class Moment:
    """What a card shows of an episode and its companion.

    Attributes:
        row: the episode's row in the recordings.
        question: name of the one that fails most.
        curve: (frames,) its z of the window that begins at each frame; None where it says nothing of single frames.
        companion_curve: (frames of the companion,) the same of it, or None.
        worst: first frame of the worst window, or None.
        flagged: (frames,) whether a frame weighs less than 1.
        frames: (PICTURES,) frames to show.
        companion: row of the good episode beside it, or None where the task has none.
        companion_frames: (PICTURES,) frames at the same share of that episode.
    """

    row: int
    question: str
    curve: np.ndarray | None
    companion_curve: np.ndarray | None
    worst: int | None
    flagged: np.ndarray
    frames: np.ndarray
    companion: int | None
    companion_frames: np.ndarray


def moments(
    scores: DatasetScores, recordings: Recordings, window: int, most: int, source: int | None = None
) -> list[Moment]:
    """The moments to show of the worst episodes, the worst first.

    Args:
        scores: of the dataset, alone or among others.
        recordings: of the dataset.
        window: frames whose scores are pooled.
        most: episodes.
        source: number of the dataset where there are several.
    """
    chunks, flagged, episodes = chunks_of(scores, source), scores.flagged, scores.episodes
    if source is not None:
        flagged, episodes = flagged[flagged["source"] == source], episodes[episodes["source"] == source]
    good = episodes.set_index("episode_index")["weight"].reindex(recordings.episode_index).to_numpy() == 1
    found = []
    for number, row in flagged.head(most).set_index("episode_index").iterrows():
        place = int(np.flatnonzero(recordings.episode_index == number)[0])
        span = slice(recordings.first[place], recordings.last[place] + 1)
        question = _failing(row, scores.questions)
        curve: np.ndarray | None = chunks[question].iloc[span].to_numpy(np.float64)
        assert curve is not None
        worst = None
        if np.isfinite(curve).any():
            worst = int(np.nanargmin(curve))
        else:
            curve = None
        length = int(recordings.length[place])
        frames = _frames(question, worst, length, window)
        companion = nearest_good(recordings, place, good)
        share = frames / max(length - 1, 1)
        other, companion_curve = share * 0, None
        if companion is not None:
            other = share * (recordings.length[companion] - 1)
            if curve is not None:
                whole = slice(recordings.first[companion], recordings.last[companion] + 1)
                companion_curve = chunks[question].iloc[whole].to_numpy(np.float64)
        weights = chunks["weight"].iloc[span].to_numpy() < 1
        found.append(
            Moment(
                place,
                question,
                curve,
                companion_curve,
                worst,
                weights,
                frames,
                companion,
                np.rint(other).astype(np.int64),
            )
        )
    return found


def nearest_good(recordings: Recordings, row: int, good: np.ndarray) -> int | None:
    """The row of the good episode of the same task that began most alike; None where there is none.

    Args:
        recordings: of the dataset.
        row: of the episode.
        good: (episodes,) bool.
    """
    candidates = np.flatnonzero(good & (recordings.task == recordings.task[row]))
    candidates = candidates[candidates != row]
    if not len(candidates):
        return None
    starts = recordings.state[recordings.first]
    spread = starts.std(axis=0)
    distance = np.square((starts[candidates] - starts[row]) / np.where(spread > 0, spread, 1)).sum(axis=1)
    return int(candidates[distance.argmin()])


def _failing(row: pd.Series, questions: tuple[str, ...]) -> str:
    z = row[list(questions)].astype(float)
    return questions[0] if z.isna().all() else str(z.idxmin())


def _frames(question: str, worst: int | None, length: int, window: int) -> np.ndarray:
    """(PICTURES,) frames around the worst window, or over the whole episode where it is the whole that fails."""
    if worst is None or question == "completeness":
        begin, end = 0.0, length - 1.0
    else:
        middle = min(worst, max(length - window, 0)) + min(window, length) / 2
        begin, end = max(0.0, middle - AROUND * window), min(length - 1.0, middle + AROUND * window)
    return np.rint(np.linspace(begin, end, PICTURES)).astype(np.int64)
