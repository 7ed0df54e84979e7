"""Does what stays the same in the pictures of others stay the same? What a closed hand holds goes along with it."""

from dataclasses import dataclass

import numpy as np

from ptr_hf.scoring.action_from_consequence import listed
from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, CannotAskError, Question

TWO_VALUED, RAREST = 0.9, 0.05
"""Share of a command's variance that two values must explain, and of the frames that each of them must have."""
MOVING = 0.5
"""Change of the state, in the mean change, from which the robot moves."""
ALONG = 0.2
"""Mean squared change of the median pixel, in that of all, above which a camera moves along; fixed ones stay far below."""
SLACK, CLEAR = 0.5, 0.3
"""Change of a pixel, in the usual change, below which changes count alike; and how much smaller, in log, it must usually be."""
RESOLUTION = 0.05
"""Differences of the mean log change that mean nothing: what is held hardly changes, so that good episodes are much alike."""


@dataclass(frozen=True)
class _Still:
    """Pixels of a camera's thumbnails that usually stay the same.

    Attributes:
        pixels: (pixels,) their shares, 1 together.
        when: (pairs,) bool, the looks at which they do.
        clear: how much less they change than at other times, in log.
    """

    pixels: np.ndarray
    when: np.ndarray
    clear: float


class ImageConstancy(Question):
    """While a command such as the gripper's is at one of its two values and the robot moves, some pixels change far less than
    while it is at the other: there, the wrist's camera sees what is held. An episode in which they change has lost it.

    The command, its value and the pixels are found for each camera in all episodes together, by medians over the episodes. A
    camera that does not move along with the robot is left out: what stays before it is what nothing passed by.
    """

    name = "image_constancy"
    title = "Does what the robot holds stay in the pictures?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """Minus the log change, from look to look, of those pixels of each camera that usually stay."""
        recordings, seen = fit.recordings, fit.recordings.images
        if seen is None or seen.thumbnails is None:
            raise CannotAskError("no picture was looked at")
        finite = recordings.finite[seen.rows]
        commands = _two_valued(recordings.action[seen.rows], finite)
        if not len(commands):
            raise CannotAskError("no action has two values, as a gripper's has")
        episode = recordings.episode[seen.rows]
        row = np.flatnonzero((episode[:-1] == episode[1:]) & finite[:-1] & finite[1:])
        state = fit.state.numpy()[seen.rows]
        moved = np.linalg.norm(state[row + 1] - state[row], axis=1)
        if not moved.any():
            raise CannotAskError("the state hardly moves, or there is none")
        row = row[moved > MOVING * moved.mean()]
        scores = np.full((len(recordings), len(seen.cameras)), np.nan, np.float32)
        for place in range(len(seen.cameras)):
            picture = seen.thumbnails[:, place]
            changed = ((picture[row + 1] - picture[row]) ** 2).mean(axis=1)
            read = np.isfinite(changed).all(axis=1)
            usual = changed[read].mean() if read.any() else 0.0
            if read.any() and np.median(changed[read].mean(axis=0)) > ALONG * usual:
                change = np.log(changed[read] / usual + SLACK**2) / 2
                still = _still(change, episode[row[read]], commands[:, [row[read], row[read] + 1]])
                if still is not None:
                    scores[seen.rows[row[read][still.when]], place] = -(change[still.when] @ still.pixels)
        if not np.isfinite(scores).any():
            raise CannotAskError(
                "no camera moves along, or nothing in its pictures stays the same while a command does"
            )
        return Answer(seen.cameras, scores, resolution=RESOLUTION)

    def reason(self, parts: tuple[str, ...]) -> str:
        """Which camera shows a change."""
        return f"what stays the same in the pictures{listed(parts, ' of ')} of other episodes changes: what is held may be lost"


def _two_valued(action: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """(commands, looked) bool of the action dimensions that have two values, nearly: whether they are at the higher one."""
    found = [np.zeros((0, len(action)), bool)]
    for place in range(action.shape[1] if finite.any() else 0):
        values = action[:, place].astype(np.float64)
        known = values[finite]
        high = known > (known.min() + known.max()) / 2
        share = high.mean()
        if RAREST <= share <= 1 - RAREST:
            within = share * known[high].var() + (1 - share) * known[~high].var()
            if within <= (1 - TWO_VALUED) * known.var():
                found.append(values[None] > (known.min() + known.max()) / 2)
    return np.concatenate(found)


def _still(change: np.ndarray, episode: np.ndarray, commands: np.ndarray) -> _Still | None:
    """The pixels that stay while a command is at a value, of the command and value where they do so most; None if none do.

    Args:
        change: (pairs, pixels) log of the change from look to look.
        episode: (pairs,) of each pair.
        commands: (commands, 2, pairs) bool, before the change and after it.
    """
    best: _Still | None = None
    for command in commands:
        phases = command.all(axis=0), ~command.any(axis=0)
        if not (phases[0].any() and phases[1].any()):
            continue
        levels = [_median(change[phase], episode[phase]) for phase in phases]
        for when, less in ((phases[0], levels[1] - levels[0]), (phases[1], levels[0] - levels[1])):
            if less.max() > max(CLEAR, best.clear if best else 0):
                pixels = np.maximum(less - less.max() / 2, 0)
                best = _Still(pixels / pixels.sum(), when, float(less.max()))
    return best


def _median(change: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """(pixels,) median over the episodes of the mean change."""
    means = [change[episode == number].mean(axis=0) for number in np.unique(episode)]
    return np.asarray(np.median(np.stack(means), axis=0))
