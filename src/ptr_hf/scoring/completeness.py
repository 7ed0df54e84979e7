"""Is the episode complete? Its length, and how far its last state and picture look to be on the way from first to last frame."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ptr_hf.scoring.crossfit import CrossFit, FoldedMLP, Reweigh, taken
from ptr_hf.scoring.question import Answer, Question
from ptr_hf.scoring.recordings import Recordings
from ptr_hf.scoring.seen import ImageFeatures, predicted

LENGTH, PROGRESS, VIEW = "length", "progress", "last view"
EFFORT, HIDDEN, MOST_TASKS = 0.4, 64, 32
END = 0.05
"""The last twentieth of an episode is its end."""


class Completeness(Question):
    """Short episodes, and those whose end looks like the middle of others: progress is regressed on state and instruction."""

    name = "completeness"
    title = "Is the task carried to its end?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """log of the frames; and the progress, from 0 to 1, at which models of other episodes place last state and picture."""
        recordings = fit.recordings
        scores = [np.log(recordings.length) / LENGTH_UNIT]
        parts = [LENGTH]
        if recordings.state.shape[1] and fit.folds > 1:
            parts.append(PROGRESS)
            scores.append(self._ends(fit, reweigh) / PROGRESS_UNIT)
        if recordings.images is not None and fit.folds > 1:
            parts.append(VIEW)
            scores.append(self._last_views(fit, recordings.images) / PROGRESS_UNIT)
        return Answer(tuple(parts), episodes=np.stack(scores, axis=1))

    def _ends(self, fit: CrossFit, reweigh: Reweigh) -> np.ndarray:
        recordings, device = fit.recordings, fit.settings.device
        tasks = len(recordings.instructions) if len(recordings.instructions) <= MOST_TASKS else 0
        generator = torch.Generator().manual_seed(fit.settings.seed)
        network = FoldedMLP(fit.folds, fit.state.shape[1] + tasks, HIDDEN, 1, generator)

        def inputs(rows: Tensor) -> Tensor:
            state = taken(fit.state, rows).clamp(-8, 8)
            if not tasks:
                return state
            task = torch.as_tensor(recordings.task[recordings.episode[rows.cpu().numpy()]], device=device)
            return torch.cat([state, functional.one_hot(task, tasks)], dim=-1)

        def loss(rows: Tensor) -> Tensor:
            progress = torch.as_tensor(_share(recordings, rows.cpu().numpy()), dtype=torch.float32, device=device)
            return functional.mse_loss(network(inputs(rows)).squeeze(-1), progress)

        def judge(fold: int, rows: Tensor) -> Tensor:
            return network.of_fold(fold, inputs(rows))

        def trust(_: np.ndarray) -> np.ndarray:
            return np.ones(len(recordings.length))

        placed = fit.fit(network, loss, judge, trust, self.title, EFFORT)

        def ending(span: slice) -> np.ndarray:
            share = _share(recordings, np.arange(span.start, span.stop))
            return np.where(share[:, None] >= 1 - END, placed[span], np.nan)

        return recordings.means(ending)[:, 0]

    def _last_views(self, fit: CrossFit, seen: ImageFeatures) -> np.ndarray:
        """(episodes,) where the pictures of all cameras place the last one that was looked at; NaN where it cannot be read."""
        recordings = fit.recordings
        episode = recordings.episode[seen.rows]
        share = _share(recordings, seen.rows)
        tasks = np.eye(len(recordings.instructions))[recordings.task[episode]]
        inputs = np.concatenate([*seen.components, tasks if tasks.shape[1] <= MOST_TASKS else tasks[:, :0]], axis=1)
        known = np.isfinite(inputs).all(axis=1) & recordings.finite[seen.rows]
        placed = np.full((len(seen.rows), 1), np.nan)
        if known.any():
            spread = share[known].std() or 1.0
            target = (share[known, None] - share[known].mean()) / spread
            told = predicted(inputs[known], target, fit.fold[episode[known]], np.ones(known.sum()))
            placed[known] = told * spread + share[known].mean()
        placed[share < 1] = np.nan
        return recordings.means_at(seen.rows, placed)[:, 0]

    def reason(self, parts: tuple[str, ...]) -> str:
        """Cut short, or ended elsewhere."""
        if parts and parts[0] == VIEW:
            return "the last picture looks like the middle of other episodes"
        if parts and parts[0] == PROGRESS:
            return "the episode ends where others are still on their way"
        return "the episode is much shorter than others of its instruction"


def _share(recordings: Recordings, rows: np.ndarray) -> np.ndarray:
    """How far on their episodes' way some frames are, from 0 to 1."""
    return recordings.frame[rows] / np.maximum(recordings.length[recordings.episode[rows]] - 1, 1)


LENGTH_UNIT, PROGRESS_UNIT = 0.2, 0.1
"""Differences of a quarter of these, in log frames and in progress, mean nothing."""
