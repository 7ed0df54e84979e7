"""Wide starts of our own: LIBERO's official placements vary by 0 to 3 cm, so that a motion learnt by heart solves most."""

from collections.abc import Mapping

import numpy as np
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

from benchmarks.libero.scene import LiberoScene, instruction

SPREAD = 0.08
"""Objects move by up to so much along x and y."""
APART = 0.02
"""Left between two objects."""
REACH = (np.array([-0.27, -0.36]), np.array([0.2, 0.37]))
"""Where the arm gets everywhere: x and y in metres."""
BASKET_TURN = np.deg2rad(8)
"""LIBERO measures what is inside a basket along the world's axes, which nothing can be in once it is turned by 45°."""
LANDMARKS: Mapping[str, tuple[str, ...]] = {
    "between the plate and the ramekin": ("plate_1", "glazed_rim_porcelain_ramekin_1"),
    "next to the ramekin": ("glazed_rim_porcelain_ramekin_1",),
    "next to the cookie box": ("cookies_1",),
    "next to the plate": ("plate_1",),
    "from table center": (),
}
"""What an instruction of libero_spatial says -> between what the bowl lies; the middle of the table where nothing is named."""
CLOSER = 0.03
"""The bowl that is meant lies so much nearer to the landmark than the other one."""


def spread(scene: LiberoScene, rng: np.random.Generator, tries: int = 60) -> None:
    """Move and turn everything that stands on the table, as far as it fits and the instruction stays true.

    What lies on something else moves along with it, or stays where it lies on a fixture.
    """
    standing, riders = _standing(scene)
    for name in [standing[n] for n in rng.permutation(len(standing))]:
        together = [name, *riders.get(name, [])]
        others = scene.filling([item for item in (*scene.objects, *scene.fixtures) if item not in together])
        before = {item: _joint(scene, item) for item in together}
        for _ in range(tries):
            shift = rng.uniform(-SPREAD, SPREAD, 2)
            turn = rng.uniform(-BASKET_TURN, BASKET_TURN) if name.startswith("basket") else rng.uniform(-np.pi, np.pi)
            _move(scene, before, shift, turn)
            if _fits(scene, together, others) and _true(scene):
                break
        else:
            _move(scene, before, np.zeros(2), 0.0)


def _standing(scene: LiberoScene) -> tuple[list[str], dict[str, list[str]]]:
    """The objects on the table, and for each of them what lies on it."""
    lowest = {name: float(scene.points(name)[:, 2].min()) for name in scene.objects}
    table = min(lowest.values())
    standing = [name for name in scene.objects if lowest[name] < table + 0.01]
    riders: dict[str, list[str]] = {}
    for name in scene.objects:
        if name not in standing:
            place = scene.pose(name).position[:2]
            nearest = min(standing, key=lambda item: float(np.linalg.norm(scene.pose(item).position[:2] - place)))
            if np.linalg.norm(scene.pose(nearest).position[:2] - place) < 0.05:
                riders.setdefault(nearest, []).append(name)
    return standing, riders


def _joint(scene: LiberoScene, name: str) -> np.ndarray:
    return scene.env.sim.data.get_joint_qpos(scene.env.objects_dict[name].joints[-1]).copy()


def _move(scene: LiberoScene, before: Mapping[str, np.ndarray], shift: np.ndarray, turn: float) -> None:
    """Turn around the first object and shift, from where they were."""
    about = next(iter(before.values()))[:2]
    rotation = Rotation.from_rotvec([0.0, 0.0, turn])
    for name, joint in before.items():
        moved = joint.copy()
        moved[:2] = about + shift + rotation.as_matrix()[:2, :2] @ (joint[:2] - about)
        turned = rotation * Rotation.from_quat(joint[[4, 5, 6, 3]])
        moved[3:] = turned.as_quat()[[3, 0, 1, 2]]
        scene.env.sim.data.set_joint_qpos(scene.env.objects_dict[name].joints[-1], moved)
    scene.env.sim.forward()


def _fits(scene: LiberoScene, names: list[str], others: np.ndarray) -> bool:
    points = np.concatenate([scene.points(name)[:, :2] for name in names])
    if (points < REACH[0]).any() or (points > REACH[1]).any():
        return False
    centre = (points.min(0) + points.max(0)) / 2
    radius = float(np.linalg.norm(points - centre, axis=1).max())
    return float(np.linalg.norm(others[:, :2] - centre, axis=1).min()) > radius + APART


def _true(scene: LiberoScene) -> bool:
    """Whether the instruction still says which bowl is meant."""
    if scene.suite != "libero_spatial":
        return True
    text = instruction(scene.suite, scene.task)
    for words, names in LANDMARKS.items():
        if words in text:
            places = [scene.pose(name).position[:2] for name in names] or [np.array([-0.075, 0.0])]
            meant, other = (
                float(np.linalg.norm(scene.pose(f"akita_black_bowl_{n}").position[:2] - np.mean(places, 0)))
                for n in (1, 2)
            )
            return meant + CLOSER < other
    return True
