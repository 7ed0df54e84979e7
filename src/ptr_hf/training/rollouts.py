"""Success rates in the benchmark's tasks, in this process: what LeRobot's evaluation loop gives, without its waiting.

Episodes of all tasks advance together, a chunk at a time: one prediction for the whole batch, then every episode executes
its actions open loop, as ``select_action`` does. Images are rendered when a chunk is predicted, not at every step; one
simulator serves all episodes of a scene; and an episode stops when it is solved.
"""

import atexit
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from tqdm import tqdm

from ptr_hf.envs.metaworld_tasks import EPISODE_STEPS, PUCK_TASKS, BenchmarkScene, Goals, Snapshot, Track
from ptr_hf.modeling_ptr import PTRPolicy

STATELESS = ("act", "smolvla", "smolvla_state")


@dataclass(frozen=True)
class Rollouts:
    """Outcomes by task and start; ``steps`` is the number of actions executed until success or the limit."""

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    success: Bool[np.ndarray, "tasks seeds"]
    steps: Int[np.ndarray, "tasks seeds"]

    @property
    def mean(self) -> float:
        """Success rate over all episodes."""
        return float(self.success.mean())

    @property
    def by_task(self) -> dict[str, float]:
        """Success rate of every task."""
        return dict(zip(self.tasks, self.success.mean(1).tolist(), strict=True))


def shared_scene(task: str, track: Track, goals: Goals = "train") -> BenchmarkScene:
    """This process's scene for a task, switched to it. Building one takes half a second, so they are kept."""
    scene = _scene(PUCK_TASKS[0] if task in PUCK_TASKS else task, track, goals)
    scene.select(task)
    return scene


@cache
def _scene(task: str, track: Track, goals: Goals) -> BenchmarkScene:
    scene = BenchmarkScene(task, track, goals)
    atexit.register(scene.close)  # EGL complains if the interpreter frees the context
    return scene


@dataclass
class _Episode:
    scene: BenchmarkScene
    task: str
    seed: int
    snapshot: Snapshot
    observation: dict[str, np.ndarray] = field(default_factory=dict)
    instruction: str = ""
    done: bool = False

    @classmethod
    def begin(cls, task: str, seed: int, track: Track, goals: Goals) -> "_Episode":
        scene = shared_scene(task, track, goals)
        scene.reset_physics(seed)
        episode = cls(scene, task, seed, scene.snapshot(), instruction=scene.task_description)
        episode.observation = scene.observation()
        return episode

    def execute(self, actions: Float[np.ndarray, "steps action"], max_steps: int) -> None:
        """Executes actions until they are used up, the task is solved or the steps run out."""
        self.scene.restore(self.snapshot)
        for action in actions:
            _, solved = self.scene.step_physics(action)
            self.done = solved or self.scene.steps >= max_steps
            if self.done:
                break
        self.snapshot = self.scene.snapshot()
        if not self.done:
            self.observation = self.scene.observation()


def evaluate_success(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    *,
    tasks: Sequence[str],
    track: Track,
    seeds: Sequence[int],
    goals: Goals = "train",
    batch_size: int = 128,
    n_action_steps: int | None = None,
    max_steps: int = EPISODE_STEPS,
    seed: int = 0,
    progress: bool = True,
) -> Rollouts:
    """Rolls the policy out once for every task and start.

    Args:
        policy: any LeRobot policy that predicts chunks from one observation.
        preprocessor: the policy's, for a batch.
        postprocessor: the policy's, applied to whole chunks.
        tasks: of the benchmark, or of Meta-World.
        track: what the policy observes.
        seeds: of the starts, the same for every task.
        goals: where the goals of the six tasks lie.
        batch_size: episodes that advance together.
        n_action_steps: actions of a chunk that are executed; the policy's own number if None.
        max_steps: after which an episode has failed.
        seed: of the policy's own draws; the global random state stays untouched.
        progress: shows a bar.

    Raises:
        ValueError: without tasks or seeds, for a policy that cannot be run chunk by chunk, or more action steps than the
            policy predicts.
    """
    if not tasks or not seeds:
        raise ValueError(f"Name at least one task and one start seed; got tasks={list(tasks)} and seeds={list(seeds)}.")
    steps = _action_steps(policy, n_action_steps)
    keep_rows = _keeps_rows(policy)
    pairs = [(task, start) for task in tasks for start in seeds]
    finished: list[_Episode] = []
    was_training = policy.training
    policy.eval()
    with torch.random.fork_rng(), tqdm(total=len(pairs), desc="rollouts", unit="episode", disable=not progress) as bar:
        torch.manual_seed(seed)
        for first in range(0, len(pairs), batch_size):
            episodes = [_Episode.begin(task, start, track, goals) for task, start in pairs[first : first + batch_size]]
            policy.reset()
            running = episodes
            while running:
                rows = episodes if keep_rows else running
                chunks = _predict(policy, preprocessor, postprocessor, rows)[:, :steps]
                for episode, actions in zip(rows, chunks, strict=True):
                    if not episode.done:
                        episode.execute(actions, max_steps)
                left = [episode for episode in running if not episode.done]
                bar.update(len(running) - len(left))
                running = left
            finished.extend(episodes)
            bar.set_postfix(success=f"{np.mean([episode.snapshot.success for episode in finished]):.1%}")
    policy.train(was_training)
    shape = len(tasks), len(seeds)
    return Rollouts(
        tuple(tasks),
        tuple(seeds),
        np.array([episode.snapshot.success for episode in finished]).reshape(shape),
        np.array([episode.snapshot.steps for episode in finished]).reshape(shape),
    )


def _predict(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    episodes: Sequence[_Episode],
) -> Float[np.ndarray, "batch chunk action"]:
    keys = episodes[0].observation
    batch: dict[str, Any] = preprocess_observation(
        {key: np.stack([e.observation[key] for e in episodes]) for key in keys}
    )
    batch["task"] = [episode.instruction for episode in episodes]
    with torch.inference_mode():
        chunk = postprocessor(policy.predict_action_chunk(preprocessor(batch)))
    return chunk.float().cpu().numpy()


def _action_steps(policy: PreTrainedPolicy, asked: int | None) -> int:
    settings = vars(policy.config.base_config if isinstance(policy, PTRPolicy) else policy.config)
    if (
        settings["n_obs_steps"] != 1
        or settings.get("temporal_ensemble_coeff") is not None
        or "chunk_size" not in settings
    ):
        raise ValueError(
            f"The policy '{policy.config.type}' does not act chunk by chunk on single observations (n_obs_steps=1, no "
            "temporal ensembling); evaluate it with lerobot-eval and --env.type=ptr_metaworld."
        )
    steps = settings["n_action_steps"] if asked is None else asked
    if not 1 <= steps <= settings["chunk_size"]:
        raise ValueError(
            f"n_action_steps={steps} has to lie between 1 and the policy's chunk of {settings['chunk_size']}."
        )
    return steps


def _keeps_rows(policy: PreTrainedPolicy) -> bool:
    """Whether a batch keeps its rows until its last episode ends: the policy may carry something from chunk to chunk."""
    if isinstance(policy, PTRPolicy):
        return policy.belief is not None
    return policy.config.type not in STATELESS
