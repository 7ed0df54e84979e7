"""Datasets a run could not learn from are refused in one sentence, before it starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from small_policies import base_policy

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.datasets import check_dataset, dataset_metadata, open_dataset
from ptr_hf.data.fit import check_cameras
from ptr_hf.data.segments import SegmentLayout

LAYOUT = SegmentLayout(None, (0, 1, 2, 3), 2, 4, 4)
CAMERA = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 8 and 6 frames."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "short", (8, 6), cameras=())


def empty_dataset(root: Path) -> Path:
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    LeRobotDataset.create("tests/empty", 10, features, root=root, use_videos=False).finalize()
    return root


class TestOpening:
    def test_by_folder_by_string_and_by_open_dataset(self, short: Path) -> None:
        for source in (short, str(short), LeRobotDataset("tests/points", root=short)):
            dataset = open_dataset(source, LAYOUT)
            assert dataset[0]["observation.state"].shape == (3, 4)
            assert dataset[0]["action"].shape == (8, 2)
            assert dataset.meta.total_episodes == 2
        subset = LeRobotDataset("tests/points", root=short, episodes=[1])
        assert len(open_dataset(subset, LAYOUT)) == 6, "an open dataset keeps its episodes"
        assert len(open_dataset(subset, LAYOUT, episodes=[0])) == 8

    def test_image_transforms_of_an_open_dataset_are_kept(self, points: Path) -> None:
        dark = LeRobotDataset("tests/points", root=points, image_transforms=lambda frames: frames * 0)
        assert open_dataset(dark, LAYOUT)[0]["observation.image"].max() == 0
        assert open_dataset(points, LAYOUT)[0]["observation.image"].max() > 0

    def test_the_video_decoder_is_one_that_works(self, point_videos: Path) -> None:
        frame = open_dataset(point_videos, LAYOUT)[0]["observation.image"]
        assert frame.dtype == torch.uint8
        assert frame.float().std() > 10

    def test_a_folder_that_is_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is no LeRobotDataset: it has no meta/info.json"):
            dataset_metadata(tmp_path)

    def test_a_path_that_does_not_exist(self, tmp_path: Path) -> None:
        for source in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
            with pytest.raises(ValueError, match=r"nowhere is neither a folder nor the name of a dataset on the Hub"):
                open_dataset(source, LAYOUT)

    def test_an_empty_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is empty: it has no frames to train on"):
            open_dataset(empty_dataset(tmp_path / "empty"), LAYOUT)

    def test_a_dataset_that_lost_its_data(self, short: Path, tmp_path: Path) -> None:
        shutil.copytree(short, tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken" / "data")
        with pytest.raises(ValueError, match=r"The dataset broken cannot be read: files are missing in .*broken"):
            open_dataset(tmp_path / "broken", LAYOUT)

    @pytest.mark.parametrize("episodes", [[2], [0, 99], [-1]])
    def test_unknown_episodes(self, short: Path, episodes: list[int]) -> None:
        with pytest.raises(ValueError, match=rf"has episodes 0 to 1; episodes \[{episodes[-1]}\] do not exist"):
            open_dataset(short, LAYOUT, episodes=episodes)

    def test_no_episodes(self, short: Path) -> None:
        with pytest.raises(ValueError, match=r"episodes is empty: name at least one episode"):
            open_dataset(short, LAYOUT, episodes=[])


class TestContent:
    def check(self, root: Path, layout: SegmentLayout, **settings: Any) -> None:
        check_dataset(open_dataset(root, layout, **settings), layout)

    def test_a_chunk_longer_than_every_episode(self, short: Path) -> None:
        layout = SegmentLayout(None, tuple(range(9)), 2, 9, 9)
        with pytest.raises(ValueError, match=r"A chunk of 9 actions.*longest has 8 frames.*chunk_size to at most 8"):
            self.check(short, layout)

    def test_no_chunk_with_a_future(self, short: Path) -> None:
        layout = SegmentLayout(None, (0, 1, 2, 3), 2, 4, 8)
        with pytest.raises(ValueError, match=r"No chunk .* has a recorded consequence: consequence_offset=8.*below 8"):
            self.check(short, layout)
        self.check(short, SegmentLayout(None, (0, 1, 2, 3), 2, 4, 7))
        self.check(short, SegmentLayout(None, (0, 1, 2, 3), 2, 4, None))

    def test_the_chosen_episodes_count(self, short: Path) -> None:
        layout = SegmentLayout(None, (0, 1, 2, 3), 2, 4, 6)
        self.check(short, layout)
        with pytest.raises(ValueError, match=r"longest has 6 frames"):
            self.check(short, layout, episodes=[1])

    def test_no_actions(self, short: Path) -> None:
        dataset = open_dataset(short, LAYOUT)
        del dataset.meta.features["action"]
        with pytest.raises(ValueError, match=r"has no 'action' feature"):
            check_dataset(dataset, LAYOUT)


class TestCameras:
    KEYS = ("observation.image", "observation.state", "action")

    def test_a_missing_camera_is_named(self) -> None:
        config = ACTConfig(input_features={"observation.images.top": CAMERA, "observation.image": CAMERA})
        with pytest.raises(
            ValueError, match=r"sees the camera observation.images.top, .*has observation.image\).*rename_map"
        ):
            check_cameras(config, self.KEYS)
        check_cameras(config, [*self.KEYS, "observation.images.top"])

    def test_renaming_counts(self) -> None:
        config = ACTConfig(input_features={"observation.images.top": CAMERA})
        check_cameras(config, self.KEYS, {"observation.image": "observation.images.top"})
        with pytest.raises(ValueError, match=r"sees the camera observation.images.top"):
            check_cameras(config, self.KEYS, {"observation.state": "observation.images.top2"})

    def test_a_dataset_without_cameras(self) -> None:
        config = ACTConfig(input_features={"observation.image": CAMERA})
        with pytest.raises(ValueError, match=r"it has none"):
            check_cameras(config, ["observation.state", "action"])

    def test_smolvla_fills_some_but_not_all_cameras(self) -> None:
        names = ("observation.image", "observation.images.wrist", "observation.images.empty_camera_0")
        config = SmolVLAConfig(input_features=dict.fromkeys(names, CAMERA))
        check_cameras(config, self.KEYS)
        with pytest.raises(ValueError, match=r"observation.image, observation.images.wrist"):
            check_cameras(config, ["observation.images.other"])


class TestBeforeTraining:
    """The trainer refuses them when it is built."""

    @pytest.mark.full
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"consequence_offset": 40}, r"No chunk .* has a recorded consequence"),
            ({"consequence_offset": 41}, r"No chunk .* has a recorded consequence"),
        ],
    )
    def test_no_future(self, points: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        args = PTRTrainingArguments(output_dir=str(tmp_path), preset="ptr", report_to="none", use_cpu=True, **settings)
        with pytest.raises(ValueError, match=message):
            PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)

    @pytest.mark.full
    def test_a_dataset_without_the_policys_camera(self, points: Path, short: Path, tmp_path: Path) -> None:
        args = PTRTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        for train, evaluation in ((short, None), (points, short)):
            with pytest.raises(ValueError, match=r"sees the camera observation.image, which the dataset lacks"):
                PTRTrainer(base_policy("smolvla", points), args, train_dataset=train, eval_dataset=evaluation)
