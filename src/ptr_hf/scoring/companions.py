"""Cheap questions that no network has to learn: rough actions, standing still, jumps, dimensions that hang."""

import numpy as np

from ptr_hf.scoring.action_from_consequence import listed, moving
from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, CannotAskError, Question
from ptr_hf.scoring.recordings import Recordings

STILL = 1e-3
"""A dimension stands still where it changes by less than this share of its deviation from one frame to the next."""


class Roughness(Question):
    """Are the actions smooth? Their squared second differences, by dimension."""

    name = "roughness"
    title = "Are the actions smooth?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus log of the squared second difference of each action dimension, in deviations."""
        recordings = fit.recordings
        action = fit.action.cpu().numpy()
        bend = np.full(action.shape, np.nan, np.float32)
        bend[1:-1] = -np.log((action[2:] - 2 * action[1:-1] + action[:-2]) ** 2 + 1e-3)
        bend[np.concatenate([recordings.first, recordings.last])] = np.nan
        bend[~_between_finite(recordings)] = np.nan
        bend[:, ~moving(fit)] = np.nan
        return Answer(recordings.action_names, bend)

    def reason(self, parts: tuple[str, ...]) -> str:
        """Which commands are noisy."""
        return "the actions are rough" if not parts else f"the commands of {listed(parts)} are noisy"


class Idleness(Question):
    """Does the robot keep moving? The longest time in which neither state nor action changes."""

    name = "idleness"
    title = "Does the robot keep moving?"
    sentence = "the robot stands still for long"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus log of 1 + the longest pause in seconds."""
        recordings = fit.recordings
        still = np.ones(len(recordings), bool)
        for values in (fit.state.cpu().numpy(), fit.action.cpu().numpy()):
            change = np.abs(np.diff(values, axis=0, prepend=values[:1]))
            still &= (change < STILL).all(axis=1)
        still[recordings.first] = False
        pause = _longest_runs(still, recordings) / recordings.fps
        return Answer((self.name,), episodes=-np.log1p(pause)[:, None])


class Jumps(Question):
    """Does the state change steadily? The largest change from one frame to the next, by its usual size."""

    name = "jumps"
    title = "Does the state change without jumps?"
    sentence = "the state jumps from one frame to the next"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus log of the largest step of any state dimension, in that dimension's usual large steps."""
        recordings = fit.recordings
        if not recordings.state.shape[1]:
            raise CannotAskError("there is no proprioception")
        state = fit.state.cpu().numpy()
        step = np.abs(np.diff(state, axis=0, prepend=state[:1]))
        step[recordings.first] = 0
        largest = np.maximum.reduceat(step, recordings.first, axis=0)
        usual = np.median(largest, axis=0)
        known = usual > STILL
        if not known.any():
            raise CannotAskError("the state hardly moves")
        return Answer((self.name,), episodes=-np.log((largest[:, known] / usual[known]).max(axis=1) + 0.1)[:, None])


class Frozen(Question):
    """Does everything move that moves in nearly all other episodes?"""

    name = "frozen"
    title = "Do all joints and commands move?"
    sentence = "a joint or command that moves elsewhere stands still"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus the number of dimensions that stand still here and move in 95 % of the episodes."""
        recordings = fit.recordings
        if len(recordings.length) < LEAST_TO_EXPECT:
            raise CannotAskError(f"fewer than {LEAST_TO_EXPECT} episodes do not show what always moves")
        hanging = np.zeros(len(recordings.length))
        for values in (fit.state.cpu().numpy(), fit.action.cpu().numpy()):
            if not values.shape[1]:
                continue
            low = np.minimum.reduceat(values, recordings.first, axis=0)
            high = np.maximum.reduceat(values, recordings.first, axis=0)
            moves = high - low > STILL
            expected = moves.mean(axis=0) >= EXPECTED
            hanging += (~moves & expected).sum(axis=1)
        return Answer((self.name,), episodes=-2.0 * hanging[:, None])


LEAST_TO_EXPECT, EXPECTED = 20, 0.95


class Timing(Question):
    """Do the timestamps follow the frame rate?"""

    name = "timing"
    title = "Do the timestamps follow the frame rate?"
    sentence = "the timestamps have gaps"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus log of 1 + the largest gap between two timestamps beyond one frame, in frames."""
        recordings = fit.recordings
        if not np.isfinite(recordings.timestamp).all():
            raise CannotAskError("some frames have no timestamp")
        gap = np.diff(recordings.timestamp, prepend=recordings.timestamp[:1]) * recordings.fps - 1
        gap[recordings.first] = 0
        largest = np.maximum.reduceat(np.abs(gap), recordings.first)
        return Answer((self.name,), episodes=-np.log1p(largest)[:, None])


def _between_finite(recordings: Recordings) -> np.ndarray:
    """(frames,) whether a frame and both beside it hold numbers alone."""
    finite = recordings.finite
    return finite & np.roll(finite, 1) & np.roll(finite, -1)


def _longest_runs(true: np.ndarray, recordings: Recordings) -> np.ndarray:
    """(episodes,) the longest run of true frames; the first frame of an episode must not be true."""
    places = np.arange(len(true))
    since = places - np.maximum.accumulate(np.where(true, -1, places))
    return np.maximum.reduceat(since, recordings.first)
