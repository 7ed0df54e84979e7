"""Five arms that lift a cube in robosuite: their scenes, what each observes and writes down, and the scripted experts.

Every arm records its own schema. The joints differ in number, and the same motion is written in another convention: deltas in
the world's frame, in the tool's, in a base frame that is turned, absolute positions, or deltas of the whole pose. A recorded
action is carried out by turning it back into robosuite's, so a policy that predicts an arm's own actions can be evaluated.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

FPS = 20
MAX_STEPS = 100
STEP_METRES, STEP_RADIANS = 0.05, 0.5
"""What an action of 1 asks robosuite's controller for."""
TASK = "lift the cube"

Vector = Float[np.ndarray, "3"]
Action = Float[np.ndarray, "7"]
"""robosuite's own: a step of the end effector in the world's frame, its turn as a rotation vector, and the gripper, each in
[-1, 1]; the gripper closes at 1."""
type Quality = Literal["clean", "misses", "hovers", "mirrored"]
EXPERT: Quality = "clean"
MISSES: Quality = "misses"
HOVERS: Quality = "hovers"
MIRRORED: Quality = "mirrored"
SLOPPY = (MISSES, HOVERS, MIRRORED)


@dataclass(frozen=True)
class EndEffector:
    """Position in metres, and the rotation whose columns are the tool's axes in the world's frame."""

    position: Float[np.ndarray, "3"]
    rotation: Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class Convention:
    """How an arm writes its actions down.

    Args:
        description: one line for a table.
        channels: names of the entries of a recorded action.
        encode: robosuite's action at a pose -> what is recorded.
        decode: what was recorded, at a pose -> robosuite's action, each entry in [-1, 1].
    """

    description: str
    channels: tuple[str, ...]
    encode: Callable[[Action, EndEffector], np.ndarray]
    decode: Callable[[np.ndarray, EndEffector], Action]


def _axes(name: str) -> tuple[str, ...]:
    return tuple(f"right_ee_{name}{axis}" for axis in "xyz")


def _robosuite(step: np.ndarray, gripper: float, turn: np.ndarray | None = None) -> Action:
    return np.clip(np.concatenate([step, np.zeros(3) if turn is None else turn, [gripper]]), -1.0, 1.0)


def linear(description: str, matrix: np.ndarray, gripper: float = 1.0) -> Convention:
    """Deltas of the position, multiplied by a fixed matrix; ``gripper`` is what closing is written as."""
    inverse = np.linalg.inv(matrix)
    return Convention(
        description,
        (*_axes("delta_"), "right_gripper"),
        lambda action, _: np.append(matrix @ action[:3], gripper * action[6]),
        lambda recorded, _: _robosuite(inverse @ recorded[:3], recorded[3] / gripper),
    )


WORLD = linear("deltas of the position in the world's frame, gripper closes at 1", np.eye(3))
TURNED = linear(
    "deltas of the position in centimetres, in a base frame turned by 90°, gripper closes at -1",
    100 * STEP_METRES * np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    gripper=-1.0,
)
TOOL = Convention(
    "deltas of the position in the tool's frame, gripper closes at 1",
    (*_axes("delta_"), "right_gripper"),
    lambda action, pose: np.append(pose.rotation.T @ action[:3], action[6]),
    lambda recorded, pose: _robosuite(pose.rotation @ recorded[:3], recorded[3]),
)
ABSOLUTE = Convention(
    "positions to go to in metres, gripper opening wanted from 0 to 1",
    (*_axes(""), "right_gripper"),
    lambda action, pose: np.append(pose.position + STEP_METRES * action[:3], 0.5 - 0.5 * action[6]),
    lambda recorded, pose: _robosuite((recorded[:3] - pose.position) / STEP_METRES, 1.0 - 2.0 * recorded[3]),
)
POSE = Convention(
    "deltas of the position in metres and of roll and pitch in radians, in the world's frame, gripper closes at 1",
    (*_axes("delta_"), "right_ee_delta_rotation_1", "right_ee_delta_rotation_2", "right_gripper"),
    lambda action, _: np.concatenate([STEP_METRES * action[:3], STEP_RADIANS * action[3:5], action[6:]]),
    lambda recorded, _: _robosuite(
        recorded[:3] / STEP_METRES, recorded[5], np.append(recorded[3:5] / STEP_RADIANS, 0.0)
    ),
)


@dataclass(frozen=True)
class Arm:
    """An arm by its name in robosuite, with the number of its joints and how it records."""

    name: str
    joints: int
    convention: Convention

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the entries of a recorded action."""
        return self.convention.channels

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the entries of `observation.state`."""
        return (
            *(f"right_arm_joint_{number + 1}" for number in range(self.joints)),
            *_axes(""),
            *(f"right_ee_quaternion_{axis}" for axis in "xyzw"),
            "right_gripper",
            *(f"environment_{number}" for number in range(1, 7)),  # the cube's position, then its offset from the hand
        )

    @property
    def layout(self) -> dict[str, list[str]]:
        """The slots of the unified action space that action and state fill."""
        return {"action": list(self.action_names), "state": list(self.state_names)}


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("Panda", 7, WORLD),
        Arm("Sawyer", 7, TOOL),
        Arm("UR5e", 6, ABSOLUTE),
        Arm("IIWA", 7, TURNED),
        Arm("Kinova3", 7, POSE),
    )
}


@dataclass
class Snapshot:
    """Everything that decides how an episode goes on."""

    physics: np.ndarray
    gripper: np.ndarray
    rest: np.ndarray
    steps: int
    success: bool


class ArmScene:
    """The table, the cube and one arm, without a renderer. Needs robosuite.

    Building one takes about a second; ``reset`` starts an episode from a seed, and a snapshot lets one scene serve many
    episodes that advance in turns.
    """

    def __init__(self, arm: Arm) -> None:
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # of robosuite's optional parts
        import robosuite
        from robosuite.controllers import load_composite_controller_config

        self.arm = arm
        controller = load_composite_controller_config(controller="BASIC", robot=arm.name)
        controller["body_parts"] = {"right": controller["body_parts"]["right"] | {"input_ref_frame": "world"}}
        self.env: Any = robosuite.make(
            "Lift",
            robots=arm.name,
            controller_configs=controller,
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=False,
            control_freq=FPS,
            ignore_done=True,
            hard_reset=False,
            seed=0,
        )
        logging.disable(disabled)
        self.env._observables.clear()  # the state is read from the simulator; sensors would cost a fifth of a step
        self.robot = self.env.robots[0]
        self.gripper = self.robot.gripper["right"]
        self.steps, self.success = 0, False

    @property
    def controller(self) -> Any:
        """Of the arm; robosuite makes a new one at every reset."""
        return self.robot.part_controllers["right"]

    @property
    def model(self) -> Any:
        """MuJoCo's model of the scene."""
        return self.env.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's state of it."""
        return self.env.sim.data._data

    def reset(self, seed: int) -> None:
        """Start an episode: the seed decides where the cube lies and how the arm stands."""
        rng = np.random.default_rng(seed)
        self.env.rng = self.env.placement_initializer.rng = rng
        self.env.reset()
        self._place(self._physics())
        self.steps, self.success = 0, False

    @property
    def end_effector(self) -> EndEffector:
        """Its pose now."""
        data = self.env.sim.data
        site = self.robot.eef_site_id["right"]
        return EndEffector(data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy())

    @property
    def cube(self) -> Vector:
        """Its position in metres."""
        return self.env.sim.data.body_xpos[self.env.cube_body_id].copy()

    @cached_property
    def _pads(self) -> tuple[list[int], list[int]]:
        model = self.env.sim.model
        left, right = (self.gripper.important_geoms[f"{side}_fingerpad"] for side in ("left", "right"))
        return [model.geom_name2id(name) for name in left], [model.geom_name2id(name) for name in right]

    @property
    def opening(self) -> float:
        """Distance of the finger pads in metres."""
        where = self.env.sim.data.geom_xpos
        left, right = (where[pads].mean(0) for pads in self._pads)
        return float(np.linalg.norm(left - right))

    def state(self) -> np.ndarray:
        """What the arm observes, in the order of its ``state_names``, float32."""
        pose, cube = self.end_effector, self.cube
        joints = self.env.sim.data.qpos[self.robot._ref_joint_pos_indexes]
        return np.concatenate(
            [joints, pose.position, quaternion(pose.rotation), [self.opening], cube, cube - pose.position]
        ).astype(np.float32)

    def step(self, action: Action) -> None:
        """Carry out an action of robosuite's."""
        self.env.step(np.asarray(action, dtype=float))
        self.steps += 1
        self.success = self.success or bool(self.env._check_success())
        self._place(self._physics())

    def step_recorded(self, recorded: np.ndarray) -> None:
        """Carry out an action in the arm's own convention."""
        self.step(self.arm.convention.decode(np.asarray(recorded, dtype=float), self.end_effector))

    def snapshot(self) -> Snapshot:
        """The episode as it stands."""
        gripper, rest = self.gripper.current_action.copy(), self.controller.initial_joint.copy()
        return Snapshot(self._physics(), gripper, rest, self.steps, self.success)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on with an episode."""
        self.gripper.current_action = snapshot.gripper.copy()
        self.controller.initial_joint = snapshot.rest.copy()
        self._place(snapshot.physics)
        self.steps, self.success = snapshot.steps, snapshot.success

    def _physics(self) -> np.ndarray:
        import mujoco

        values = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, values, mujoco.mjtState.mjSTATE_INTEGRATION)
        return values

    def _place(self, physics: np.ndarray) -> None:
        """Put everything where the joints say; robosuite leaves positions behind by one step of the physics."""
        import mujoco

        mujoco.mj_setState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self.controller.update(force=True)  # calls mj_forward
        # which moves the solver's start too
        mujoco.mj_setState(self.model, self.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)


def quaternion(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "4"]:
    """The rotation as x, y, z, w, of the two signs the one whose largest entry is positive."""
    from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

    found = Rotation.from_matrix(rotation).as_quat()
    return found * np.sign(found[np.abs(found).argmax()])


class Operator:
    """Lifts the cube, or fails to in one of three ways; drives robosuite's action from the scene.

    An operator of bad quality wavers and pauses, and

    * ``misses``: closes the gripper beside the cube and lifts nothing,
    * ``hovers``: closes it above the cube and lifts nothing,
    * ``mirrored``: lifts the cube, but the steps along x and y are written down with the wrong sign.

    Args:
        seed: of everything the operator draws.
        quality: ``clean`` or one of the above.
        turns: also turns the tool upright, for a convention that can say so.
    """

    GAIN = 24.0  # of the action, on the distance in metres
    CLOSING_STEPS = 6

    def __init__(self, seed: Sequence[int], quality: Quality = EXPERT, turns: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.quality, self.turns = quality, turns
        self.aim = np.zeros(3)
        if quality == MISSES:
            angle = self.rng.uniform(0, 2 * np.pi)
            self.aim[:2] = self.rng.uniform(0.04, 0.06) * np.array([np.cos(angle), np.sin(angle)])
        if quality == HOVERS:
            self.aim[2] = self.rng.uniform(0.045, 0.06)
        self.closing, self.waiting = 0, 0
        self.drift: Vector = np.zeros(3)
        self.start: Vector | None = None

    def __call__(self, scene: ArmScene) -> Action:
        """The next action."""
        pose = scene.end_effector
        if self.start is None:
            self.start = scene.cube
        target = (self.start if self.closing else scene.cube) + self.aim
        away = target - pose.position
        gripper = -1.0
        if self.closing >= self.CLOSING_STEPS:
            away, gripper = np.array([0.0, 0.0, 0.1]), 1.0
        elif self.closing or np.linalg.norm(away) < 0.012:
            self.closing += 1
            gripper = 1.0
        elif np.linalg.norm(away[:2]) > 0.025:
            away[2] += 0.07  # come from above
        step = away * self.GAIN
        turn = self._upright(pose) if self.turns else None
        return _robosuite(self._careless(step) if self.quality != EXPERT else step, gripper, turn)

    @staticmethod
    def _upright(pose: EndEffector) -> Vector:
        """A part of the turn that makes the tool point down; all of it at once would shake the hand."""
        return 0.3 * np.cross(pose.rotation[:, 2], [0.0, 0.0, -1.0]) / STEP_RADIANS

    def _careless(self, step: Vector) -> Vector:
        """Noise in proportion to the speed, which forgets itself over some steps, and pauses."""
        self.drift = 0.8 * self.drift + 0.6 * self.rng.normal(0.0, 0.5, 3)
        if self.waiting == 0 and self.rng.random() < 0.04:
            self.waiting = int(self.rng.integers(3, 8))
        if self.waiting:
            self.waiting -= 1
            return np.zeros(3)
        return step + self.drift * np.abs(step)

    def written(self, action: Action) -> Action:
        """What the operator writes down for an action that was carried out."""
        return action * np.array([-1, -1, 1, 1, 1, 1, 1]) if self.quality == MIRRORED else action


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode.

    Attributes:
        states: (steps, state) float32, before each action.
        actions: (steps, action) float32, in the arm's convention.
        quality: of the operator.
        seed: of the start.
        success_step: the step after which the cube was lifted; None if it never was.
        pictures: (steps, size, size, 3) uint8, before each action; None without a camera.
    """

    states: np.ndarray
    actions: np.ndarray
    quality: Quality
    seed: int
    success_step: int | None
    pictures: np.ndarray | None = None


def record(
    scene: ArmScene,
    seed: int,
    quality: Quality = EXPERT,
    after: int = 10,
    camera: Callable[[], np.ndarray] | None = None,
) -> Demonstration:
    """Let an operator try once, and go on for ``after`` steps past the end of the lift, so that chunks have a future.

    The same seed and quality give the same episode, with a camera or without.
    """
    scene.reset(seed)
    draws = [seed, (EXPERT, *SLOPPY).index(quality)]
    operator = Operator(draws, quality, turns=scene.arm.convention is POSE)
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    pictures: list[np.ndarray] = []
    success_step, left = None, after
    while scene.steps < MAX_STEPS and left:
        action = operator(scene)
        states.append(scene.state())
        if camera is not None:
            pictures.append(camera())
        actions.append(scene.arm.convention.encode(operator.written(action), scene.end_effector).astype(np.float32))
        scene.step(action)
        if scene.success and success_step is None:
            success_step = scene.steps
        # who lifts nothing stops when the hand is as high as the cube would have been
        gave_up = operator.closing >= operator.CLOSING_STEPS and scene.end_effector.position[2] > scene.cube[2] + 0.1
        if success_step is not None or gave_up:
            left -= 1
    seen = np.stack(pictures) if camera is not None else None
    return Demonstration(np.stack(states), np.stack(actions), quality, seed, success_step, seen)
