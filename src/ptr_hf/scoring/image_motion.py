"""Does the picture move when the robot does? No network: the change of the picture beside the change of the state."""

import numpy as np

from ptr_hf.scoring.action_from_consequence import listed
from ptr_hf.scoring.crossfit import CrossFit, Reweigh
from ptr_hf.scoring.question import Answer, CannotAskError, Question

STILL, SLOW, SLACK = 0.05, 0.5, 1.0
"""Changes of the picture and of the state, in the usual change, below which changes count alike."""


class ImageMotion(Question):
    """From each frame that was looked at to the next: how far each camera's picture changes, and how far the state does."""

    name = "image_motion"
    title = "Do the pictures move when the robot does?"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """log of the picture's change minus log of the state's, in usual changes; at most 0."""
        recordings, seen = fit.recordings, fit.recordings.images
        if seen is None:
            raise CannotAskError("no picture was looked at")
        episode = recordings.episode[seen.rows]
        to = np.minimum(np.arange(len(episode)) + 1, len(episode) - 1)
        to = np.where(episode[to] == episode, to, np.arange(len(episode)) - 1)
        alone = episode[to] != episode
        state = fit.state.cpu().numpy()[seen.rows]
        moved = np.linalg.norm(state[to] - state, axis=1)
        if not np.median(moved) > 0:
            raise CannotAskError("the state hardly moves, or there is none")
        finite = recordings.finite[seen.rows] & recordings.finite[seen.rows[to]] & ~alone
        scores = np.full((len(recordings), len(seen.cameras)), np.nan, np.float32)
        for place, picture in enumerate(seen.components):
            changed = np.linalg.norm(picture[to] - picture, axis=1)
            known = finite & np.isfinite(picture).all(axis=1) & np.isfinite(changed)
            usual = np.median(changed[known]) if known.any() and picture.shape[1] else 0.0
            if usual > 0:
                less = np.log(changed[known] / usual + STILL) - np.log(moved[known] / np.median(moved) + SLOW)
                scores[seen.rows[known], place] = np.minimum(less + SLACK, 0)
        return Answer(seen.cameras, scores)

    def reason(self, parts: tuple[str, ...]) -> str:
        """Which camera stands still."""
        return f"the pictures{listed(parts, ' of ')} stand still while the robot moves"
