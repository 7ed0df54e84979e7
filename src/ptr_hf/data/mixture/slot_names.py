"""From the names in a LeRobot dataset's features to slots of the action space, by rules that never guess.

A name is placed when it is a slot's own name, a motor of LeRobot's robots (SO-100/101, Koch, LeKiwi, ALOHA), or says what it
is: a numbered joint, an end-effector coordinate, a gripper. Names without a side are of the right arm. What else there is stays
unplaced, and so do coordinates of an action that do not say whether they are a pose or a displacement.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

ARM_JOINTS = 8
HAND_JOINTS = 24

SO_MOTORS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")
ALOHA_MOTORS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
"""Joints 1, 2, ... of an arm. ALOHA's count with a side alone: a lone `waist` may be a humanoid's."""

_BASE_VELOCITIES = {"x": "base_velocity_x", "y": "base_velocity_y", "theta": "base_velocity_yaw"}
_TURNS = {"roll": 1, "pitch": 2, "yaw": 3, "wx": 1, "wy": 2, "wz": 3, "rx": 1, "ry": 2, "rz": 3}
_TURN = "|".join(_TURNS)
_OF_HAND = r"(?P<of>(?:ee|eef|end_effector)_)?"
_NUMBERED = re.compile(
    r"(?:panda_|franka_|fr3_)?(?P<hand>hand_)?joint_?(?P<kind>pos|position|vel|velocity)?_?(?P<number>\d+)"
)
_DISPLACEMENT = re.compile(rf"{_OF_HAND}(?:delta_|d_?)(?:(?P<axis>[xyz])|(?P<turn>{_TURN}))(?:_ee|_eef)?")
_POSE = re.compile(
    rf"{_OF_HAND}(?:(?:pos_|position_)?(?P<axis>[xyz])|(?:rot_)?(?P<turn>{_TURN})|axis_angle_?(?P<angle>[1-3]))"
)
_QUATERNION = re.compile(rf"{_OF_HAND}(?:q|quat_)(?P<axis>[xyzw])")
_SIX = re.compile(rf"{_OF_HAND}rot(?:ation)?_?6d_(?P<number>[1-6])")
_GRIPPER = re.compile(rf"{_OF_HAND}gripper(?:_width|_opening)?")


def feature_names(feature: Mapping[str, Any]) -> list[str] | None:
    """Names of a LeRobot feature's entries, in order; None where it has none, or not one for every entry.

    Args:
        feature: of `meta.features`; its `names` may be a list, a dict around one list (`{"motors": [...]}`), or a dict from
            name to place.
    """
    names = feature.get("names")
    if isinstance(names, Mapping):
        places = dict(names)
        if places and all(isinstance(place, int) for place in places.values()):
            names = sorted(places, key=places.__getitem__)
        else:
            names = next(iter(places.values())) if len(places) == 1 else None
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        return None
    return list(names) if [len(names)] == list(feature["shape"]) else None


def slots_of_names(names: Sequence[str], slots: Collection[str], is_action: bool) -> list[str | None]:
    """The slot of each entry, None where the name does not say it.

    Args:
        names: of a feature's entries.
        slots: of the action space.
        is_action: of the action rather than the state: bare coordinates (`x`, `roll`) are then left unplaced.
    """
    # joints are counted from 0 or from 1, the same way throughout a feature
    numbers = [int(found["number"]) for name in names if (found := _NUMBERED.fullmatch(_parts(name)[1]))]
    first = 0 if 0 in numbers else 1
    placed = [name if first and name in slots else _slot(name, first, is_action) or name for name in names]
    return [slot if slot in slots else None for slot in placed]


def is_bare_coordinate(name: str) -> bool:
    """Whether a name is a coordinate that does not say if it is a pose or a displacement."""
    _, rest, velocity = _parts(name)
    found = _POSE.fullmatch(rest)
    return found is not None and found["of"] is None and not velocity


def _parts(name: str) -> tuple[str | None, str, bool]:
    """Side, rest, and whether it is a velocity, of a name in lower case with single underscores."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    side = None
    for prefix in ("left", "right"):
        if plain.startswith(f"{prefix}_"):
            side, plain = prefix, plain.removeprefix(f"{prefix}_")
    plain = re.sub(r"^(?:arm|main)_", "", plain)
    velocity = re.search(r"_vel(?:ocity)?$", plain) is not None
    return side, re.sub(r"_(?:pos|position|vel|velocity)$", "", plain), velocity


def _slot(name: str, first_joint: int, is_action: bool) -> str | None:
    given_side, rest, velocity = _parts(name)
    side = given_side or "right"
    if velocity and given_side is None and rest in _BASE_VELOCITIES:
        return _BASE_VELOCITIES[rest]
    for motors, known in ((SO_MOTORS, True), (ALOHA_MOTORS, given_side is not None)):
        if known and rest in motors:
            return f"{side}_arm_joint_{'velocity_' if velocity else ''}{motors.index(rest) + 1}"
    if found := _NUMBERED.fullmatch(rest):
        velocity = velocity or (found["kind"] or "").startswith("vel")
        number = int(found["number"]) + 1 - first_joint
        if found["hand"]:
            return None if velocity else f"{side}_hand_joint_{number}"
        return f"{side}_arm_joint_{'velocity_' if velocity else ''}{number}"
    if velocity:
        return None
    if _GRIPPER.fullmatch(rest):
        return f"{side}_gripper"
    if found := _QUATERNION.fullmatch(rest):
        return f"{side}_ee_quaternion_{found['axis']}"
    if found := _SIX.fullmatch(rest):
        return f"{side}_ee_rotation_{found['number']}"
    if found := _DISPLACEMENT.fullmatch(rest):
        return f"{side}_ee_delta_{found['axis'] or f'rotation_{_TURNS[found["turn"]]}'}"
    found = _POSE.fullmatch(rest)
    if found is None or (is_action and found["of"] is None):
        return None
    return f"{side}_ee_{found['axis'] or f'rotation_{found["angle"] or _TURNS[found["turn"]]}'}"
