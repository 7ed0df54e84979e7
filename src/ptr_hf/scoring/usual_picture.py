"""Do the pictures show what others show there? Where a grasp slips and the arm goes on, only the picture of the hand differs."""

import numpy as np

from ptr_hf.scoring.action_from_consequence import listed
from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, CannotAskError, Question
from ptr_hf.scoring.seen import predicted

NEIGHBOURS, FEWEST, MOST = 7, 3, 48
"""Other episodes of the task that a picture is compared with; fewer than which do not judge; among how many they are found."""
STEP, COMMAND = 0.3, 0.3
"""Weights of the last step and of the action beside that of the state, where it is asked who does the same."""
TOLD, PENALTY = 0.2, 1.0
"""Share of an action's variance that a region must tell to be looked at, and the ridge's penalty where this is found."""
SLACK, FARTHEST, FLOOR = 0.3, 4.0, 0.05
"""Added to the usual deviation, in deviations of all pictures; deviations above which all count alike; added to their square."""


class UsualPicture(Question):
    """Compare each picture with those of other episodes of the task when the robot was and did most nearly the same.

    Objects and background differ from episode to episode, so only those regions of a picture are compared that tell, in episodes
    that the model has not seen, what the robot does: where hand, arm or what they hold are seen. With thumbnails a region is one
    of 8 x 8 fields; other encoders' vectors are one region.
    """

    name = "usual_picture"
    title = "Do the pictures show what other episodes show there?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """-log of each camera's mean squared deviation from the neighbours' median, in usual deviations."""
        recordings, seen = fit.recordings, fit.recordings.images
        if seen is None:
            raise CannotAskError("no picture was looked at")
        if fit.folds < 2:
            raise CannotAskError("it takes two episodes to judge one by the other")
        if not recordings.state.shape[1]:
            raise CannotAskError("there is no proprioception, so nobody knows which pictures should be alike")
        scores = np.full((len(recordings), len(seen.cameras)), np.nan, np.float32)
        for place, regions in enumerate(seen.regions):
            known = np.flatnonzero(np.isfinite(regions[:, 0]).all(axis=1) & recordings.finite[seen.rows])
            told = _telling(regions[known], fit, seen.rows[known])
            if told.any():
                rows = seen.rows[known]
                scores[rows, place] = -np.log(_deviation(regions[known][:, told], fit, rows) + FLOOR)
        if not np.isfinite(scores).any():
            raise CannotAskError("no region of the pictures tells what the robot does, or no task has four episodes")
        return Answer(seen.cameras, scores)

    def reason(self, parts: tuple[str, ...]) -> str:
        """Which camera shows something else."""
        return f"the pictures{listed(parts, ' of ')} do not show what other episodes show where the robot does the same"


def _telling(regions: np.ndarray, fit: CrossFit, rows: np.ndarray) -> np.ndarray:
    """(regions,) whether some action can be told from it."""
    action = fit.action.cpu().numpy()[rows]
    action = action[:, action.std(axis=0) > 0]
    fold = fit.fold[fit.recordings.episode[rows]]
    if not action.shape[1] or len(np.unique(fold)) < 2:
        return np.zeros(regions.shape[1], bool)
    action = (action - action.mean(axis=0)) / action.std(axis=0)
    left = [
        ((predicted(regions[:, region], action, fold, np.ones(len(rows)), PENALTY) - action) ** 2).mean(axis=0).min()
        for region in range(regions.shape[1])
    ]
    return np.array(left) < 1 - TOLD


def _deviation(regions: np.ndarray, fit: CrossFit, rows: np.ndarray) -> np.ndarray:
    """(looked,) mean squared deviation from what the neighbours show; NaN where there are too few of them.

    Args:
        regions: (looked, regions, numbers).
        rows: (looked,) of the frames.
    """
    recordings = fit.recordings
    episode = recordings.episode[rows]
    shown = regions.reshape(len(regions), -1)
    slack = SLACK * shown.std(axis=0).mean() + 1e-9
    where = _doing(fit, rows)
    found = np.full(len(rows), np.nan)
    for task in np.unique(recordings.task[episode]):
        members = np.unique(episode[recordings.task[episode] == task])
        chosen = members[np.unique(np.linspace(0, len(members) - 1, min(len(members), MOST)).astype(int))]
        places = [np.flatnonzero(episode == member) for member in chosen]
        for member in members:
            own = np.flatnonzero(episode == member)
            others = [place for place, number in zip(places, chosen, strict=True) if number != member]
            if len(others) < FEWEST:
                continue
            apart = [((where[own, None] - where[None, place]) ** 2).sum(axis=2) for place in others]
            nearest = np.stack([place[far.argmin(axis=1)] for place, far in zip(others, apart, strict=True)], axis=1)
            order = np.stack([far.min(axis=1) for far in apart], axis=1).argsort(axis=1, kind="stable")[:, :NEIGHBOURS]
            beside = shown[np.take_along_axis(nearest, order, axis=1)]
            usual = np.median(beside, axis=1)
            spread = 1.48 * np.median(np.abs(beside - usual[:, None]), axis=1)
            away = np.clip((shown[own] - usual) / (spread + slack), -FARTHEST, FARTHEST)
            found[own] = (away**2).mean(axis=1)
    return found


def _doing(fit: CrossFit, rows: np.ndarray) -> np.ndarray:
    """(looked, numbers) where the robot is, how it came there, and what it is told to do."""
    state, first = fit.state.cpu().numpy(), fit.recordings.first[fit.recordings.episode[rows]]
    step = state[rows] - state[np.maximum(rows - 2, first)]
    step /= np.maximum(step.std(axis=0), 1e-6)
    return np.concatenate([state[rows].clip(-6, 6), STEP * step, COMMAND * fit.action.cpu().numpy()[rows]], axis=1)
