"""LIBERO's tasks without a renderer: starts, what is observed, steps, and the shapes that the experts plan with.

Needs LIBERO (docs/libero.md). The physics are LIBERO's own, step by step, so that what is recorded here goes the same way in
LeRobot's ``LiberoEnv``; only the sensors are left out, which cost most of a step.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32
from scipy.spatial import ConvexHull  # type: ignore[import-untyped]

from benchmarks.libero.install_assets import install, use_config

type Suite = Literal["libero_object", "libero_spatial", "libero_goal"]
type Starts = Literal["official", "sampled", "wide"]

FPS = 20
STEP_METRES, STEP_RADIANS = 0.05, 0.5
"""What an action of 1 asks the controller for."""
SETTLING_STEPS = 10
"""Steps that LeRobot's environment waits after a reset until everything lies still."""
MAX_STEPS = 280
"""LeRobot's limit for the suites libero_object and libero_spatial."""
NEAR_OFFICIAL = np.array([0.06, 0.06, 0.1])
"""Metres along x, y and z that LIBERO's placements of an object are at most apart, before it falls and after."""
WAIT = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""The action that does nothing, with an open gripper."""

Action = Float[np.ndarray, "7"]
"""A step of the hand in the world's frame, its turn as a rotation vector, and the gripper, which closes at 1."""


@dataclass(frozen=True)
class Pose:
    """Position in metres, and the rotation whose columns are the axes in the world's frame."""

    position: Float[np.ndarray, "3"]
    rotation: Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class Seen:
    """What the sensors said last: the state of 8, the hand, the objects, and pictures where there are."""

    state: np.ndarray
    hand: np.ndarray
    objects: Mapping[str, Pose]
    pictures: Mapping[str, np.ndarray]


@dataclass
class Snapshot:
    """Everything that decides how an episode goes on."""

    physics: np.ndarray
    fixtures: tuple[np.ndarray, np.ndarray]
    controller: tuple[np.ndarray, np.ndarray, np.ndarray]
    gripper: np.ndarray
    steps: int
    success: bool
    slots: list[tuple[int, str, np.ndarray]]
    seen: Seen
    sensor: tuple[float, bool]


@cache
def _suite(name: str) -> Any:
    """LIBERO's description of a suite; its import talks, and asks questions where its config is missing."""
    use_config()
    install()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of robosuite's optional parts
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero import benchmark

        suite = benchmark.get_benchmark_dict()[name]()
    logging.disable(disabled)
    return suite


def num_tasks(suite: Suite) -> int:
    """How many tasks a suite has."""
    return len(_suite(suite).tasks)


def instruction(suite: Suite, task: int) -> str:
    """What a task is called."""
    return str(_suite(suite).get_task(task).language)


@cache
def official_starts(suite: Suite, task: int) -> np.ndarray:
    """The flattened physics of LIBERO's 50 official starts of a task: (starts, numbers)."""
    import torch
    from libero.libero import get_libero_path

    item = _suite(suite).get_task(task)
    file = Path(get_libero_path("init_states")) / item.problem_folder / Path(item.init_states_file).name
    return np.asarray(torch.load(file, weights_only=False))  # a pickled array, of the installed LIBERO itself


STATE_NAMES = ("x", "y", "z", "rotation_1", "rotation_2", "rotation_3", "finger_1", "finger_2")
ACTION_NAMES = ("x", "y", "z", "rotation_1", "rotation_2", "rotation_3", "gripper")
SLOT_NAMES = ("dx", "dy", "dz", "across_cos", "across_sin")


@cache
def slots(suite: Suite) -> tuple[str, ...]:
    """The objects of all tasks of a suite: what the states track reports, in this order."""
    _suite(suite)
    import libero.libero.envs.bddl_utils as bddl
    from libero.libero import get_libero_path

    found: set[str] = set()
    for task in range(num_tasks(suite)):
        item = _suite(suite).get_task(task)
        file = os.path.join(get_libero_path("bddl_files"), item.problem_folder, item.bddl_file)
        for names in bddl.robosuite_parse_problem(file)["objects"].values():
            found |= set(names)
    return tuple(sorted(found))


def narrow_side(points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "3"]:
    """The direction in the table's plane along which an object is narrowest."""
    angles = np.linspace(0, np.pi, 36, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles), np.zeros(36)])
    return directions[:, int(np.ptp(points @ directions, axis=0).argmin())]


class NoStartError(RuntimeError):
    """LIBERO's sampler did not place the objects as its official starts have them."""


class LiberoScene:
    """One task's scene, without a renderer. Building it takes some seconds.

    What is observed is what LIBERO's sensors say, read when robosuite reads them; ``film`` adds pictures. ``reset`` starts an
    episode, and a snapshot lets one scene serve many episodes that advance in turns.
    """

    def __init__(self, suite: Suite, task: int) -> None:
        _suite(suite)
        from libero.libero import get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv

        self.suite, self.task = suite, task
        item = _suite(suite).get_task(task)
        self.wrapper: Any = ControlEnv(
            bddl_file_name=os.path.join(get_libero_path("bddl_files"), item.problem_folder, item.bddl_file),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            hard_reset=False,
            ignore_done=True,
            control_freq=FPS,
        )
        self.env: Any = self.wrapper.env
        self.robot: Any = self.env.robots[0]
        self.film: Callable[[], Mapping[str, np.ndarray]] | None = None
        self._watch()
        self._joint_ranges = self.model.jnt_range.copy()
        self.steps, self.success = 0, False

    def _watch(self) -> None:
        """One sensor in the place of dozens; robosuite reads it when it would read those, shortly before a step ends."""
        from robosuite.utils.observables import Observable, sensor

        @sensor(modality="state")
        def read(_: object) -> np.ndarray:
            objects = {name: self.pose(name) for name in self.objects}
            pictures = self.film() if self.film is not None else {}
            self._seen = Seen(self._proprioception(), self.hand.position, objects, pictures)
            return np.zeros(2)

        self.env._observables.clear()
        self.env._observables["seen"] = self._sensor = Observable("seen", read, sampling_rate=FPS)

    # ---- the simulator -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """MuJoCo's model of the scene."""
        return self.env.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's state of it."""
        return self.env.sim.data._data

    def reset(self, start: int, starts: Starts = "official") -> None:
        """Begin an episode, as LeRobot's environment with that seed does.

        Args:
            start: number of the start; the seed of everything that is drawn.
            starts: ``official``: LIBERO's own 50 starts of the task, which its leaderboards evaluate on; only where fixtures
                stand is drawn, which these starts leave open. ``sampled``: drawn as LIBERO drew those, so that demonstrations
                need not begin where policies are evaluated. ``wide``: drawn so, then every object that stands on the table is
                moved by up to 8 cm along x and y and turned, where it fits (:mod:`benchmarks.libero.starts`).
        """
        self.model.jnt_range[:] = self._joint_ranges  # of fingers that an operator has jammed
        self.robot.gripper.current_action = np.zeros(2)  # else it stays as the last episode ended
        film, self.film = self.film, None
        given = official_starts(self.suite, self.task)
        for attempt in range(20):
            self.wrapper.seed(start + 1_000_003 * attempt)
            self.wrapper.reset()
            if starts == "official":
                self.wrapper.set_init_state(given[start % len(given)])
                break
            for _ in range(SETTLING_STEPS):  # LIBERO drops objects from some height, now and then into one another
                self._advance(WAIT)
            if self._lies_as_in(given[0]):
                break
        else:
            raise NoStartError(
                f"LIBERO's sampler found no start {start} for task {self.task} of {self.suite} in 20 tries."
            )
        if starts == "wide":
            from benchmarks.libero.starts import spread

            spread(self, np.random.default_rng([start, self.task]))
        for left in range(SETTLING_STEPS, 0, -1):
            self.film = film if left == 1 else None
            self._advance(WAIT)
        self.steps, self.success = 0, False
        self._slots = self._observed_slots()

    def _lies_as_in(self, start: np.ndarray) -> bool:
        """Whether every object is near where it is in an official start: nothing fell, nothing was pushed away."""
        for name in self.objects:
            address = self.model.joint(self.env.objects_dict[name].joints[-1]).qposadr[0]
            there = start[1 + address : 4 + address]  # after the time; from there it is still to fall
            if (np.abs(self.data.qpos[address : address + 3] - there) > NEAR_OFFICIAL).any():
                return False
        return True

    def step(self, action: Action) -> None:
        """Carry out an action, each entry cut to [-1, 1]."""
        self._advance(np.clip(np.asarray(action, dtype=float), -1.0, 1.0))
        self.steps += 1
        self.success = self.success or bool(self.env._check_success())

    def _advance(self, action: Action) -> None:
        """robosuite's step, bit for bit, without its second and third computation of the same forward dynamics."""
        import mujoco

        simulator = self.env.sim
        simulator.forward = lambda: None  # the controller asks for it, and `mj_step1` has done that part already
        try:
            for part in range(round(self.env.control_timestep / self.env.model_timestep)):
                mujoco.mj_step1(self.model, self.data)
                self.env._pre_action(action, part == 0)
                mujoco.mj_step2(self.model, self.data)
                self.env._update_observables()
        finally:
            del simulator.forward
        self.env._post_process()

    # ---- what is observed --------------------------------------------------------------------------------------------

    @property
    def hand(self) -> Pose:
        """The point between the finger pads."""
        site = self.robot.eef_site_id
        return Pose(self.data.site_xpos[site].copy(), self.data.site_xmat[site].reshape(3, 3).copy())

    @property
    def fingers(self) -> Float[np.ndarray, "2"]:
        """How far each finger is from the middle in metres, the second one negative."""
        return self.data.qpos[self.robot._ref_gripper_joint_pos_indexes].copy()

    @property
    def finger_joints(self) -> tuple[int, int]:
        """MuJoCo's numbers of their joints."""
        left, right = (self.model.joint(name).id for name in self.robot.gripper.joints)
        return left, right

    @property
    def opening(self) -> float:
        """Distance of the fingers from each other in metres."""
        left, right = self.fingers
        return float(left - right)

    def state(self) -> Float32[np.ndarray, "8"]:
        """The 8 numbers of the public datasets: the hand's position and rotation vector, and the two fingers."""
        return self._seen.state

    def pictures(self) -> Mapping[str, np.ndarray]:
        """What ``film`` showed; empty without it."""
        return self._seen.pictures

    def object_state(self) -> Float32[np.ndarray, "numbers"]:
        """Of every object of the suite: its offset from the hand, and the direction of its narrow side; zeros if it is not here.

        The direction is the cosine and sine of twice its angle seen from above, since half a turn changes nothing.
        """
        found = np.zeros((len(slots(self.suite)), len(SLOT_NAMES)), np.float32)
        for place, name, narrow in self._slots:
            pose = self._seen.objects[name]
            x, y, _ = pose.rotation @ narrow
            angle = 2 * np.arctan2(y, x)
            found[place] = [*(pose.position - self._seen.hand), np.cos(angle), np.sin(angle)]
        return found.ravel()

    def _proprioception(self) -> Float32[np.ndarray, "8"]:
        x, y, z, w = self.data.xquat[self.model.body(self.robot.robot_model.eef_name).id][[1, 2, 3, 0]]
        sine = np.sqrt(max(1.0 - w * w, 0.0))
        turn = np.array([x, y, z]) / sine * 2.0 * np.arccos(np.clip(w, -1.0, 1.0)) if sine > 1e-10 else np.zeros(3)
        return np.concatenate([self.hand.position, turn, self.fingers]).astype(np.float32)

    def _observed_slots(self) -> list[tuple[int, str, np.ndarray]]:
        """Where each object is reported, by name, with its narrow side in its own frame.

        Objects of a kind share their slots in the order of y at the start, so that only the instruction tells which one is meant.
        """
        names = slots(self.suite)
        found = []
        for kind in dict.fromkeys(name.rsplit("_", 1)[0] for name in self.objects):
            alike = sorted(
                (name for name in self.objects if name.rsplit("_", 1)[0] == kind),
                key=lambda name: self.pose(name).position[1],
            )
            places = [place for place, name in enumerate(names) if name.rsplit("_", 1)[0] == kind]
            for place, name in zip(places, alike, strict=False):
                found.append((place, name, self.pose(name).rotation.T @ narrow_side(self.points(name))))
        return found

    def snapshot(self) -> Snapshot:
        """The episode as it stands."""
        controller = self.robot.controller
        return Snapshot(
            self._physics(),
            (self.model.body_pos.copy(), self.model.body_quat.copy()),
            (controller.goal_pos.copy(), controller.goal_ori.copy(), controller.initial_joint.copy()),
            self.robot.gripper.current_action.copy(),
            self.steps,
            self.success,
            list(self._slots),
            self._seen,
            (self._sensor._time_since_last_sample, self._sensor._sampled),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on with an episode."""
        import mujoco

        self.model.body_pos[:], self.model.body_quat[:] = snapshot.fixtures
        mujoco.mj_setState(self.model, self.data, snapshot.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        controller = self.robot.controller
        controller.goal_pos, controller.goal_ori, controller.initial_joint = (x.copy() for x in snapshot.controller)
        controller.update(force=True)
        mujoco.mj_setState(self.model, self.data, snapshot.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self.robot.gripper.current_action = snapshot.gripper.copy()
        self.steps, self.success, self._slots = snapshot.steps, snapshot.success, list(snapshot.slots)
        self._seen = snapshot.seen
        self._sensor._time_since_last_sample, self._sensor._sampled = snapshot.sensor

    def _physics(self) -> np.ndarray:
        import mujoco

        values = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, values, mujoco.mjtState.mjSTATE_INTEGRATION)
        return values

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of what can be moved, in LIBERO's order."""
        return tuple(self.env.objects_dict)

    @property
    def fixtures(self) -> tuple[str, ...]:
        """Names of what stands fast and can be touched."""
        return tuple(name for name in self.env.fixtures_dict if self._parts.get(self.body(name)))

    @property
    def goal(self) -> list[list[str]]:
        """LIBERO's goal: predicates with their arguments."""
        return [list(part) for part in self.env.parsed_problem["goal_state"]]

    def body(self, name: str) -> int:
        """MuJoCo's number of an object's or fixture's body."""
        return int(self.env.obj_body_id[name])

    def pose(self, name: str) -> Pose:
        """Of an object or fixture."""
        body = self.body(name)
        return Pose(self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy())

    def site(self, name: str) -> Float[np.ndarray, "3"]:
        """Where a region of LIBERO's has its middle."""
        return self.env.sim.data.get_site_xpos(name).copy()

    def parent_of(self, site: str) -> str | None:
        """What a region belongs to; None for a region of the table."""
        return self.env.object_states_dict[site].parent_name

    # ---- shapes ------------------------------------------------------------------------------------------------------

    @cached_property
    def _parts(self) -> dict[int, list[int]]:
        """Body -> the geometries that collide, of it and of the bodies below it."""
        found: dict[int, list[int]] = {}
        for geom in range(self.model.ngeom):
            if self.model.geom_contype[geom] or self.model.geom_conaffinity[geom]:
                body = int(self.model.geom_bodyid[geom])
                while body:
                    found.setdefault(body, []).append(geom)
                    body = int(self.model.body_parentid[body])
        return found

    def _corners(self, geom: int) -> np.ndarray:
        """Points on a geometry's surface in its own frame: of a mesh its vertices, else of the box or cylinder around it."""
        import mujoco

        kind, size = self.model.geom_type[geom], self.model.geom_size[geom]
        if kind == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = self.model.geom_dataid[geom]
            first, count = self.model.mesh_vertadr[mesh], self.model.mesh_vertnum[mesh]
            points = self.model.mesh_vert[first : first + count]
            return points[ConvexHull(points).vertices] if count > 50 else points
        if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
            angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
            ring = size[0] * np.stack([np.cos(angles), np.sin(angles)], 1)
            return np.concatenate([np.column_stack([ring, np.full(16, z)]) for z in (-size[1], size[1])])
        half = np.full(3, size[0]) if kind == mujoco.mjtGeom.mjGEOM_SPHERE else size
        return np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(-1, 3) * half

    @cached_property
    def _local_points(self) -> dict[int, np.ndarray]:
        return {geom: self._corners(geom) for geoms in self._parts.values() for geom in geoms}

    def points(self, name: str) -> Float[np.ndarray, "points 3"]:
        """Points on the surface of an object or fixture, in the world's frame."""
        return np.concatenate([self.geom_points(geom) for geom in self._parts.get(self.body(name), [])])

    def geom_points(self, geom: int) -> Float[np.ndarray, "points 3"]:
        """Points on the surface of a geometry, in the world's frame."""
        local = self._local_points[geom]
        return local @ self.data.geom_xmat[geom].reshape(3, 3).T + self.data.geom_xpos[geom]

    @cached_property
    def _local_filling(self) -> dict[int, np.ndarray]:
        """Random points inside every geometry, which is convex, most of them near its surface."""
        rng = np.random.default_rng(0)
        return {
            geom: rng.dirichlet(np.full(len(points), 0.15), 60) @ points for geom, points in self._local_points.items()
        }

    def filling(self, names: Sequence[str]) -> Float[np.ndarray, "points 3"]:
        """Points inside objects and fixtures, in the world's frame."""
        geoms = [geom for name in names for geom in self._parts.get(self.body(name), [])]
        placed = [
            self._local_filling[geom] @ self.data.geom_xmat[geom].reshape(3, 3).T + self.data.geom_xpos[geom]
            for geom in geoms
        ]
        return np.concatenate([np.zeros((0, 3)), *placed])

    @cached_property
    def gripper_boxes(self) -> tuple[np.ndarray, ...]:
        """The hand and its two fingers, open, as boxes in the hand's frame: lower and upper corner of each, (2, 3)."""
        pose = self.hand
        geoms = self.robot.gripper.contact_geoms
        parts: dict[str, list[np.ndarray]] = {"finger1": [], "finger2": [], "hand": []}
        for name in geoms:
            points = (self.geom_points(self.env.sim.model.geom_name2id(name)) - pose.position) @ pose.rotation
            parts[next(part for part in parts if part in name)].append(points)
        return tuple(np.stack([(p := np.concatenate(part)).min(0), p.max(0)]) for part in parts.values())
