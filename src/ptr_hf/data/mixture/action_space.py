"""One action space for several robots: every entry of an action or a state has a slot with a meaning of its own.

Robots that share a slot share what its number means, so a policy can learn from one what it does with the other; slots that a
robot lacks are zeros, and no loss is taken in them. Joint targets, joint velocities, end-effector poses and end-effector
displacements are different slots. docs/mixtures.md lists them.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import yaml
from jaxtyping import Bool, Shaped
from torch import Tensor

from ptr_hf.data.mixture.slot_names import ARM_JOINTS, HAND_JOINTS, feature_names, is_bare_coordinate, slots_of_names

ENVIRONMENT_SLOTS = 40
FEATURES = {"action": "action", "state": "observation.state"}
"""What a layout places -> the LeRobot feature of that name."""


def _refuse_repeated(slots: Sequence[str], rule: str) -> None:
    repeated = {slot: [n for n, other in enumerate(slots) if other == slot] for slot in slots}
    named = [f"{slot} (entries {', '.join(map(str, at))})" for slot, at in repeated.items() if len(at) > 1]
    if named:
        raise ValueError(f"{rule}, but named more than once: {'; '.join(named)}.")


@dataclass(frozen=True)
class ActionSpace:
    """An ordered set of named slots; actions and states both live in it.

    Args:
        slots: name of every entry, each once.

    Raises:
        ValueError: a slot is named twice.

    Example:
        >>> space = ActionSpace.standard()
        >>> space.positions(["right_arm_joint_1", "right_gripper"])
        (61, 96)
    """

    slots: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse a slot that is named twice."""
        _refuse_repeated(self.slots, "An action space names each slot once")

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self.slots)

    @classmethod
    def standard(cls) -> "ActionSpace":
        """The 200 slots of docs/mixtures.md, of which the last ones are reserved."""
        return cls((*_named_slots(), *_numbered("reserved", 8)))

    def compact(
        self,
        layouts: Iterable["EmbodimentLayout"],
        features: Sequence[Literal["action", "state"]] = ("action", "state"),
    ) -> "ActionSpace":
        """Only the slots that some layout uses, in this space's order: for a policy with few action dimensions.

        Args:
            layouts: of the robots.
            features: which of a layout's two parts count.

        Raises:
            ValueError: a layout names a slot that this space does not have, or none names any.
        """
        used: set[int] = set()
        for layout in layouts:
            for feature in features:
                used.update(self.positions(layout.action if feature == "action" else layout.state))
        if not used:
            raise ValueError("A compact action space needs a layout that names at least one slot.")
        return ActionSpace(tuple(self.slots[position] for position in sorted(used)))

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """Where each of the named slots is.

        Raises:
            ValueError: a slot is unknown (the nearest names are given), or named twice.
        """
        place = {slot: position for position, slot in enumerate(self.slots)}
        unknown = [name for name in names if name not in place]
        if unknown:
            raise ValueError(
                f"The action space has no slot {'; no slot '.join(_with_nearest(name, self.slots) for name in unknown)}. "
                "docs/mixtures.md lists the standard slots; a compact space has those of its robots alone."
            )
        _refuse_repeated(names, "Each entry needs a slot of its own")
        return tuple(place[name] for name in names)


@dataclass(frozen=True)
class EmbodimentLayout:
    """Which slot each entry of a robot's action and state goes to.

    Args:
        name: of the robot, such as "so101".
        action: slot of each entry of the robot's own action, in its order.
        state: the same for `observation.state`; empty for a dataset without one.

    Raises:
        ValueError: there is no action, or a slot is named twice.
    """

    name: str
    action: tuple[str, ...]
    state: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an empty action and slots named twice."""
        if not self.action:
            raise ValueError(f"The layout {self.name!r} has no action: name the slot of each of its entries.")
        for feature, slots in (("action", self.action), ("state", self.state)):
            _refuse_repeated(slots, f"In the {feature} of the layout {self.name!r} each entry needs a slot of its own")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], name: str = "robot") -> "EmbodimentLayout":
        """The layout that a user wrote down.

        Args:
            given: `action`, and `state` and `name` where there are any.
            name: of a layout that has none of its own.

        Raises:
            ValueError: another key is there, `action` is not, or a value is not of its kind.
        """
        unknown = sorted(map(str, set(given) - {"name", "action", "state"}))
        if unknown or "action" not in given:
            wrong = f"has {', '.join(map(repr, unknown))}, which is not read" if unknown else "has no 'action'"
            raise ValueError(f"This layout {wrong}. {_WRITTEN}{_EXAMPLE}")
        lists = {}
        for feature in ("action", "state"):
            slots = given.get(feature) or []
            if isinstance(slots, str) or not isinstance(slots, Sequence) or not all(isinstance(s, str) for s in slots):
                raise ValueError(f"A layout's {feature!r} is a list of slot names, not {slots!r}.")
            lists[feature] = tuple(slots)
        return cls(str(given.get("name") or name), **lists)


def resolve_layout(
    robot: str | Path | Mapping[str, Any] | EmbodimentLayout | None,
    features: Mapping[str, Any],
    *,
    name: str = "robot",
    space: ActionSpace | None = None,
) -> EmbodimentLayout:
    """The layout of a dataset, checked against its features.

    Args:
        robot: a ready layout's name, a YAML file, `{"action": [...], "state": [...]}`, a layout, or None to go by the names in
            the features.
        features: `meta.features` of the dataset, of which `action` and `observation.state` are read.
        name: of a layout that has none of its own.
        space: whose slots count; by default the standard one.

    Returns:
        a layout whose lengths are those of the features, without a state where the dataset has none.

    Raises:
        ValueError: no such layout or file; unknown or repeated slots; lengths that differ from the features'; names of a ready
            layout's motors in another order than the dataset's; names that cannot be placed.
    """
    space = space or ActionSpace.standard()
    sizes = _sizes(features)
    if robot is None:
        return _from_names(features, name, space)
    layout = _given_layout(robot, name)
    if "state" not in sizes:
        layout = replace(layout, state=())
    for feature, size in sizes.items():
        slots = layout.action if feature == "action" else layout.state
        space.positions(slots)
        names = feature_names(features[FEATURES[feature]])
        if len(slots) != size:
            called = "" if names is None else f" ({', '.join(names)})"
            raise ValueError(
                f"The layout {layout.name!r} places {len(slots)} entries of {FEATURES[feature]!r}, but the dataset's has {size}"
                f"{called}: choose another layout, or write one. {_how_to_write(features, space)}"
            )
        if isinstance(robot, str) and robot in LAYOUTS and names is not None:
            _refuse_contradiction(layout, feature, slots, names, space)
    return layout


def to_slots(
    values: Shaped[Tensor, "*rows entries"], positions: Sequence[int], size: int
) -> Shaped[Tensor, "*rows slots"]:
    """Put a robot's own entries into their slots; every other slot is zero.

    Args:
        values: the robot's actions or states, entries last.
        positions: slot of each entry, from `ActionSpace.positions`.
        size: of the action space.

    Raises:
        ValueError: there are not as many positions as entries.
    """
    if values.shape[-1] != len(positions):
        raise ValueError(f"{len(positions)} slots are given for {values.shape[-1]} entries.")
    index = torch.tensor(positions, dtype=torch.long, device=values.device)
    return values.new_zeros(*values.shape[:-1], size).index_copy(-1, index, values)


def from_slots(vector: Shaped[Tensor, "*rows slots"], positions: Sequence[int]) -> Shaped[Tensor, "*rows entries"]:
    """A robot's own entries out of a vector of slots: undoes `to_slots`."""
    return vector.index_select(-1, torch.tensor(positions, dtype=torch.long, device=vector.device))


def unused_slots(positions: Sequence[int], size: int) -> Bool[Tensor, " slots"]:
    """True where a robot has nothing: its row of `action_dim_is_pad`."""
    unused = torch.ones(size, dtype=torch.bool)
    unused[list(positions)] = False
    return unused


@cache
def _named_slots() -> tuple[str, ...]:
    slots: list[str] = []
    for side in ("left", "right"):
        slots += _numbered(f"{side}_arm_joint", ARM_JOINTS)
        slots += _numbered(f"{side}_arm_joint_velocity", ARM_JOINTS)
        slots += [f"{side}_ee_{axis}" for axis in "xyz"]
        slots += _numbered(f"{side}_ee_rotation", 6)
        slots += [f"{side}_ee_quaternion_{axis}" for axis in "xyzw"]
        slots += [f"{side}_ee_delta_{axis}" for axis in "xyz"]
        slots += _numbered(f"{side}_ee_delta_rotation", 3)
        slots += [f"{side}_gripper", f"{side}_gripper_2"]
        slots += _numbered(f"{side}_hand_joint", HAND_JOINTS)
    for side in ("left", "right"):
        slots += _numbered(f"{side}_leg_joint", 6)
    slots += [*_numbered("waist", 3), *_numbered("head", 3)]
    for kind in ("base", "base_velocity"):
        slots += [f"{kind}_{axis}" for axis in ("x", "y", "z", "roll", "pitch", "yaw")]
    return (*slots, *_numbered("environment", ENVIRONMENT_SLOTS))


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{number}" for number in range(1, count + 1))


def _joint_robot(name: str, *slots: str) -> EmbodimentLayout:
    """A robot whose state is what its action commands."""
    return EmbodimentLayout(name, slots, slots)


def _hands(joints: int) -> tuple[str, ...]:
    return (*_numbered("left_hand_joint", joints), *_numbered("right_hand_joint", joints))


_RIGHT_ARM = _numbered("right_arm_joint", 7)
_BOTH_ARMS = (*_numbered("left_arm_joint", 7), *_RIGHT_ARM)
_RIGHT_POSITION = tuple(f"right_ee_{axis}" for axis in "xyz")
_RIGHT_DELTA = tuple(f"right_ee_delta_{axis}" for axis in "xyz")

LAYOUTS: Mapping[str, EmbodimentLayout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            _joint_robot("so100", *_RIGHT_ARM[:5], "right_gripper"),
            _joint_robot("so101", *_RIGHT_ARM[:5], "right_gripper"),
            _joint_robot("franka", *_RIGHT_ARM, "right_gripper"),
            _joint_robot("franka_hand", *_RIGHT_ARM, *_numbered("right_hand_joint", 6)),
            _joint_robot(
                "aloha",
                *_numbered("left_arm_joint", 6),
                "left_gripper",
                *_numbered("right_arm_joint", 6),
                "right_gripper",
            ),
            EmbodimentLayout("metaworld", (*_RIGHT_DELTA, "right_gripper"), (*_RIGHT_POSITION, "right_gripper")),
            EmbodimentLayout(
                "libero",
                (*_RIGHT_DELTA, *_numbered("right_ee_delta_rotation", 3), "right_gripper"),
                (*_RIGHT_POSITION, *_numbered("right_ee_rotation", 3), "right_gripper", "right_gripper_2"),
            ),
            _joint_robot("adam_u", *_numbered("head", 2), *_numbered("waist", 3), *_BOTH_ARMS, *_hands(6)),
            _joint_robot("g1", *_BOTH_ARMS, *_hands(6)),
            _joint_robot("fr3", *_RIGHT_ARM, *_numbered("right_hand_joint", 6)),
        )
    }
)
"""Ready layouts by name. LIBERO's state ends in its gripper's two fingers."""


def _sizes(features: Mapping[str, Any]) -> dict[str, int]:
    """Entries of the action, and of the state where there is one."""
    if "action" not in features:
        raise ValueError(f"The dataset has no 'action' feature; it has {', '.join(sorted(features))}.")
    sizes = {}
    for part, key in FEATURES.items():
        if key in features:
            shape = tuple(features[key]["shape"])
            if len(shape) != 1:
                raise ValueError(
                    f"{key!r} has the shape {shape}, where a vector is expected: one number for each entry."
                )
            sizes[part] = int(shape[0])
    return sizes


def _given_layout(robot: str | Path | Mapping[str, Any] | EmbodimentLayout, name: str) -> EmbodimentLayout:
    if isinstance(robot, EmbodimentLayout):
        return robot
    if isinstance(robot, Mapping):
        return EmbodimentLayout.from_dict(robot, name)
    if isinstance(robot, str) and robot in LAYOUTS:
        return LAYOUTS[robot]
    path = Path(robot)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"There is no ready layout {_with_nearest(str(robot), LAYOUTS)}. Choose one of {', '.join(LAYOUTS)}, "
            f"or write one. {_WRITTEN}{_EXAMPLE}"
        )
    if not path.is_file():
        raise ValueError(f"There is no layout file {str(path)!r}. {_WRITTEN}{_EXAMPLE}")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The layout file {str(path)!r} is not YAML: {error}") from error
    if not isinstance(written, Mapping):
        raise ValueError(f"The layout file {str(path)!r} holds no layout. {_WRITTEN}{_EXAMPLE}")
    return EmbodimentLayout.from_dict(written, path.stem)


def _from_names(features: Mapping[str, Any], name: str, space: ActionSpace) -> EmbodimentLayout:
    placed: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for part in _sizes(features):
        names = feature_names(features[FEATURES[part]])
        if names is None:
            problems.append(f"the entries of {FEATURES[part]!r} have no names of their own")
            continue
        slots = slots_of_names(names, frozenset(space.slots), is_action=part == "action")
        problems += _problems(FEATURES[part], names, slots)
        placed[part] = tuple(slot for slot in slots if slot is not None)
    if problems:
        raise ValueError(
            f"What the dataset's entries mean cannot be told from their names: {'; '.join(problems)}. Choose a ready layout "
            f"({', '.join(LAYOUTS)}), or write one. {_how_to_write(features, space)}"
        )
    return EmbodimentLayout(name, **placed)


def _problems(key: str, names: list[str], slots: list[str | None]) -> list[str]:
    """What keeps a feature's names from being a layout, in words."""
    problems = []
    unplaced = [name for name, slot in zip(names, slots, strict=True) if slot is None]
    if unplaced:
        known = [f"{name} = {slot}" for name, slot in zip(names, slots, strict=True) if slot is not None]
        problem = f"in {key!r}, {', '.join(map(repr, unplaced))} not placed (recognised: {', '.join(known) or 'none'})"
        if any(map(is_bare_coordinate, unplaced)):
            problem += (
                ", since a coordinate of an action may be a pose (right_ee_x) or a displacement (right_ee_delta_x)"
            )
        problems.append(problem)
    for slot, count in Counter(slot for slot in slots if slot is not None).items():
        if count > 1:
            same = [name for name, placed in zip(names, slots, strict=True) if placed == slot]
            problems.append(f"in {key!r}, {', '.join(map(repr, same))} all mean {slot}")
    return problems


def _refuse_contradiction(
    layout: EmbodimentLayout, feature: str, slots: tuple[str, ...], names: list[str], space: ActionSpace
) -> None:
    """Refuse a ready layout whose entries stand in another order than the dataset's names say."""
    named = slots_of_names(names, frozenset(space.slots), is_action=feature == "action")
    if set(named) == set(slots) and tuple(named) != slots:
        differ = [
            f"{name} ({own} by its name, {ready} in the layout)"
            for name, own, ready in zip(names, named, slots, strict=True)
            if own != ready
        ]
        raise ValueError(
            f"The dataset's {FEATURES[feature]!r} has the entries of the layout {layout.name!r} in another order: "
            f"{', '.join(differ)}. Leave the layout out to go by the names, or write it down: "
            f"{{action: [...], state: [...]}} in the dataset's own order."
        )


def _how_to_write(features: Mapping[str, Any], space: ActionSpace) -> str:
    """How a layout is written, with whatever the dataset's names tell already."""
    lines = ""
    for part, size in _sizes(features).items():
        slots = _named(features, part, space) or [None] * size
        lines += f"\n  {part}: [{', '.join(slot or "'?'" for slot in slots)}]"
    return f"{_WRITTEN}{lines}"


def _named(features: Mapping[str, Any], part: str, space: ActionSpace) -> list[str | None] | None:
    """The slots that a feature's names tell; None where the entries have no names."""
    names = feature_names(features[FEATURES[part]])
    return None if names is None else slots_of_names(names, frozenset(space.slots), is_action=part == "action")


_WRITTEN = "A layout names the slot of every entry, in order (docs/mixtures.md lists the slots):\nembodiment:"
_EXAMPLE = "".join(f"\n  {part}: [right_arm_joint_1, right_arm_joint_2, right_gripper]" for part in ("action", "state"))


def _with_nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known))
    return f"{name!r} (nearest: {', '.join(nearest)})" if nearest else repr(name)
