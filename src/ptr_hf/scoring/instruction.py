"""Can the instruction be told from the episode? Neighbours of the same motion should have been told the same."""

import numpy as np

from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, CannotAskError, Question
from ptr_hf.scoring.recordings import Recordings

TIMES, NEIGHBOURS, ROUNDS, FLOOR = 12, 16, 3, 0.02
MOST_VOTERS = 10_000
"""Of more episodes so many are drawn, and vote on all: the time would grow with the square of the episodes."""
BLOCK = 512
"""Episodes whose distances to all others are held at once."""


class InstructionFromEpisode(Question):
    """Neighbours vote, each as much as it is trusted itself: the share of the votes for the recorded instruction."""

    name = "instruction"
    title = "Does the instruction fit the motion?"
    sentence = "the motion looks like that of another instruction"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """log of the share of votes (+ 0.02) for an episode's own instruction; an instruction given once is not judged."""
        recordings = fit.recordings
        task = recordings.task
        given, count = np.unique(task, return_counts=True)
        if len(given) < 2:
            raise CannotAskError("all episodes have the same instruction")
        if (count > 1).sum() < 2:
            raise CannotAskError("hardly any instruction was given twice, so no other episode can speak for it")
        draws, most = np.random.default_rng(fit.settings.seed), min(len(task), MOST_VOTERS)
        voters = np.sort(draws.choice(len(task), most, replace=False))
        near, votes = neighbours(paths(recordings, fit.state.numpy()), NEIGHBOURS, voters)
        same = task[near] == task[:, None]
        trust = np.ones(len(task))
        for _ in range(ROUNDS + 1):
            cast = votes * trust[near]
            own = (cast * same).sum(axis=1) / np.maximum(cast.sum(axis=1), 1e-12)
            trust = own
        score = np.log(own + FLOOR)
        score[np.isin(task, given[count < 2])] = np.nan
        return Answer((self.name,), episodes=score[:, None])


def paths(recordings: Recordings, state: np.ndarray) -> np.ndarray:
    """(episodes, times x S) the standardised states at twelve even times: an episode's way through the scene."""
    share = np.linspace(0, 1, TIMES)
    rows = recordings.first[:, None] + np.rint(share * (recordings.length[:, None] - 1)).astype(np.int64)
    return state[rows].reshape(len(rows), -1)


def neighbours(points: np.ndarray, count: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's nearest others, and a vote of each that falls with its squared distance.

    Args:
        points: (n, D).
        count: neighbours wanted; fewer where there are fewer points.
        among: rows of the points that may be neighbours, ascending.

    Returns:
        their rows (n, k), nearest first, and votes (n, k) in (0, 1].
    """
    n = len(points)
    count = min(count, len(among) - 1)
    squares, others = (points**2).sum(axis=1), points[among]
    near = np.empty((n, count), np.int32)
    distance = np.empty((n, count))
    for start in range(0, n, BLOCK):
        block = slice(start, min(start + BLOCK, n))
        apart = squares[block, None] + squares[among] - 2 * points[block] @ others.T
        own = slice(*np.searchsorted(among, [block.start, block.stop]))
        apart[among[own] - start, np.arange(own.start, own.stop)] = np.inf
        chosen = np.argpartition(apart, count - 1, axis=1)[:, :count]
        found = np.take_along_axis(apart, chosen, axis=1)
        order = found.argsort(axis=1)
        near[block] = among[np.take_along_axis(chosen, order, axis=1)]
        distance[block] = np.maximum(np.take_along_axis(found, order, axis=1), 0)
    scale = distance[:, : min(5, count)].mean(axis=1, keepdims=True)
    return near, np.exp(-distance / np.maximum(scale, 1e-12))
