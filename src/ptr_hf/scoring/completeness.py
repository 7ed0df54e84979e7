"""Is the episode complete? Its length, and whether it ends where episodes of its instruction end."""

import numpy as np

from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, Question

NEIGHBOURS = 3
SHORT, ELSEWHERE = "length", "end"


class Completeness(Question):
    """Short episodes, and those whose last state is far from where others of the same instruction end."""

    name = "completeness"
    title = "Is the task carried to its end?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """log of the frames; and minus log of the distance to the three nearest last states of the same instruction."""
        recordings = fit.recordings
        scores = [np.log(recordings.length)]
        parts = [SHORT]
        if recordings.state.shape[1]:
            parts.append(ELSEWHERE)
            scores.append(self._ends(recordings.task, fit.frames.state.cpu().numpy()[recordings.last]))
        return Answer(tuple(parts), episodes=np.stack(scores, axis=1), resolution=0.1)

    def _ends(self, task: np.ndarray, last: np.ndarray) -> np.ndarray:
        nearness = np.full(len(task), np.nan)
        for number in np.unique(task):
            own = np.flatnonzero(task == number)
            if len(own) <= NEIGHBOURS:
                continue
            ends = last[own]
            # a few hundred ends show where episodes end
            shown = np.linspace(0, len(own) - 1, min(len(own), 512)).astype(np.int64)
            apart = ((ends**2).sum(1)[:, None] + (ends[shown] ** 2).sum(1) - 2 * ends @ ends[shown].T).clip(min=0)
            apart[shown, np.arange(len(shown))] = np.inf
            nearest = np.partition(np.sqrt(apart), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
            nearness[own] = -np.log(nearest.mean(axis=1) + 0.1)
        return nearness

    def reason(self, parts: tuple[str, ...]) -> str:
        """Cut short, or ended elsewhere."""
        if parts and parts[0] == ELSEWHERE:
            return "the episode ends where no other of its instruction does"
        return "the episode is much shorter than others of its instruction"
