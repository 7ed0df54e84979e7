"""Whether a dataset's features fit a policy's: renames, cameras, states and sizes."""

from typing import Any

import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from ptr_hf.data.fit import check_fit, check_renames, check_vectors, unread_observations

PICTURE = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
VISUAL, STATE = PolicyFeature(FeatureType.VISUAL, (3, 32, 32)), "observation.state"
ROOM = "observation.environment_state"
CAMERAS = [f"observation.images.camera{number}" for number in (1, 2, 3)]


def vector(size: int, dtype: str = "float32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": (size,), "names": None}


DATA = {
    "action": vector(6),
    STATE: vector(6),
    "observation.images.camera1": PICTURE,
    "observation.images.wrist": PICTURE,
    "observation.note": {"dtype": "string", "shape": (1,), "names": None},
    "timestamp": vector(1),
}


def smolvla(cameras: list[str] = CAMERAS, state: int = 6, action: int = 6) -> SmolVLAConfig:
    inputs = {STATE: PolicyFeature(FeatureType.STATE, (state,)), **dict.fromkeys(cameras, VISUAL)}
    return SmolVLAConfig(
        input_features=inputs, output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))}
    )


def act(inputs: dict[str, PolicyFeature], action: int = 6) -> ACTConfig:
    return ACTConfig(
        input_features=inputs, output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))}, device="cpu"
    )


class TestRenames:
    @pytest.mark.parametrize(
        ("renames", "why"),
        [
            (
                {"observation.images.wirst": CAMERAS[1]},
                r"'observation.images.wirst'.*did you mean 'observation.images.wrist'",
            ),
            (
                {"observation.images.depth_of_the_room": CAMERAS[1]},
                r"demos has no 'observation.images.depth_of_the_room'. It has",
            ),
            (
                {CAMERAS[1]: "observation.images.wrist"},
                r'the other way round, {"observation.images.wrist": ".*camera2"}',
            ),
            (
                {"observation.images.wrist": CAMERAS[1], "observation.images.camera1": CAMERAS[1]},
                r"onto 'observation.images.camera2', and 'observation.images.camera1' of demos maps onto it too",
            ),
            ({"observation.images.wrist": CAMERAS[0]}, r"'observation.images.camera1' of demos is called so already"),
            (
                {"observation.images.wrist": "observation.images.camera4"},
                r"policy does not read: did you mean '.*camera",
            ),
            (
                {"observation.images.wrist": "wrist"},
                r"policy does not read. It reads observation.state, observation.images",
            ),
            ({"action": STATE}, r"only observations can be renamed"),
            ({"observation.images.wrist": STATE}, r"is a camera, and 'observation.state' is none"),
        ],
    )
    def test_an_entry_that_matches_nothing_is_refused_by_name(self, renames: dict[str, str], why: str) -> None:
        with pytest.raises(ValueError, match=why) as refusal:
            check_renames(smolvla().input_features, DATA, renames, "demos")
        assert str(refusal.value).startswith("rename_map maps '")

    def test_what_renames_is_taken(self) -> None:
        reads = smolvla().input_features
        for renames in (
            {},
            {"observation.images.wrist": CAMERAS[1]},
            {"observation.images.wrist": CAMERAS[0], "observation.images.camera1": CAMERAS[2]},
            {"observation.images.camera1": "observation.images.camera1"},
        ):
            check_renames(reads, DATA, renames, "demos")
        two = {STATE: vector(6), CAMERAS[0]: PICTURE, CAMERAS[1]: PICTURE}
        check_renames(reads, two, {CAMERAS[0]: CAMERAS[1], CAMERAS[1]: CAMERAS[0]}, "demos")


class TestUnread:
    def test_cameras_are_named_with_the_line_that_maps_them(self) -> None:
        told = unread_observations(smolvla(), DATA, {}, "demos")
        assert told is not None
        assert told.startswith("The policy does not read observation.images.wrist of demos;")
        assert """rename_map='{"observation.images.wrist": "observation.images.camera2"}'""" in told
        renames = {"observation.images.wrist": CAMERAS[2]}
        assert unread_observations(smolvla(), DATA, renames, "demos") is None

    def test_where_no_camera_is_free_there_is_no_line(self) -> None:
        effort = {**DATA, "observation.effort": vector(6)}
        told = unread_observations(smolvla([CAMERAS[0]]), effort, {}, "demos")
        assert told == "The policy does not read observation.images.wrist, observation.effort of demos."

    def test_the_line_keeps_what_was_mapped(self) -> None:
        data = {**DATA, "observation.images.top": PICTURE}
        told = unread_observations(smolvla(), data, {"observation.images.top": CAMERAS[1]}, "demos")
        assert told is not None
        assert '{"observation.images.top": "observation.images.camera2", "observation.images.wrist": "' in told

    def test_empty_cameras_are_not_free(self) -> None:
        told = unread_observations(smolvla([CAMERAS[0], "observation.images.empty_camera_0"]), DATA, {}, "demos")
        assert told is not None
        assert "free" not in told


class TestVectors:
    @pytest.mark.parametrize(
        ("config", "data", "why"),
        [
            (smolvla(action=14), DATA, r"'action' of demos has 6 dimensions, .* made for 14: give the policy's folder"),
            (
                act({STATE: PolicyFeature(FeatureType.STATE, (14,))}),
                DATA,
                r"'observation.state' .* made for 14: choose",
            ),
            (act({STATE: PolicyFeature(FeatureType.STATE, (6,))}, 14), DATA, r"'action' .* made for 14: choose"),
            (smolvla(), {**DATA, STATE: vector(40)}, r"has 40 dimensions, and the smolvla policy takes at most 32"),
            (smolvla(), {"action": vector(6), "observation.joints": vector(6)}, r"reads 'observation.state', .*joints"),
            (
                act({CAMERAS[0]: VISUAL}),
                {"action": vector(6), CAMERAS[0]: PICTURE},
                r"act policy reads 'observation.state'",
            ),
            (
                act(
                    {
                        STATE: PolicyFeature(FeatureType.STATE, (6,)),
                        "observation.environment_state": PolicyFeature(FeatureType.ENV, (3,)),
                    }
                ),
                DATA,
                r"reads 'observation.environment_state', which demos lacks",
            ),
        ],
    )
    def test_another_robots_are_refused(self, config: Any, data: dict[str, Any], why: str) -> None:
        with pytest.raises(ValueError, match=why):
            check_vectors(config, data, "demos")

    def test_what_the_policy_pads_fits(self) -> None:
        check_vectors(smolvla(state=32), DATA, "demos")
        check_fit(smolvla(), DATA, {}, "demos")
