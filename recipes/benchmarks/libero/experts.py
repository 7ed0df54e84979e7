"""Scripted experts for LIBERO: they read object poses from the simulator, plan a grasp that fits, and carry it out.

The hand comes from above, its fingers along the narrow side of a box or a can and across the rim of a bowl, where neither hand
nor fingers meet anything else; it closes, lifts, moves above the goal, lowers and opens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

from benchmarks.libero.scene import STEP_METRES, STEP_RADIANS, Action, LiberoScene, Pose

type Kind = Literal["clean", "hesitation", "recovery", "failed_attempt", "wrong_convention"]
KINDS: tuple[Kind, ...] = get_args(Kind.__value__)
"""How an operator does the task (:class:`Operator`)."""
type Script = Iterator[Action]
"""Actions one after the other, each decided by what the scene shows when it is asked for."""

OPEN, CLOSE = -1.0, 1.0
GAIN, TURN_GAIN = 1.4, 0.7
"""Of an action on the way that is left."""
GRASP_DEPTH = 0.028
"""How far the point between the fingers goes below an object's top; the palm is 31 mm above it."""
RIM_DEPTH = 0.020
FINGER_TIP = 0.0092
"""How far the fingers reach below the point between them."""
MARGIN = 0.02
"""Left above what the hand or an object in it passes over."""
CLEAR = 0.0015
"""Metres; a grasp with less free space is taken only where none has more, since the hand gets stuck on what is near."""
GRASPABLE = 0.072
"""Wider objects are taken by the rim; the fingers open 80 mm."""


@dataclass(frozen=True)
class Grasp:
    """Where the hand goes to close.

    Args:
        pose: of the hand.
        free: metres between the open hand and what it must not touch, at most 0.02; negative where it would.
    """

    pose: Pose
    free: float


def downward(angle: float) -> Float[np.ndarray, "3 3"]:
    """The hand pointing down, its fingers opening along the direction at this angle in the table's plane."""
    x = np.array([np.cos(angle), np.sin(angle), 0.0])
    z = np.array([0.0, 0.0, -1.0])
    return np.column_stack([x, np.cross(z, x), z])


def plan_grasp(scene: LiberoScene, name: str) -> Grasp:
    """The best grasp of an object: free of everything else, with the least turning of the wrist."""
    points = scene.points(name)
    now = scene.hand
    facing = float(np.arctan2(now.rotation[1, 0], now.rotation[0, 0]))
    angles = np.linspace(0, np.pi, 36, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    along = points[:, :2] @ directions
    widths = np.ptp(along, axis=0)
    lowest, top = points[:, 2].min(), points[:, 2].max()
    middle = _middle(points)
    candidates: list[tuple[float, np.ndarray, float]] = []  # angle, place, how much worse than the usual one
    if widths.min() < GRASPABLE:
        height = max(min(top - GRASP_DEPTH, (lowest + top) / 2), lowest + FINGER_TIP + 0.002)
        for number in np.flatnonzero(widths < min(GRASPABLE, widths.min() + 0.02)):
            across = np.array([-directions[1, number], directions[0, number]])
            for shift in (0.0, 0.015, -0.015) if np.ptp(points[:, :2] @ across) > 0.06 else (0.0,):
                worse = 30 * (widths[number] - widths.min()) + 10 * abs(shift)
                candidates.append((float(angles[number]), np.append(middle + shift * across, height), worse))
    else:
        radius = widths.mean() / 2 - 0.004
        for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
            rim = middle + radius * np.array([np.cos(angle), np.sin(angle)])
            candidates.append((float(angle), np.append(rim, top - RIM_DEPTH), 0.0))
    others = scene.filling([item for item in (*scene.objects, *scene.fixtures) if item != name])
    found = []
    for angle, position, worse in candidates:
        # a gripper turned by half a turn is the same gripper
        turned = (angle - facing + np.pi / 2) % np.pi - np.pi / 2
        pose = Pose(position, downward(facing + turned))
        free = clearance(scene, pose, others)
        found.append((free > CLEAR, min(free, 0.012) * 100 - 0.5 * abs(turned) - worse, Grasp(pose, free)))
    return max(found, key=lambda item: item[:2])[2]


def clearance(scene: LiberoScene, pose: Pose, points: Float[np.ndarray, "points 3"], most: float = 0.02) -> float:
    """Metres from the open hand at a pose to the nearest of some points, at most ``most``; negative inside the hand."""
    local = (points - pose.position) @ pose.rotation
    nearest = most
    for lower, upper in scene.gripper_boxes:
        outside = np.maximum(lower - local, local - upper).max(1)
        nearest = min(nearest, float(outside.min(initial=most)))
    return nearest


def _middle(points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "2"]:
    """The middle of the smallest rectangle around an object, seen from above."""
    best = (np.inf, np.zeros(2))
    for angle in np.linspace(0, np.pi / 2, 45, endpoint=False):
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        along = points[:, :2] @ axes.T
        low, high = along.min(0), along.max(0)
        best = min(best, (float(np.prod(high - low)), (low + high) / 2 @ axes), key=lambda item: item[0])
    return best[1]


class Operator:
    """Picks an object up and puts it where the task's goal says; iterate over ``script()`` for its actions.

    Not every operator does it straight on:

    * ``hesitation``: pauses and wanders off on the way, then succeeds,
    * ``recovery``: the first grasp closes on nothing and is lifted; then the operator goes back and succeeds,
    * ``failed_attempt``: while closing, lifting or carrying the fingers jam 3 mm too wide, the object slips out, and the arm
      goes on as if nothing had happened; actions and proprioception look right, only the object's pose or a picture shows it,
    * ``wrong_convention``: succeeds, but writes x and y down with the wrong sign, as from the other side of the table.

    Args:
        scene: at the start of an episode.
        seed: of everything the operator draws.
        kind: ``clean`` or one of the above.

    Attributes:
        let_go_at: the step at which the hand opens at the goal, with the object in it or without; None before.
    """

    def __init__(self, scene: LiberoScene, seed: int, kind: Kind = "clean") -> None:
        self.scene, self.kind = scene, kind
        self.rng = np.random.default_rng([seed, scene.task, KINDS.index(kind)])
        self.slips_at = str(self.rng.choice(["closing", "lifting", "carrying"])) if kind == "failed_attempt" else None
        self.let_go_at: int | None = None

    def written(self, action: Action) -> Action:
        """What the operator writes down for an action that was carried out."""
        return action * np.array([-1, -1, 1, -1, -1, 1, 1]) if self.kind == "wrong_convention" else action

    def script(self) -> Script:
        """The whole task, goal by goal."""
        for predicate, *arguments in self.scene.goal:
            if predicate not in ("in", "on"):
                raise ValueError(f"There is no expert for the goal '{predicate} {' '.join(arguments)}'.")
            if self.kind == "recovery":
                yield from self.miss(arguments[0])
            yield from self.pick(arguments[0])
            yield from self.place(arguments[0], arguments[1])

    # ---- parts of a task ---------------------------------------------------------------------------------------------

    def pick(self, name: str) -> Script:
        """Come from above and close the fingers around an object."""
        yield from self._close_at(plan_grasp(self.scene, name).pose)
        if self.slips_at == "closing":
            self._jam()

    def miss(self, name: str) -> Script:
        """Close the fingers beside an object or above it, lift nothing, and open them again."""
        scene = self.scene
        grasp = plan_grasp(scene, name).pose
        points = scene.filling([*scene.objects, *scene.fixtures])
        beside = [np.append(self.rng.uniform(0.03, 0.05) * way, 0.0) for way in self.rng.normal(size=(12, 2))]
        beside = [
            offset for offset in beside if clearance(scene, Pose(grasp.position + offset, grasp.rotation), points) > 0
        ]
        above = np.array([*self.rng.uniform(-0.01, 0.01, 2), self.rng.uniform(0.045, 0.06)])
        pose = Pose(grasp.position + (beside[0] if beside else above), grasp.rotation)
        yield from self._close_at(pose)
        lifted = Pose(pose.position + np.array([0.0, 0.0, self.rng.uniform(0.06, 0.1)]), pose.rotation)
        yield from self._go(lifted, CLOSE, 0.015, 0.2)
        yield from self._hold(lifted, OPEN, int(self.rng.integers(4, 9)))

    def _close_at(self, pose: Pose) -> Script:
        scene = self.scene
        everything = scene.filling([*scene.objects, *scene.fixtures])
        above = pose.position.copy()
        above[2] += 0.07
        safe = self._over(everything, scene.hand.position, above, 0.11) + FINGER_TIP + MARGIN
        above[2] = max(above[2], min(safe, scene.hand.position[2]))
        yield from self._hesitate(OPEN)
        yield from self._go(Pose(above, pose.rotation), OPEN, 0.02, 0.12)
        yield from self._hesitate(OPEN)
        yield from self._go(pose, OPEN, 0.005, 0.05)
        yield from self._close(pose)

    def place(self, name: str, goal: str) -> Script:
        """Carry the object in the hand to the goal and let go of it there."""
        scene = self.scene
        rotation = downward(float(np.arctan2(scene.hand.rotation[1, 0], scene.hand.rotation[0, 0])))
        target, release = self._target(goal)
        points = scene.points(name)
        below = scene.hand.position[2] - points[:, 2].min()
        offset = _middle(points) - scene.hand.position[:2]
        others = scene.filling([item for item in (*scene.objects, *scene.fixtures) if item != name])
        lifted = scene.hand.position.copy()
        travel = self._over(others, lifted, np.append(target - offset, 0.0), 0.09) + below + MARGIN
        lifted[2] = travel = max(travel, release + below + 0.04, lifted[2])
        yield from self._go(Pose(lifted, rotation), CLOSE, 0.02, 0.2, slips="lifting")
        yield from self._hesitate(CLOSE)
        if self.kind != "failed_attempt":  # what hangs in the hand may have turned
            points = scene.points(name)
            offset = _middle(points) - scene.hand.position[:2]
            slipped = scene.hand.position[2] - points[:, 2].min() - below
            if slipped > MARGIN / 2:  # else it pushes the goal away
                travel += slipped
        to = np.append(target - offset, travel)
        yield from self._go(Pose(to, rotation), CLOSE, 0.008, 0.2, slips="carrying")
        to[2] = release + below
        yield from self._go(Pose(to, rotation), CLOSE, 0.006, 0.2, limit=25)
        self.let_go_at = scene.steps
        yield from self._hold(Pose(to, rotation), OPEN, 5)
        yield from self._go(Pose(scene.hand.position + np.array([0.0, 0.0, 0.1]), rotation), OPEN, 0.02, 0.3)

    # ---- how the hand moves ------------------------------------------------------------------------------------------

    def _go(
        self, pose: Pose, gripper: float, near: float, turned: float, limit: int = 60, slips: str | None = None
    ) -> Script:
        """Move until the hand is so near (metres) and so turned (radians), or for ``limit`` steps."""
        slip = int(self.rng.integers(3, 12)) if slips is not None and slips == self.slips_at else None
        for step in range(limit):
            away, turn = self._away(pose)
            if np.linalg.norm(away) < near and np.linalg.norm(turn) < turned:
                break
            if step == slip:
                self._jam()
            yield self._action(away, turn, gripper)
        if slip is not None and step < slip:
            self._jam()

    def _jam(self) -> None:
        """The fingers cannot close further than 3 mm wider than they are now."""
        scene = self.scene
        for joint, finger in zip(scene.finger_joints, scene.fingers, strict=True):
            side = 0 if finger > 0 else 1
            scene.model.jnt_range[joint, side] = finger + np.sign(finger) * 0.003

    def _hesitate(self, gripper: float) -> Script:
        """Stand still, or wander off and stand still, as often as the operator likes to."""
        if self.kind != "hesitation" or self.rng.random() < 0.25:
            return
        hand = self.scene.hand
        if self.rng.random() < 0.6:
            away = np.append(self.rng.uniform(-0.06, 0.06, 2), self.rng.uniform(0.0, 0.06))
            hand = Pose(hand.position + away, hand.rotation)
            yield from self._go(hand, gripper, 0.015, 0.3, limit=20)
        yield from self._hold(hand, gripper, int(self.rng.integers(8, 25)))

    def _hold(self, pose: Pose, gripper: float, steps: int) -> Script:
        """Stay where the hand is to be, while the fingers move."""
        for _ in range(steps):
            yield self._action(*self._away(pose), gripper)

    def _close(self, pose: Pose) -> Script:
        """Close the fingers until they meet something, or each other."""
        still = 0
        for _ in range(16):
            before = self.scene.opening
            yield self._action(*self._away(pose), CLOSE)
            still = still + 1 if abs(before - self.scene.opening) < 0.0005 else 0
            if still == 3:
                return

    def _away(self, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
        hand = self.scene.hand
        return pose.position - hand.position, Rotation.from_matrix(pose.rotation @ hand.rotation.T).as_rotvec()

    @staticmethod
    def _action(away: np.ndarray, turn: np.ndarray, gripper: float) -> Action:
        step, angle = GAIN * away / STEP_METRES, TURN_GAIN * turn / STEP_RADIANS
        step /= max(1.0, float(np.abs(step).max()))
        angle /= max(1.0, float(np.abs(angle).max()) / 0.5)
        return np.concatenate([step, angle, [gripper]])

    def _target(self, goal: str) -> tuple[np.ndarray, float]:
        """Where an object goes: the place in the plane, and the height at which its lowest point is let go."""
        scene = self.scene
        if goal in scene.objects:
            points = scene.points(goal)
            return scene.pose(goal).position[:2], float(points[:, 2].min()) + 0.012
        place, parent = scene.site(goal), scene.parent_of(goal)
        if parent in scene.objects:  # a basket: over its walls
            return place[:2], float(scene.points(parent)[:, 2].min()) + 0.06
        return place[:2], float(place[2]) + 0.015

    @staticmethod
    def _over(points: np.ndarray, start: np.ndarray, end: np.ndarray, width: float) -> float:
        """The highest of the points that lie near the way from start to end, seen from above."""
        way = end[:2] - start[:2]
        length = max(float(way @ way), 1e-9)
        part = np.clip((points[:, :2] - start[:2]) @ way / length, 0.0, 1.0)
        near = np.linalg.norm(points[:, :2] - (start[:2] + part[:, None] * way), axis=1) < width
        return float(points[near, 2].max(initial=-np.inf))
