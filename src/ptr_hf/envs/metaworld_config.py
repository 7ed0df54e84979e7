"""The benchmark's tasks as a LeRobot environment: ``lerobot-eval --env.type=ptr_metaworld --env.task=reach-left,push-right``.

The package registers it when LeRobot looks for plugins, so ``lerobot-eval`` and ``lerobot-train`` know it. Meta-World itself
is imported when environments are made.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from ptr_hf.envs import draw_without_display


@EnvConfig.register_subclass("ptr_metaworld")
@dataclass
class PTRMetaworldConfig(EnvConfig):
    """The benchmark's environments.

    Args:
        task: names separated by commas, such as ``reach-left,faucet-open-v3``.
        fps: control steps per second.
        track: ``state`` for ``observation.state`` of 39 numbers; ``pixels`` for ``observation.image`` and 4 numbers.
        goals: where the goals of the six tasks lie: ``train``, or ``pretrain`` for other ones.
        episode_length: steps after which an episode has failed.
        image_size: side of the square image, in pixels.
    """

    task: str | None = "reach-left,reach-right"
    fps: int = 80
    track: Literal["state", "pixels"] = "state"
    goals: Literal["train", "pretrain"] = "train"
    episode_length: int = 150
    image_size: int = 84
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {"action": PolicyFeature(type=FeatureType.ACTION, shape=(4,))}
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {"action": ACTION, "agent_pos": OBS_STATE, "pixels": OBS_IMAGE}
    )

    def __post_init__(self) -> None:
        size = 39 if self.track == "state" else 4
        self.features["agent_pos"] = PolicyFeature(type=FeatureType.STATE, shape=(size,))
        if self.track == "pixels":
            self.features["pixels"] = PolicyFeature(
                type=FeatureType.VISUAL, shape=(self.image_size, self.image_size, 3)
            )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of every :class:`~ptr_hf.envs.metaworld_tasks.BenchmarkScene`."""
        return {
            "track": self.track,
            "goals": self.goals,
            "image_size": self.image_size,
            "max_steps": self.episode_length,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """{task: {0: n_envs environments}}, always in this process: a step is cheaper than the way to another one.

        Raises:
            ValueError: without a task, or for one that does not exist.
        """
        draw_without_display()
        from ptr_hf.envs.metaworld_tasks import BenchmarkScene

        tasks = [name.strip() for name in (self.task or "").split(",") if name.strip()]
        if not tasks:
            raise ValueError("env.task names no task; give for example --env.task=reach-left,faucet-open-v3.")
        return {
            task: {
                0: gym.vector.SyncVectorEnv(
                    [freeze_after_episode_end(partial(BenchmarkScene, task, **self.gym_kwargs)) for _ in range(n_envs)]
                )
            }
            for task in tasks
        }
