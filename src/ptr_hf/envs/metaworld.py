"""Meta-World at the size a small policy sees, and its scripted experts as demonstrators.

LeRobot's own environment renders 480x480 pixels with full shadows, resets itself inside ``step`` on success and shares
one rendering context between tasks. This one keeps its observations (``pixels``, ``agent_pos``), camera, seeds and
instructions, renders small images quickly in a context of its own, and lets an episode run on after success.

Needs the extra ``lerobot_policy_ptr[metaworld]`` and, to render, a headless GL: ``MUJOCO_GL=egl`` or ``MUJOCO_GL=osmesa``
set before ``mujoco`` is first imported.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float, Float32, UInt8

try:
    import mujoco
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS, TASK_POLICY_MAPPING
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
except ImportError as error:
    raise ImportError("Meta-World is not installed; run `pip install 'lerobot_policy_ptr[metaworld]'`.") from error

FPS = 80
SIMILAR_SCENES = (("reach-v3", "push-v3", "pick-place-v3"), ("faucet-open-v3", "faucet-close-v3"))
CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)
GOAL_COLOR = (0.0, 0.8, 0.0, 1.0)

Image = UInt8[np.ndarray, "height width 3"]
Observation = dict[str, np.ndarray]


def instruction(task: str) -> str:
    """LeRobot's instruction for a Meta-World task such as ``push-v3``.

    Raises:
        ValueError: for a task Meta-World does not have.
    """
    if task not in TASK_DESCRIPTIONS:
        raise ValueError(f"Meta-World has no task '{task}'; it has {', '.join(sorted(TASK_DESCRIPTIONS))}.")
    return TASK_DESCRIPTIONS[task]


class MetaworldScene(gym.Env):
    """One Meta-World task with small images; observations as LeRobot's ``MetaworldEnv`` with ``pixels_agent_pos``.

    Args:
        task: such as ``push-v3``.
        image_size: side of the square image, in pixels.
        supersample: the scene is rendered this many times larger and averaged; takes the place of antialiasing.
        shadow_size: side of the shadow map; 512 looks like the default 4096 at this size, 0 leaves shadows and part of the
            light out and doubles the speed.
        goal_color: of the goal marker in reach, push and pick-place. Meta-World paints it red, green and blue, which tells
            the task without the instruction; one colour makes the scenes alike. None keeps Meta-World's.
        max_steps: after which an episode is truncated.

    Attributes:
        task_description: the instruction.
        success: whether the task has been solved since the reset.
    """

    def __init__(
        self,
        task: str,
        image_size: int = 84,
        supersample: int = 4,
        shadow_size: int = 512,
        goal_color: tuple[float, float, float, float] | None = GOAL_COLOR,
        max_steps: int = 400,
    ) -> None:
        self.task = task
        self.task_description = instruction(task)
        self.render_mode = "rgb_array"
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}
        self.image_size, self.supersample = image_size, supersample
        self._max_episode_steps = max_steps
        self.success = False
        self._steps = 0
        self._expert = TASK_POLICY_MAPPING[task]()
        # What metaworld.MT1 does, without the hundred environments it builds to draw goals from.
        self._env = ALL_V3_ENVIRONMENTS[task]()
        self._env._set_task_called, self._env._partially_observable = True, False
        del self._env.sawyer_observation_space  # cached while the goal was hidden
        self._env._freeze_rand_vec = False  # otherwise every reset gives the same scene
        self._env.seeded_rand_vec = True
        model = self._env.model
        model.cam_pos[model.camera(CAMERA).id] = CAMERA_POSITION
        model.vis.quality.shadowsize, model.vis.quality.offsamples = shadow_size, 0
        if goal_color is not None and task in SIMILAR_SCENES[0]:
            model.site("goal").rgba = goal_color
        self._renderer: Any = None
        self._state = np.zeros(39)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "agent_pos": gym.spaces.Box(-1000.0, 1000.0, (4,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    @property
    def agent_pos(self) -> Float[np.ndarray, "4"]:
        """Hand position in metres (x, y, z) and gripper opening in [0, 1]."""
        return self._state[:4].copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """A new scene; the same seed gives the scene that LeRobot's environment gives."""
        self.reset_physics(seed)
        return self.observation(), {"is_success": False}

    def reset_physics(self, seed: int | None = None) -> None:
        """As :meth:`reset`, without rendering."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.seed(seed)
        self._state, _ = self._env.reset(seed=seed)
        # The goal marker is moved after the last forward pass: without this the first image shows the previous goal.
        mujoco.mj_kinematics(self._env.model, self._env.data)
        self._expert = self._new_expert()
        self.success, self._steps = False, 0

    def _new_expert(self) -> Any:
        """The scripted expert of the task, at the beginning of its script."""
        return TASK_POLICY_MAPPING[self.task]()

    def step(self, action: Float[np.ndarray, "4"]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step of 1/80 s. Ends the episode on success, but resets nothing: stepping on is allowed."""
        reward, solved = self.step_physics(action)
        truncated = self._steps >= self._max_episode_steps
        info: dict[str, Any] = {"task": self.task, "is_success": solved}
        if solved or truncated:
            info["final_info"] = {"task": self.task, "is_success": self.success}
        return self.observation(), reward, solved, truncated, info

    def step_physics(self, action: Float[np.ndarray, "4"]) -> tuple[float, bool]:
        """As :meth:`step`, without rendering: the reward, and whether the task is solved in the new state."""
        self._state, reward, _, _, info = self._env.step(action)
        solved = bool(info["success"])
        self.success, self._steps = self.success or solved, self._steps + 1
        return float(reward), solved

    def expert_action(self) -> Float32[np.ndarray, "4"]:
        """The scripted expert's next action, clipped to what the environment executes."""
        return np.clip(self._expert.get_action(self._state), -1.0, 1.0).astype(np.float32)

    def render(self) -> Image:
        """The current view, the right way up: the camera hangs upside down, as in LeRobot's environment."""
        if self._renderer is None:
            side = self.image_size * self.supersample
            self._env.model.vis.global_.offwidth = max(side, self._env.model.vis.global_.offwidth)
            self._env.model.vis.global_.offheight = max(side, self._env.model.vis.global_.offheight)
            self._renderer = mujoco.Renderer(self._env.model, side, side)
        self._renderer.update_scene(self._env.data, camera=CAMERA)
        self._prepare_render(self._renderer.scene)
        image = np.flip(self._renderer.render(), (0, 1)).astype(np.float32)
        size, factor = self.image_size, self.supersample
        return image.reshape(size, factor, size, factor, 3).mean((1, 3)).round().astype(np.uint8)

    def _prepare_render(self, scene: Any) -> None:
        """Changes MuJoCo's abstract scene before it is rendered; nothing is changed here."""

    def close(self) -> None:
        """Frees the rendering context; EGL complains if the interpreter has to do it."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()

    def observation(self) -> Observation:
        """What a policy sees now."""
        return {"pixels": self.render(), "agent_pos": self.agent_pos}
