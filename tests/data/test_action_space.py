"""Slots, layouts, and what a dataset's names tell of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ptr_hf.data.mixture.action_space import (
    LAYOUTS,
    ActionSpace,
    EmbodimentLayout,
    from_slots,
    resolve_layout,
    to_slots,
    unused_slots,
)

SPACE = ActionSpace.standard()
SO_MOTORS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
ALOHA_MOTORS = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
ENTRIES = {
    "so100": (6, 6),
    "so101": (6, 6),
    "franka": (8, 8),
    "franka_hand": (13, 13),
    "aloha": (14, 14),
    "metaworld": (4, 4),
    "libero": (7, 8),
    "adam_u": (31, 31),
    "g1": (26, 26),
    "fr3": (13, 13),
}


def features(action: Any, state: Any = None) -> dict[str, Any]:
    """Features of a dataset as its metadata has them."""
    held = {}
    for key, names in (("action", action), ("observation.state", state)):
        if names is not None:
            listed = names["motors"] if isinstance(names, dict) and "motors" in names else names
            held[key] = {"dtype": "float32", "shape": (len(listed),), "names": names}
    return held


def arm(*motors: str, side: str = "right") -> tuple[str, ...]:
    return tuple(f"{side}_gripper" if motor == "gripper" else f"{side}_arm_joint_{motor}" for motor in motors)


def written(layout: EmbodimentLayout) -> str:
    """A layout as a user writes it in YAML."""
    return yaml.safe_dump({"name": layout.name, "action": list(layout.action), "state": list(layout.state)})


SO_SLOTS = arm("1", "2", "3", "4", "5", "gripper")


def test_the_standard_space_has_200_slots_of_which_eight_are_reserved() -> None:
    assert len(SPACE) == 200
    assert SPACE.positions(["left_arm_joint_1", "right_arm_joint_1", "right_gripper"]) == (0, 61, 96)
    assert SPACE.slots[-9:] == ("environment_40", *(f"reserved_{number}" for number in range(1, 9)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_ready_layouts_are_placed_without_overlap(name: str) -> None:
    layout = LAYOUTS[name]
    assert (layout.name, len(layout.action), len(layout.state)) == (name, *ENTRIES[name])
    for slots in (layout.action, layout.state):
        positions = SPACE.positions(slots)
        assert len(set(positions)) == len(slots)


def test_displacements_and_poses_share_no_slot() -> None:
    metaworld = LAYOUTS["metaworld"]
    assert set(metaworld.action) & set(metaworld.state) == {"right_gripper"}


def test_a_compact_space_keeps_what_is_used_in_order() -> None:
    compact = SPACE.compact([LAYOUTS["franka"], LAYOUTS["metaworld"], LAYOUTS["so101"]])
    joints = tuple(f"right_arm_joint_{number}" for number in range(1, 8))
    coordinates = tuple(f"right_ee{kind}_{axis}" for kind in ("", "_delta") for axis in "xyz")
    assert compact.slots == (*joints, *coordinates, "right_gripper")
    actions = SPACE.compact([LAYOUTS["metaworld"]], features=("action",))
    assert actions.slots == LAYOUTS["metaworld"].action
    assert actions.positions(["right_gripper"]) == (3,)
    with pytest.raises(ValueError, match="at least one slot"):
        SPACE.compact([])


def test_unknown_slots_get_their_nearest_names() -> None:
    with pytest.raises(
        ValueError, match=r"no slot 'right_griper' \(nearest: right_gripper.*no slot 'qqq'\. docs/mixtures"
    ):
        SPACE.positions(["right_griper", "right_arm_joint_1", "qqq"])


def test_repeated_slots_are_named_with_their_entries() -> None:
    with pytest.raises(ValueError, match=r"more than once: head_1 \(entries 0, 2\); head_2 \(entries 1, 3\)\."):
        SPACE.positions(["head_1", "head_2", "head_1", "head_2"])
    with pytest.raises(ValueError, match=r"the state of the layout 'mine'.*: head_1 \(entries 0, 1\)"):
        EmbodimentLayout("mine", ("head_1",), ("head_1", "head_1"))
    with pytest.raises(ValueError, match="names each slot once"):
        ActionSpace(("a", "a"))


def test_layouts_are_written_and_read() -> None:
    for layout in LAYOUTS.values():
        assert EmbodimentLayout.from_dict(yaml.safe_load(written(layout))) == layout
    assert EmbodimentLayout.from_dict({"action": ["head_1"]}, "mine") == EmbodimentLayout("mine", ("head_1",))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"state": ["head_1"]}, "has no 'action'"),
        ({"action": ["head_1"], "actions": []}, "has 'actions', which is not read"),
        ({"action": "head_1"}, "'action' is a list of slot names, not 'head_1'"),
        ({"action": [1]}, r"not \[1\]"),
        ({"action": []}, "has no action: name the slot"),
    ],
)
def test_malformed_layouts_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EmbodimentLayout.from_dict(given)


@pytest.mark.parametrize(
    ("names", "slots"),
    [
        ([f"{motor}.pos" for motor in SO_MOTORS], SO_SLOTS),
        ([f"main_{motor}" for motor in SO_MOTORS], SO_SLOTS),
        ({"motors": SO_MOTORS}, SO_SLOTS),
        (
            [f"arm_{motor}.pos" for motor in SO_MOTORS] + ["x.vel", "y.vel", "theta.vel"],
            (*SO_SLOTS, "base_velocity_x", "base_velocity_y", "base_velocity_yaw"),
        ),
        (
            [f"{side}_{motor}.pos" for side in ("left", "right") for motor in SO_MOTORS],
            (*arm("1", "2", "3", "4", "5", "gripper", side="left"), *SO_SLOTS),
        ),
        ([f"{side}_{motor}" for side in ("left", "right") for motor in ALOHA_MOTORS], LAYOUTS["aloha"].action),
        ([*(f"joint_{number}" for number in range(7)), "gripper"], LAYOUTS["franka"].action),
        ([*(f"panda_joint{number}" for number in range(1, 8)), "gripper_width"], LAYOUTS["franka"].action),
        ([f"left_joint_{number}.vel" for number in (1, 2)], tuple(f"left_arm_joint_velocity_{n}" for n in (1, 2))),
        ([f"right_hand_joint_{number}" for number in (0, 1)], ("right_hand_joint_1", "right_hand_joint_2")),
        ({"delta_x": 0, "delta_y": 1, "gripper": 3, "delta_z": 2}, LAYOUTS["metaworld"].action),
        (
            ["ee.x", "ee.y", "ee.z", "ee.wx", "ee.wy", "ee.wz", "ee.gripper_pos"],
            (*LAYOUTS["libero"].state[:6], "right_gripper"),
        ),
        (
            ["dx", "droll", "left_delta_yaw"],
            ("right_ee_delta_x", "right_ee_delta_rotation_1", "left_ee_delta_rotation_3"),
        ),
        (["eef_pos_z", "qx", "rot6d_6"], ("right_ee_z", "right_ee_quaternion_x", "right_ee_rotation_6")),
        (["waist_1", "environment_40", "reserved_8"], ("waist_1", "environment_40", "reserved_8")),
    ],
)
def test_actions_are_placed_by_their_names(names: Any, slots: tuple[str, ...]) -> None:
    assert resolve_layout(None, features(names), name="mine") == EmbodimentLayout("mine", slots)


def test_bare_coordinates_are_a_pose_in_a_state_alone() -> None:
    coordinates = ["x", "y", "z", "roll", "pitch", "yaw"]
    layout = resolve_layout(None, features(["delta_x"], coordinates))
    assert layout.state == LAYOUTS["libero"].state[:6]
    with pytest.raises(
        ValueError, match=r"'x', .* not placed \(recognised: none\), since a coordinate .* pose .* displace"
    ):
        resolve_layout(None, features(coordinates))


@pytest.mark.parametrize(
    "name", ["motor_0", "joint_9", "hand_joint_25", "waist", "gripper.vel", "wrist", "x.vel.y", "", "é"]
)
def test_nothing_is_guessed(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be told from their names"):
        resolve_layout(None, features([name, "joint_1"]))


def test_what_cannot_be_placed_is_said_with_a_layout_to_fill_in() -> None:
    with pytest.raises(ValueError, match="cannot be told") as error:
        resolve_layout(None, features(["joint_1", "thumb", "spin"], ["gripper", "gripper"]))
    sentence = str(error.value)
    assert "in 'action', 'thumb', 'spin' not placed (recognised: joint_1 = right_arm_joint_1)" in sentence
    assert "in 'observation.state', 'gripper', 'gripper' all mean right_gripper" in sentence
    assert all(layout in sentence for layout in LAYOUTS)
    example = yaml.safe_load(sentence[sentence.index("embodiment:") :])
    assert example["embodiment"]["action"] == ["right_arm_joint_1", "?", "?"]


@pytest.mark.parametrize("names", [None, [], ["motors"], {"a": ["x"], "b": ["y"]}, {"motors": None}, [["a", "b"]]])
def test_features_without_names_need_a_layout(names: Any) -> None:
    held = features(SO_MOTORS)
    held["action"]["names"] = names
    with pytest.raises(ValueError, match="the entries of 'action' have no names of their own"):
        resolve_layout(None, held)
    assert resolve_layout("so101", held) == EmbodimentLayout("so101", SO_SLOTS)


def test_layouts_are_given_by_name_dict_layout_or_file(tmp_path: Path) -> None:
    held = features(["a", "b"], ["c"])
    mine = EmbodimentLayout("mine", ("head_1", "head_2"), ("waist_1",))
    (tmp_path / "mine.yaml").write_text("action: [head_1, head_2]\nstate: [waist_1]\n")
    plain = {"action": ["head_1", "head_2"], "state": ["waist_1"]}
    for robot in (mine, yaml.safe_load(written(mine)), tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        assert resolve_layout(robot, held) == mine
    assert resolve_layout(plain, held, name="mine") == mine
    so = features(SO_MOTORS, SO_MOTORS)
    assert resolve_layout("so101", so) == LAYOUTS["so101"]
    # a dataset without a state takes the layout without one
    assert resolve_layout("so101", features(SO_MOTORS)) == EmbodimentLayout("so101", SO_SLOTS)


def test_layouts_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    held = features(SO_MOTORS)
    with pytest.raises(ValueError, match=r"no ready layout 'so102' \(nearest: so10.*Choose one of so100, .*write one"):
        resolve_layout("so102", held)
    with pytest.raises(ValueError, match=r"no layout file .*none\.yaml"):
        resolve_layout(tmp_path / "none.yaml", held)
    (tmp_path / "list.yaml").write_text("- head_1\n")
    with pytest.raises(ValueError, match="holds no layout"):
        resolve_layout(tmp_path / "list.yaml", held)
    (tmp_path / "bad.yaml").write_text("action: [head_1\n")
    with pytest.raises(ValueError, match="is not YAML"):
        resolve_layout(tmp_path / "bad.yaml", held)


def test_layouts_must_fit_the_features() -> None:
    with pytest.raises(
        ValueError, match=r"'aloha' places 14 entries of 'action', but the dataset's has 6 \(shoulder_pan, "
    ):
        resolve_layout("aloha", features(SO_MOTORS))
    with pytest.raises(ValueError, match=r"places 0 entries of 'observation\.state', but the dataset's has 1"):
        resolve_layout({"action": ["head_1"]}, features(["a"], ["b"]))
    with pytest.raises(ValueError, match=r"no slot 'head_7' \(nearest: head_"):
        resolve_layout({"action": ["head_7"]}, features(["a"]))
    with pytest.raises(ValueError, match="no slot 'head_1'"):
        resolve_layout({"action": ["head_1"]}, features(["a"]), space=SPACE.compact([LAYOUTS["so101"]]))
    with pytest.raises(ValueError, match=r"has no 'action' feature; it has observation\.state"):
        resolve_layout("so101", features(None, ["a"]))
    held = features(SO_MOTORS)
    held["action"]["shape"] = (2, 3)
    with pytest.raises(ValueError, match=r"'action' has the shape \(2, 3\), where a vector is expected"):
        resolve_layout("so101", held)


def test_a_ready_layout_in_another_order_than_the_names_is_refused() -> None:
    swapped = [*SO_MOTORS[:4], "gripper", "wrist_roll"]
    with pytest.raises(
        ValueError, match=r"another order: gripper \(right_gripper by its name, right_arm_joint_5 in the"
    ):
        resolve_layout("so101", features(swapped))
    assert resolve_layout(None, features(swapped)).action == arm("1", "2", "3", "4", "gripper", "5")


def test_values_go_to_their_slots_and_back() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    placed = to_slots(values, (3, 1), 5)
    assert placed.tolist() == [[0, 2, 0, 1, 0], [0, 4, 0, 3, 0]]
    assert from_slots(placed, (3, 1)).tolist() == values.tolist()
    assert unused_slots((3, 1), 5).tolist() == [True, False, True, False, True]
    placed.square().sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[2, 4], [6, 8]]
    with pytest.raises(ValueError, match="3 slots are given for 2 entries"):
        to_slots(values, (0, 1, 2), 5)


@given(st.data())
def test_round_trips_are_exact(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    rows = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    values = torch.randn(*rows, len(positions), dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    placed = to_slots(values, positions, size)
    assert placed.dtype == values.dtype
    assert torch.equal(from_slots(placed, positions), values)
    assert not placed[..., unused_slots(positions, size)].any()
    assert torch.equal(to_slots(from_slots(placed, positions), positions, size), placed)
