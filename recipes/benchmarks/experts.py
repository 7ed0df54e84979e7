"""Meta-World's scripted experts as demonstrators: episodes that begin at given seeds and go on past success."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from episodes import Episode
from ptr_hf.envs.metaworld import SIMILAR_SCENES, MetaworldScene, instruction


def similar_instructions(tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """instruction -> the instructions, among those of ``tasks``, that would fit the same scene (:data:`SIMILAR_SCENES`)."""
    groups = [[instruction(task) for task in scene if task in tasks] for scene in SIMILAR_SCENES]
    return {task: tuple(other for other in group if other != task) for group in groups for task in group}


@dataclass(frozen=True)
class Recording:
    """A successful expert episode: ``success_step`` is the first step whose action solved the task."""

    episode: Episode
    environment: str
    environment_seed: int
    success_step: int


def record_expert(
    scene: MetaworldScene,
    seed: int,
    steps_after_success: int = 20,
    max_steps: int = 150,
    images: bool = True,
    must_stay: bool = True,
    operator: Callable[[MetaworldScene], Float32[np.ndarray, "4"]] | None = None,
) -> Recording | None:
    """Lets the scripted expert solve the scene ``seed``.

    Frame t holds the observation before action t. Recording goes on for ``steps_after_success`` steps, so that the last
    chunks have a future too, and the policy learns to stay.

    Args:
        scene: the task.
        seed: of the scene.
        steps_after_success: number of frames after the one whose action solved the task.
        max_steps: give up when the task is not solved by then.
        images: False leaves ``observation.image`` out and needs no GL.
        must_stay: the task has to be solved after the last step too.
        operator: chooses the actions, in [-1, 1]; the scripted expert if None.

    Returns:
        ``observation.image`` (steps, H, W, 3) uint8, ``observation.state`` (steps, state) and ``action`` (steps, 4) float32 under
        LeRobot's keys for Meta-World; None if the expert failed, or did not stay successful to the end as ``must_stay`` demands.
    """
    scene.reset_physics(seed)
    frames: dict[str, list[np.ndarray]] = {"observation.state": [], "action": []}
    if images:
        frames["observation.image"] = []
    success_step, solved = None, False
    while success_step is None or len(frames["action"]) <= success_step + steps_after_success:
        step = len(frames["action"])
        if step >= max_steps:
            return None
        action = scene.expert_action() if operator is None else operator(scene)
        if images:
            frames["observation.image"].append(scene.render())
        frames["observation.state"].append(scene.agent_pos.astype(np.float32))
        frames["action"].append(action)
        _, solved = scene.step_physics(action)
        if solved and success_step is None:
            success_step = step
    if must_stay and not solved:
        return None
    episode = Episode({key: np.stack(values) for key, values in frames.items()}, scene.task_description)
    return Recording(episode, scene.task, seed, success_step)


def record_demonstrations(scene: MetaworldScene, count: int, first_seed: int, **options: Any) -> list[Recording]:
    """``count`` successful recordings on the seeds from ``first_seed`` on, skipping those on which the expert fails.

    Raises:
        RuntimeError: if more than half of the attempts fail.
    """
    recordings: list[Recording] = []
    for attempt in range(2 * count):
        recording = record_expert(scene, first_seed + attempt, **options)
        if recording is not None:
            recordings.append(recording)
        if len(recordings) == count:
            return recordings
    raise RuntimeError(
        f"The expert solved only {len(recordings)} of {2 * count} scenes of '{scene.task}'; raise max_steps or choose "
        "another task."
    )
