"""The benchmark's tasks: six that only the instruction tells apart, and stock Meta-World tasks.

The six share the scene and the physics of ``pick-place-v3``. An episode has two goals, mirror images about x = 0, and a
task is a verb and a side: ``reach``, ``push`` or ``pick-place``, ``left`` or ``right`` (as the robot sees it: right is
+x). Whatever the task, the state shows the right goal and the image shows both. The two faucet tasks share their scene
too: unlike in Meta-World, the faucet stands in the same range.

A scene keeps several episodes going: :meth:`BenchmarkScene.snapshot` and :meth:`BenchmarkScene.restore` switch between
them, and continue exactly where they left off. Success is Meta-World's own, at its thresholds.
"""

from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import metaworld.policies
import mujoco
import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

from ptr_hf.envs.metaworld import GOAL_COLOR, Image, MetaworldScene, Observation, instruction

Track = Literal["state", "pixels"]
Goals = Literal["train", "pretrain"]

VERBS = {
    "reach": "reach the goal",
    "push": "push the puck to the goal",
    "pick-place": "pick up the puck and bring it to the goal",
}
PUCK_TASKS = tuple(f"{verb}-{side}" for verb in VERBS for side in ("left", "right"))
STATE_TASKS = (*PUCK_TASKS, "faucet-open-v3", "faucet-close-v3")
PIXEL_TASKS = (
    "reach-left",
    "reach-right",
    "faucet-open-v3",
    "faucet-close-v3",
    "button-press-v3",
    "handle-press-v3",
)
EPISODE_STEPS = 150
FAUCET_TASKS = ("faucet-open-v3", "faucet-close-v3")
FAUCET_RANGE = ((-0.05, 0.80, 0.0), (0.05, 0.85, 0.0))  # where it stands: that of faucet-open for both

PUCK_SCENE = "pick-place-v3"
EXPERTS = {
    "reach": metaworld.policies.SawyerReachV3Policy,
    "push": metaworld.policies.SawyerPushV3Policy,
    "pick-place": metaworld.policies.SawyerPickPlaceV3Policy,
}
RADIUS = {"reach": 0.05, "push": 0.05, "pick-place": 0.07}  # as in Meta-World, in metres
TABLE = 0.02  # height of the puck's centre on the table
GOAL_Y = {"train": (0.80, 0.90), "pretrain": (0.74, 0.80)}
GOAL_X, GOAL_Z = (0.08, 0.18), (0.10, 0.25)
CLEARANCE = 0.15  # between the puck and either goal, in the plane; as in Meta-World
GOAL_SIZE = 0.02
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION


def task_instruction(task: str) -> str:
    """The instruction of a benchmark task.

    Raises:
        ValueError: for a task that neither the benchmark nor Meta-World has.
    """
    if task in PUCK_TASKS:
        verb, side = task.rsplit("-", 1)
        return f"{VERBS[verb]} on the {side}"
    return instruction(task)


@dataclass(frozen=True)
class Start:
    """Where an episode of the six tasks begins, in metres: the puck and the two goals."""

    puck: Float64[np.ndarray, "3"]
    right: Float64[np.ndarray, "3"]

    @property
    def left(self) -> Float64[np.ndarray, "3"]:
        return self.right * (-1, 1, 1)

    def target(self, task: str) -> Float64[np.ndarray, "3"]:
        """Where the hand or the puck has to go."""
        verb, side = task.rsplit("-", 1)
        goal = (self.right if side == "right" else self.left).copy()
        if verb == "push":
            goal[2] = TABLE
        return goal


def draw_start(seed: int, goals: Goals = "train") -> Start:
    """The start of the seed, the same for all six tasks; ``pretrain`` puts the goals nearer to the robot."""
    rng = np.random.default_rng([seed, list(GOAL_Y).index(goals)])
    while True:
        puck = np.array([rng.uniform(-0.1, 0.1), rng.uniform(0.6, 0.7), TABLE])
        start = Start(puck, np.array([rng.uniform(*GOAL_X), rng.uniform(*GOAL_Y[goals]), rng.uniform(*GOAL_Z)]))
        if min(np.linalg.norm((puck - goal)[:2]) for goal in (start.left, start.right)) >= CLEARANCE:
            return start


@dataclass(frozen=True)
class Snapshot:
    """An episode put aside: MuJoCo's integration state, what a reset changes in the model, and the environment's fields."""

    task: str
    physics: np.ndarray
    body_pos: np.ndarray
    site_pos: np.ndarray
    fields: dict[str, Any]
    state: np.ndarray
    poses: tuple[np.ndarray, np.ndarray]
    start: Start | None
    success: bool
    steps: int


class BenchmarkScene(MetaworldScene):
    """The tasks of one Meta-World scene, as gym environment and as demonstrator.

    Args:
        task: one of :data:`PUCK_TASKS`, or any task of Meta-World such as ``faucet-open-v3``.
        track: ``state`` observes the 39 numbers of Meta-World, with the right goal in the last three (zeros in stock
            tasks); ``pixels`` the image and the hand's position and gripper.
        goals: where the goals of the six tasks lie.
        image_size: side of the square image, in pixels.
        max_steps: after which an episode is truncated.

    Attributes:
        tasks: those this scene can switch between with :meth:`select`.
        task: the one at present.
    """

    def __init__(
        self,
        task: str,
        track: Track = "state",
        goals: Goals = "train",
        image_size: int = 84,
        max_steps: int = EPISODE_STEPS,
    ) -> None:
        shared = task in PUCK_TASKS
        super().__init__(
            PUCK_SCENE if shared else task,
            image_size=image_size,
            supersample=1,
            shadow_size=0,
            goal_color=None,
            max_steps=max_steps,
        )
        self.track, self.goals = track, goals
        self.tasks = PUCK_TASKS if shared else (task,)
        self._poses = np.zeros(21), np.zeros(21)  # one step ago and now; turned into a state when it is asked for
        self._start: Start | None = None
        self._starts: dict[int, Snapshot] = {}
        model = self._env.model
        # Stock markers lie elsewhere, or look different, from task to task.
        for site in range(model.nsite):
            if "goal" in model.site(site).name.lower():
                model.site_rgba[site, 3] = 0.0
        if task in FAUCET_TASKS:
            bounds = np.array(FAUCET_RANGE)
            self._env._random_reset_space = gym.spaces.Box(bounds[0], bounds[1], dtype=np.float64)
        space = self._env.sawyer_observation_space
        self._low, self._high = space.low[:18], space.high[:18]
        self._bodies = [model.body(name).id for name in ("hand", "rightclaw", "leftclaw")]
        self._puck = model.geom("objGeom").id if shared else None
        if shared:
            self._bodies.append(model.body("obj").id)
        self._tips = [model.site(name).id for name in ("rightEndEffector", "leftEndEffector")]
        boxes: dict[str, gym.Space] = {"agent_pos": gym.spaces.Box(-1000.0, 1000.0, (self.state_size,), np.float32)}
        if track == "pixels":
            boxes["pixels"] = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(boxes)
        self.select(task)

    @property
    def state_size(self) -> int:
        """Numbers in ``observation.state``."""
        return 39 if self.track == "state" else 4

    @property
    def agent_pos(self) -> Float32[np.ndarray, " state"]:
        """What the policy sees of the state: all 39 numbers, or the hand's position in metres and the gripper's opening."""
        state = self._full_state()[: self.state_size].astype(np.float32)
        if self._puck is None:
            state[36:] = 0.0
        return state

    @property
    def target(self) -> Float64[np.ndarray, "3"]:
        """Where the hand or the puck has to go, in one of the six tasks.

        Raises:
            RuntimeError: before the first reset, and in a stock task.
        """
        if self._start is None:
            raise RuntimeError(f"'{self.task}' has no target here; reset a scene of the six tasks first.")
        return self._start.target(self.task)

    @property
    def steps(self) -> int:
        """Steps taken since the reset."""
        return self._steps

    def observation(self) -> Observation:
        """What a policy sees now."""
        return super().observation() if self.track == "pixels" else {"agent_pos": self.agent_pos}

    def select(self, task: str) -> None:
        """Switches to another task of this scene; the episode goes on.

        Raises:
            ValueError: if the scene does not have it.
        """
        if task not in self.tasks:
            raise ValueError(f"This scene has the tasks {', '.join(self.tasks)}; '{task}' needs one of its own.")
        self.task, self.task_description = task, task_instruction(task)
        self._expert = self._new_expert()

    def _new_expert(self) -> Any:
        return super()._new_expert() if self._puck is None else EXPERTS[self.task.rsplit("-", 1)[0]]()

    def reset_physics(self, seed: int | None = None) -> None:
        """Starts the episode of the seed (a random one if None), without rendering."""
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        if seed not in self._starts:
            self._starts[seed] = self._simulate_start(seed)
        self.restore(self._starts[seed], keep_task=True)

    def _simulate_start(self, seed: int) -> Snapshot:
        if self._puck is not None:
            start = draw_start(seed, self.goals)
            self._env._freeze_rand_vec, self._env._last_rand_vec = True, np.hstack((start.puck, start.right))
            super().reset_physics(seed)
            self._start = start
            self._poses = self._read_poses(), self._read_poses()
        else:
            super().reset_physics(seed)
        return self.snapshot()

    def step_physics(self, action: Float[np.ndarray, "4"]) -> tuple[float, bool]:
        """One control step without rendering; the reward is 1 when the task is solved in the new state, else 0."""
        if self._puck is None:
            _, solved = super().step_physics(action)
            return float(solved), solved
        env = self._env
        env.set_xyz_action(action[:3])
        env.data.ctrl[:] = (action[3], -action[3])
        mujoco.mj_step(env.model, env.data, nstep=env.frame_skip)
        # Meta-World runs the whole of mj_forward here and computes a reward; positions are all that is read.
        mujoco.mj_kinematics(env.model, env.data)
        self._poses = self._poses[1], self._read_poses()
        solved = self._solved()
        self.success, self._steps = self.success or solved, self._steps + 1
        return float(solved), solved

    def _read_poses(self) -> Float64[np.ndarray, "21"]:
        """Positions of hand, claws and puck, and the puck's rotation matrix."""
        data = self._env.data
        assert self._puck is not None
        poses = np.empty(21)
        poses[:12] = data.xpos[self._bodies].ravel()
        poses[12:] = data.geom_xmat[self._puck]
        return poses

    def _full_state(self) -> Float64[np.ndarray, "39"]:
        """Meta-World's state: hand, gripper, object and its quaternion, the same one step ago, and the goal."""
        if self._start is None:
            return self._state
        state = np.zeros(39)
        for offset, poses in zip((0, 18), reversed(self._poses), strict=True):
            hand, right, left, puck = poses[:12].reshape(4, 3)
            half = state[offset : offset + 18]
            half[:3], half[3] = hand, min(max(np.linalg.norm(right - left) / 0.1, 0.0), 1.0)
            half[4:7], half[7:11] = puck, Rotation.from_matrix(poses[12:].reshape(3, 3)).as_quat()
            np.clip(half, self._low, self._high, out=half)
        state[36:] = self._start.right
        return state

    def _solved(self) -> bool:
        verb = self.task.rsplit("-", 1)[0]
        if verb == "reach":
            right, left = self._env.data.site_xpos[self._tips]
            position = (right + left) / 2.0
        else:
            position = self._poses[1][9:12]
        return bool(np.linalg.norm(position - self.target) <= RADIUS[verb])

    def expert_action(self) -> Float32[np.ndarray, "4"]:
        """The scripted expert's next action, clipped to what the environment executes; it knows the true target."""
        state = self._full_state()
        if self._puck is not None:
            state[36:] = self.target
        return np.clip(self._expert.get_action(state), -1.0, 1.0).astype(np.float32)

    def snapshot(self) -> Snapshot:
        """The episode as it stands."""
        model, data = self._env.model, self._env.data
        physics = np.empty(mujoco.mj_stateSize(model, PHYSICS))
        mujoco.mj_getState(model, data, physics, PHYSICS)
        return Snapshot(
            self.task,
            physics,
            model.body_pos.copy(),
            model.site_pos.copy(),
            {} if self._puck is not None else _copied(vars(self._env)),
            self._state.copy(),
            self._poses,
            self._start,
            self.success,
            self._steps,
        )

    def restore(self, snapshot: Snapshot, keep_task: bool = False) -> None:
        """Continues an episode of this scene where its snapshot left it; ``keep_task`` leaves the task as selected."""
        model, data = self._env.model, self._env.data
        model.body_pos[:], model.site_pos[:] = snapshot.body_pos, snapshot.site_pos
        vars(self._env).update(_copied(snapshot.fields))
        mujoco.mj_setState(model, data, snapshot.physics, PHYSICS)
        mujoco.mj_forward(model, data)
        self._state, self._poses = snapshot.state.copy(), snapshot.poses
        self._start, self.success, self._steps = snapshot.start, snapshot.success, snapshot.steps
        self.select(self.task if keep_task else snapshot.task)

    def _prepare_render(self, scene: mujoco.MjvScene) -> None:
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0  # the floor's, which costs as much as the image
        if self._start is None:
            return
        for goal in (self._start.left, self._start.right):
            mujoco.mjv_initGeom(
                scene.geoms[scene.ngeom],
                mujoco.mjtGeom.mjGEOM_SPHERE,
                np.full(3, GOAL_SIZE),
                goal,
                np.eye(3).ravel(),
                np.array(GOAL_COLOR, np.float32),
            )
            scene.ngeom += 1

    def render(self) -> Image:
        """The current view, the right way up, with both goals in green."""
        mujoco.mj_forward(self._env.model, self._env.data)
        return super().render()


def _copied(fields: dict[str, Any]) -> dict[str, Any]:
    """The plain values among an environment's fields; arrays that are windows into MuJoCo's memory stay windows."""
    plain = (bool, int, float, str, np.number, np.bool_, type(None))
    copied: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            copied[name] = value.copy() if value.flags.owndata else value
        elif isinstance(value, plain):
            copied[name] = value
    return copied
