"""Can the action be told from what followed? The inverse question, asked of every action dimension."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ptr_hf.scoring.crossfit import CrossFit, FoldedMLP, Reweigh, taken
from ptr_hf.scoring.question import Answer, CannotAskError, Question

STEPS = (-1, 1, 2, 4, 8)
"""Frames from the action to the states that are compared with the state at the action."""
MOVES = 0.05
"""A dimension is judged if in at least half of the episodes it moves by this share of its deviation over the dataset."""


class ActionFromConsequence(Question):
    """Regress each standardised action dimension on the state and on its changes before and after, with a Huber loss."""

    name = "action_from_consequence"
    title = "Do the actions explain what happened?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus the squared error of each action dimension, in deviations; an episode's score is -log of its mean."""
        recordings = fit.recordings
        if not recordings.state.shape[1]:
            raise CannotAskError("there is no proprioception, so nothing is known of what followed an action")
        if fit.folds < 2:
            raise CannotAskError("it takes two episodes to judge one by the other")
        changes = _Changes(fit)
        network = FoldedMLP(
            fit.folds,
            fit.state.shape[1] * (1 + len(STEPS)),
            fit.settings.hidden,
            fit.action.shape[1],
            torch.Generator().manual_seed(fit.settings.seed),
        )

        def loss(rows: Tensor) -> Tensor:
            return functional.huber_loss(network(changes(rows)), taken(fit.action, rows))

        def judge(fold: int, rows: Tensor) -> Tensor:
            return -(network.of_fold(fold, changes(rows)) - taken(fit.action, rows)).square()

        def trust(errors: np.ndarray) -> np.ndarray:
            return reweigh(-np.log(np.maximum(-errors, 0) + TRUST_FLOOR))

        scores = fit.fit(network, loss, judge, trust, self.title)
        scores[:, ~moving(fit)] = np.nan
        return Answer(recordings.action_names, scores, FLOOR)

    def reason(self, parts: tuple[str, ...]) -> str:
        """Which of the commanded dimensions the robot did not follow."""
        if not parts:
            return "the robot does not do what was commanded"
        return f"the robot does not do what {listed(parts)} command{'s' if len(parts) == 1 else ''}"


FLOOR, TRUST_FLOOR = 0.1, 0.01
"""Squared errors, in deviations, below which errors count alike: where episodes are judged, and where it is chosen what to learn
from."""


class _Changes:
    """The state at an action, and its changes before and after, each at deviation 1."""

    def __init__(self, fit: CrossFit) -> None:
        self._fit = fit
        rows = torch.as_tensor(fit.rows, device=fit.settings.device)
        spreads = [self._changes(rows, (steps,)).std(dim=0, correction=0) for steps in STEPS]
        self._scale = torch.cat([torch.ones_like(spreads[0]), *(1 / spread.clamp(min=1e-4) for spread in spreads)])

    def _changes(self, rows: Tensor, steps: Sequence[int]) -> Tensor:
        state = self._fit.state
        return (taken(state, self._fit.at(rows, steps)) - taken(state, rows)[:, None]).flatten(1)

    def __call__(self, rows: Tensor) -> Tensor:
        """Frames (...,) given by their rows -> (..., inputs)."""
        flat = rows.reshape(-1)
        inputs = torch.cat([taken(self._fit.state, flat), self._changes(flat, STEPS)], dim=1)
        inputs = inputs.mul_(self._scale).clamp_(-8, 8)
        return inputs.reshape(*rows.shape, -1)


def moving(fit: CrossFit) -> np.ndarray:
    """(action dimensions,) whether at least half of the episodes move it: others cannot be learned, and are not judged."""
    recordings = fit.recordings
    action = fit.action.numpy()
    spread = np.sqrt(np.maximum(recordings.means(lambda span: action[span] ** 2) - recordings.means(action) ** 2, 0))
    return np.median(spread, axis=0) > MOVES


def listed(names: tuple[str, ...], before: str = "") -> str:
    """Up to three names in a sentence, with words before them, and how many more; nothing without a name."""
    if not names:
        return ""
    *shown, last = (*names[:3], f"{len(names) - 3} more") if len(names) > 3 else names
    return before + (f"{', '.join(shown)} and {last}" if shown else last)
