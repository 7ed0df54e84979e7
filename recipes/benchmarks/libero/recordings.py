"""Demonstrations of LIBERO's tasks by scripted operators, recorded on states or before LIBERO's cameras."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.libero.experts import Kind, Operator
from benchmarks.libero.scene import MAX_STEPS, LiberoScene, Starts

AFTER = 15
"""Steps that an episode goes on once the hand has opened at the goal."""


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode.

    Attributes:
        states: (steps, 8) float32, before each action.
        objects: (steps, numbers) float32, what the states track adds to them.
        actions: (steps, 7) float32, as the operator wrote them down.
        kind: of the operator.
        start: number of the start.
        success_step: the step after which the goal was met; None if it never was.
        pictures: camera -> (steps, size, size, 3) uint8, before each action; empty without cameras.
    """

    states: np.ndarray
    objects: np.ndarray
    actions: np.ndarray
    kind: Kind
    start: int
    success_step: int | None
    pictures: Mapping[str, np.ndarray]

    @property
    def is_as_meant(self) -> bool:
        """Whether it succeeded, or failed where that is its kind."""
        return (self.success_step is None) == (self.kind == "failed_attempt")


def record(
    scene: LiberoScene,
    start: int,
    starts: Starts = "sampled",
    kind: Kind = "clean",
    film: Callable[[], Mapping[str, np.ndarray]] | None = None,
    limit: int = MAX_STEPS,
) -> Demonstration:
    """Let an operator do the task once, and go on for :data:`AFTER` steps once the hand has opened at the goal.

    So the last chunks have a future, and an episode's length does not say whether the object was in the hand. The same start and
    kind give the same episode, with cameras or without.
    """
    scene.film = film
    scene.reset(start, starts)
    operator = Operator(scene, start, kind)
    states: list[np.ndarray] = []
    objects: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    pictures: dict[str, list[np.ndarray]] = {}
    success_step = None
    for action in operator.script():
        if scene.steps == limit or (operator.let_go_at is not None and scene.steps == operator.let_go_at + AFTER):
            break
        states.append(scene.state())
        objects.append(scene.object_state())
        action = np.clip(action, -1.0, 1.0).astype(np.float32)  # what is written is what is done, to the last bit
        actions.append(operator.written(action).astype(np.float32))
        for key, picture in scene.pictures().items():
            pictures.setdefault(key, []).append(picture)
        scene.step(action)
        if scene.success and success_step is None:
            success_step = scene.steps
    seen = {key: np.stack(frames) for key, frames in pictures.items()}
    return Demonstration(np.stack(states), np.stack(objects), np.stack(actions), kind, start, success_step, seen)
