"""Cheap questions that no network has to learn: rough actions, standing still, jumps, dimensions that hang."""

import numpy as np

from ptr_hf.scoring.action_from_consequence import listed, moving
from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.question import Answer, CannotAskError, Question

STILL = 1e-3
"""A dimension stands still where it changes by less than this share of its deviation from one frame to the next."""


class Roughness(Question):
    """Are the actions smooth? Their squared second differences, by dimension."""

    name = "roughness"
    title = "Are the actions smooth?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus log of the squared second difference of each action dimension, in deviations."""
        recordings = fit.recordings
        bends, still = on_disk(recordings.action.shape, np.float32), ~moving(fit)
        for own, span in recordings.blocks:
            action, finite = fit.action.numpy()[span], recordings.finite[span]
            bend = np.full(action.shape, np.nan, np.float32)
            bend[1:-1] = -np.log((action[2:] - 2 * action[1:-1] + action[:-2]) ** 2 + 1e-3)
            bend[np.concatenate([recordings.first[own], recordings.last[own]]) - span.start] = np.nan
            bend[~(finite & np.roll(finite, 1) & np.roll(finite, -1))] = np.nan
            bend[:, still] = np.nan
            bends[span] = bend
        return Answer(recordings.action_names, bends)

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
        state, action = fit.state.numpy(), fit.action.numpy()

        def longest(values: np.ndarray, first: np.ndarray) -> np.ndarray:
            still = np.all(_steps(values, first) < STILL, axis=1)
            still[first] = False
            places = np.arange(len(still))
            since = places - np.maximum.accumulate(np.where(still, -1, places))
            return np.maximum.reduceat(since, first)

        pause = recordings.over(lambda span: np.concatenate([state[span], action[span]], axis=1), longest)
        pause = pause / recordings.fps
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
        largest = recordings.over(
            fit.state.numpy(), lambda state, first: np.maximum.reduceat(_steps(state, first), first)
        )
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
        for values in (fit.state.numpy(), fit.action.numpy()):
            if not values.shape[1]:
                continue
            low, high = recordings.over(values, np.minimum.reduceat), recordings.over(values, np.maximum.reduceat)
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

        def gaps(timestamp: np.ndarray, first: np.ndarray) -> np.ndarray:
            gap = np.diff(timestamp, prepend=timestamp[:1]) * recordings.fps - 1
            gap[first] = 0
            return np.maximum.reduceat(np.abs(gap), first)

        largest = recordings.over(recordings.timestamp, gaps)
        if not np.isfinite(largest).all():
            raise CannotAskError("some frames have no timestamp")
        return Answer((self.name,), episodes=-np.log1p(largest)[:, None])


def _steps(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How far values (frames, K) are from the frame before; 0 at the places where episodes begin."""
    step = np.abs(np.diff(values, axis=0, prepend=values[:1]))
    step[first] = 0
    return step
