"""Can the robot's state be told from the picture? Where it cannot, the camera was moved, hangs, or shows something else."""

import numpy as np

from ptr_hf.scoring.action_from_consequence import listed
from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, CannotAskError, Question
from ptr_hf.scoring.seen import predicted

ROUNDS = 3
FLOOR, TYPICAL_FLOOR = 0.1, 0.05
"""Errors below which errors count alike: in usual errors, and in deviations of the state where the usual error is found."""


class StateFromImage(Question):
    """Regress the standardised state on each camera's picture, by models of other episodes; each camera is judged apart."""

    name = "state_from_image"
    title = "Do the pictures show where the robot is?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus the mean squared error of the state, each dimension in its usual error, of every frame that was looked at."""
        recordings, seen = fit.recordings, fit.recordings.images
        if seen is None:
            raise CannotAskError("no picture was looked at")
        if fit.folds < 2:
            raise CannotAskError("it takes two episodes to judge one by the other")
        state = fit.state.cpu().numpy()[seen.rows]
        state = state[:, state.std(axis=0) > 0]
        if not state.shape[1]:
            raise CannotAskError("there is no proprioception to compare the pictures with")
        episode = recordings.episode[seen.rows]
        scores = np.full((len(recordings), len(seen.cameras)), np.nan, np.float32)
        for place, picture in enumerate(seen.components):
            known = np.isfinite(picture).all(axis=1) & recordings.finite[seen.rows]
            if not picture.shape[1] or len(np.unique(fit.fold[episode[known]])) < 2:
                continue
            rows = seen.rows[known]
            trust = np.ones(len(recordings.length))
            for _ in range(ROUNDS):
                told = predicted(picture[known], state[known], fit.fold[episode[known]], trust[episode[known]])
                errors = np.full((len(recordings), state.shape[1]), np.nan, np.float32)
                errors[rows] = (told - state[known]) ** 2
                usual = np.nanmedian(recordings.means(errors), axis=0)
                scores[rows, place] = -(errors[rows] / (usual + TYPICAL_FLOOR)).mean(axis=1)
                level = -np.log(-recordings.means(scores[:, place : place + 1]) + TYPICAL_FLOOR)
                trust = np.clip(reweigh(level), 1e-3, 1)
        return Answer(seen.cameras, scores, FLOOR)

    def reason(self, parts: tuple[str, ...]) -> str:
        """Which camera does not show the robot where it is."""
        return f"the pictures{listed(parts, ' of ')} do not show the robot where its state says it is"
