"""Several datasets as one: slots, cameras, numbers, shares, order, normalisation."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demonstrations import write_dataset
from lerobot.configs import FeatureType, NormalizationMode
from torch.utils.data import default_collate

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.data.mixture.action_space import ActionSpace
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture, resized
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.statistics import Placed, affine, mixture_statistics, pooled
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.data.segments import OBS_SOURCE, SegmentLayout

LAYOUT = SegmentLayout(
    observation_steps=None, action_steps=tuple(range(4)), segment_length=2, chunk_stride=4, consequence_offset=4
)
POINT = {
    "action": ["right_ee_delta_x", "right_ee_delta_y"],
    "state": ["right_ee_x", "right_ee_y", "environment_1", "environment_2"],
}
CAMERA = "observation.image"
SPACE = ActionSpace.standard()


@pytest.fixture(scope="module")
def metaworld() -> str:
    return str(bundled_demonstrations("heldout"))


@pytest.fixture
def content(points: Path, metaworld: str) -> dict[str, Any]:
    """Two robots with other actions, states, rates and picture sizes."""
    return {
        "sources": [
            {"dataset": str(points), "embodiment": POINT, "name": "points"},
            {"dataset": metaworld, "embodiment": "metaworld", "name": "arm", "episodes": [3, 1]},
        ]
    }


def opened(content: dict[str, Any], **kwargs: Any) -> Mixture:
    return Mixture(MixtureMetadata.read(MixtureConfig.from_dict(content)), LAYOUT, **kwargs)


class TestSamples:
    def test_values_lie_in_their_slots_and_nowhere_else(self, content: dict[str, Any], points: Path) -> None:
        mixture, alone = opened(content), open_dataset(points, LAYOUT)
        sample, own = mixture[7], alone[7]
        at = SPACE.positions(POINT["action"])
        assert sample["action"].shape == (8, 200)
        assert torch.equal(sample["action"][:, list(at)], own["action"])
        rest = [slot for slot in range(200) if slot not in at]
        assert not sample["action"][:, rest].any()
        assert torch.equal(
            sample["observation.state"][:, list(SPACE.positions(POINT["state"]))], own["observation.state"]
        )
        assert sample["observation.state"].count_nonzero() <= own["observation.state"].numel()

    def test_a_sample_says_where_it_is_from(self, content: dict[str, Any]) -> None:
        mixture = opened(content)
        first, last = mixture[0], mixture[len(mixture) - 1]
        assert (int(first[OBS_SOURCE]), first["source"], first["embodiment"]) == (0, "points", "points")
        assert (int(last[OBS_SOURCE]), last["source"], last["embodiment"]) == (1, "arm", "metaworld")
        # four episodes of points come first; episodes 1 and 3 of the arm are read
        assert int(last["episode_index"]) == 4 + 3
        assert int(mixture[112]["episode_index"]) == 4 + 1

    def test_numbers_run_through_all_sources(self, content: dict[str, Any]) -> None:
        mixture = opened(content)
        episodes = mixture.meta.episodes
        lengths = np.asarray(episodes["length"])
        assert episodes["dataset_from_index"] == [0, *np.cumsum(lengths)[:-1].tolist()]
        assert set(episodes["source"][:4]) == {"points"}
        assert set(episodes["embodiment"][4:]) == {"metaworld"}
        for position in (0, 60, 112, len(mixture) - 1):
            sample = mixture[position]
            first = episodes["dataset_from_index"][int(sample["episode_index"])]
            assert int(sample["index"]) == first + int(sample["frame_index"])
        for _, first, length in mixture.episode_spans():
            assert len({int(mixture[position]["episode_index"]) for position in (first, first + length - 1)}) == 1

    def test_instructions_are_shared_and_renamed(self, content: dict[str, Any]) -> None:
        content["sources"][0]["tasks"] = {"reach the goal": "Reach a goal position"}
        mixture = opened(content)
        index = mixture.meta.tasks["task_index"]
        sample = mixture[40]
        assert sample["task"] == "Reach a goal position"
        assert int(sample["task_index"]) == index["Reach a goal position"]
        assert len(index) == len(set(index))
        assert mixture.meta.episodes["tasks"][1] == ["Reach a goal position"]

    @pytest.mark.full
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_batch_keeps_the_order_that_was_asked_for(self, content: dict[str, Any], in_memory: bool) -> None:
        mixture = opened(content, in_memory=in_memory)
        places = [len(mixture) - 1, 3, 115, 0, -2]
        batch, samples = mixture.__getitems__(places), [mixture[place] for place in places]
        expected = default_collate(samples)
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value

    @pytest.mark.full
    def test_one_source_is_the_same_alone_and_in_a_mixture(self, content: dict[str, Any]) -> None:
        together = opened(content)
        alone = opened({"sources": content["sources"][:1], "image_size": [32, 32]})
        for place in (0, 33, 111):
            mine, theirs = alone[place], together[place]
            shared = set(mine) & set(theirs) - {"task_index"}
            assert {"action", "observation.state", CAMERA, "index", "episode_index", "task"} <= shared
            for key in shared:
                value = mine[key]
                assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]

    def test_positions_outside_are_refused(self, content: dict[str, Any]) -> None:
        mixture = opened(content)
        with pytest.raises(IndexError, match=r"has positions 0 to"):
            mixture[len(mixture)]


class TestCameras:
    @pytest.mark.full
    def test_all_pictures_get_one_size(self, content: dict[str, Any]) -> None:
        batch = opened(content).__getitems__([0, 115])
        assert batch[CAMERA].shape == (2, 3, 3, 32, 32)
        assert batch[CAMERA].dtype == torch.uint8
        content["image_size"] = [40, 60]
        assert opened(content).__getitems__([0, 115])[CAMERA].shape == (2, 3, 3, 40, 60)

    def test_proportions_are_kept(self) -> None:
        frames = torch.full((2, 3, 20, 40), 200, dtype=torch.uint8)
        small = resized(frames, (20, 20))
        assert (small[:, :, 5:15] == 200).all()
        assert not small[:, :, :5].any()
        assert not small[:, :, 15:].any()
        assert torch.equal(resized(frames, (20, 40)), frames)

    @pytest.mark.full
    def test_a_camera_that_a_robot_lacks_is_black_and_marked(self, content: dict[str, Any]) -> None:
        content["sources"][1]["rename"] = {CAMERA: "observation.images.wrist"}
        batch = opened(content).__getitems__([0, 115])
        assert batch[CAMERA + "_padding_mask"].tolist() == [True, False]
        assert batch["observation.images.wrist_padding_mask"].tolist() == [False, True]
        assert not batch[CAMERA][1].any()
        assert batch["observation.images.wrist"][1].any()


class TestShares:
    def test_by_hand(self) -> None:
        sources = [{"dataset": "a/x"}, {"dataset": "a/y"}]
        assert MixtureConfig.from_dict({"sources": sources}).shares_of([100, 400]) == (0.2, 0.8)
        even = MixtureConfig.from_dict({"sources": sources, "shares": "temperature", "temperature": 2.0})
        # square roots: 10 and 20
        assert even.shares_of([100, 400]) == pytest.approx((1 / 3, 2 / 3))
        sources[0]["share"], sources[1]["share"] = 3, 1
        assert MixtureConfig.from_dict({"sources": sources}).shares_of([100, 400]) == (0.75, 0.25)


class TestStatistics:
    def test_pooled_by_hand(self) -> None:
        one = Placed.in_slots({"mean": [1.0], "std": [0.0], "min": [1.0], "max": [1.0], "count": [1]}, [0], 3)
        other = Placed.in_slots(
            {"mean": [4.0, 5.0], "std": [0.0, 2.0], "min": [4.0, 1.0], "max": [4.0, 9.0], "count": [3]}, [0, 1], 3
        )
        both = pooled([one, other])
        # slot 0 holds 1, 4, 4, 4: mean 13/4, variance 49/4 - 169/16
        assert both.values["mean"][0] == pytest.approx(3.25)
        assert both.values["std"][0] == pytest.approx((49 / 4 - 169 / 16) ** 0.5)
        assert (both.values["min"][0], both.values["max"][0]) == (1.0, 4.0)
        # slot 1 is the other's alone, slot 2 nobody's
        assert (both.values["mean"][1], both.values["std"][1]) == (5.0, 2.0)
        assert np.isnan(both.values["mean"][2])

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            (NormalizationMode.MEAN_STD, ([2.0, 0.0, 7.0], [4.0, 1.0, 1.0])),
            (NormalizationMode.MIN_MAX, ([1.0, 0.0, 7.0], [3.0, 1.0, 1.0])),
            (NormalizationMode.QUANTILES, ([2.5, 0.0, 7.0], [0.5, 1.0, 1.0])),
            (NormalizationMode.IDENTITY, ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])),
        ],
    )
    def test_offset_and_scale_by_hand(self, mode: NormalizationMode, expected: tuple[list[float], list[float]]) -> None:
        # the second slot is unused, the last never varies
        stats = {
            "mean": [2.0, 7.0],
            "std": [4.0, 0.0],
            "min": [-2.0, 7.0],
            "max": [4.0, 7.0],
            "q01": [2.0, 7.0],
            "q99": [3.0, 7.0],
            "count": [5],
        }
        offset, scale = affine(Placed.in_slots(stats, [0, 2], 3), mode, "action")
        assert (offset.tolist(), scale.tolist()) == expected

    def test_missing_quantiles_are_named(self) -> None:
        with pytest.raises(
            ValueError, match=r"normalises action of x by QUANTILES, and its statistics have no q01, q99"
        ):
            affine(Placed({"mean": np.zeros(1)}, 1), NormalizationMode.QUANTILES, "action of x")

    def test_each_source_has_its_own(self, content: dict[str, Any]) -> None:
        modes = {FeatureType.ACTION: NormalizationMode.MEAN_STD, FeatureType.STATE: NormalizationMode.MIN_MAX}
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        own = mixture_statistics(meta, modes)
        assert not any("image" in name for name in own)
        for source in meta.sources:
            expected = torch.tensor(source.meta.stats["action"]["mean"], dtype=torch.float32)
            assert torch.equal(own["action.offset"][source.number, list(source.action)], expected)
        alone = mixture_statistics(
            MixtureMetadata.read(MixtureConfig.from_dict({"sources": content["sources"][:1]})), modes
        )
        for name, value in alone.items():
            assert torch.equal(value[0], own[name][0])

    def test_pooled_statistics_are_the_same_for_all_that_share_a_slot(self, content: dict[str, Any]) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict({**content, "statistics": "pooled"}))
        tensors = mixture_statistics(meta, {FeatureType.ACTION: NormalizationMode.MEAN_STD})
        x = SPACE.positions(["right_ee_delta_x"])[0]
        assert tensors["action.offset"][0, x] == tensors["action.offset"][1, x]
        means = [source.meta.stats["action"]["mean"][0] for source in meta.sources]
        counts = [int(source.meta.stats["action"]["count"][0]) for source in meta.sources]
        assert tensors["action.offset"][0, x].item() == pytest.approx(np.average(means, weights=counts), rel=1e-5)

    def test_a_slot_that_a_source_lacks_stays_zero_also_when_others_pool_theirs(self, content: dict[str, Any]) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict({**content, "statistics": "pooled"}))
        modes = {FeatureType.ACTION: NormalizationMode.MEAN_STD, FeatureType.STATE: NormalizationMode.MIN_MAX}
        tensors = mixture_statistics(meta, modes)
        for source in meta.sources:
            for key, used, size in (
                ("action", source.action, len(meta.space)),
                ("observation.state", source.state, len(meta.state_space)),
            ):
                lacked = [slot for slot in range(size) if slot not in used]
                assert not tensors[f"{key}.offset"][source.number, lacked].any()
                assert (tensors[f"{key}.scale"][source.number, lacked] == 1).all()


class TestStreaming:
    @pytest.mark.full
    def test_samples_are_those_of_the_mixture(self, content: dict[str, Any]) -> None:
        content |= {"streaming": True, "stream_episodes": 2, "shares": "temperature", "temperature": 100.0}
        mixture = opened(content)
        stream = StreamingMixture(mixture.meta, LAYOUT, seed=1)
        place = {int(mixture[position]["index"]): position for position in range(0, len(mixture), 5)}
        checked: Counter[str] = Counter()
        for sample in islice(stream, 120):
            position = place.get(int(sample["index"]))
            if position is None:
                continue
            checked[sample["source"]] += 1
            for key, value in mixture[position].items():
                assert torch.equal(value, sample[key]) if isinstance(value, torch.Tensor) else value == sample[key]
        assert min(checked["points"], checked["arm"]) > 3

    @pytest.mark.full
    def test_the_order_is_the_same_again_and_goes_on_after_the_end(self, content: dict[str, Any]) -> None:
        content["sources"] = [{**content["sources"][0], "episodes": [3]}]
        stream = StreamingMixture(MixtureMetadata.read(MixtureConfig.from_dict(content)), LAYOUT)
        first = [int(sample["index"]) for sample in islice(stream, 40)]
        assert first == [int(sample["index"]) for sample in islice(stream, 40)]
        # one episode of 18 frames: every frame once a pass
        assert len(set(first[:18])) == 18
        assert set(first[18:36]) == set(first[:18])
        assert first[18:36] != first[:18]


class TestWrongConfigurations:
    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"sources": []}, "needs at least one source"),
            ({"sources": [{"dataset": "a/b"}, {"dataset": "c/b"}]}, "Several sources of the mixture are called b"),
            ({"sources": [{"datset": "a/b"}]}, "datset"),
            ({"sources": [{"dataset": "a/b", "share": 1}, {"dataset": "d"}]}, "positive `share` for every source; d"),
            ({"sources": [{"dataset": "a/b", "share": 1}], "shares": "size"}, "computes the shares"),
            ({"statistics": "mean"}, "choose one of source, embodiment, pooled"),
            ({"stream_episodes": 0}, "must be positive"),
            ({"unknown": 1}, "unknown"),
        ],
    )
    def test_are_refused(self, content: dict[str, Any], change: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            MixtureConfig.from_dict({**content, **change})

    def test_names_that_the_dataset_lacks(self, content: dict[str, Any]) -> None:
        content["sources"][0]["rename"] = {"observation.images.front": "x"}
        with pytest.raises(
            ValueError, match=r"rename of the source points names 'observation.images.front'.*'observation.image'"
        ):
            opened(content)

    @pytest.mark.parametrize(
        ("episodes", "sentence"),
        [
            ([0, 99, -1], "episodes of the source points names 99, -1: give some of 0 to"),
            ([2, 0, 2], "episodes of the source points names 2: give .* each at most once"),
            ([], "episodes of the source points names none"),
        ],
    )
    def test_episodes_that_cannot_be_read(self, content: dict[str, Any], episodes: list[int], sentence: str) -> None:
        content["sources"][0]["episodes"] = episodes
        with pytest.raises(ValueError, match=sentence):
            MixtureMetadata.read(MixtureConfig.from_dict(content))

    def test_a_layout_that_does_not_fit_names_the_source(self, content: dict[str, Any]) -> None:
        content["sources"][0]["embodiment"] = "so101"
        with pytest.raises(ValueError, match=r"Source points of the mixture: .*places 6 entries"):
            opened(content)

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"There is no mixture file"):
            MixtureConfig.from_yaml(tmp_path / "no.yaml")
        (tmp_path / "list.yaml").write_text("- a\n")
        with pytest.raises(ValueError, match=r"needs a list `sources`"):
            MixtureConfig.from_yaml(tmp_path / "list.yaml")

    def test_datasets_beside_the_file_are_found(self, tmp_path: Path) -> None:
        write_dataset(tmp_path / "mine", lengths=(8,))
        (tmp_path / "mix.yaml").write_text("sources: [mine, hub/other]\n")
        config = MixtureConfig.from_yaml(tmp_path / "mix.yaml")
        assert [source.dataset for source in config.sources] == [str(tmp_path / "mine"), "hub/other"]
        assert config.names == ["mine", "other"]
        assert config.without("mine").names == ["other"]
        with pytest.raises(ValueError, match=r"has no source 'nobody'; it has mine, other"):
            config.without("nobody")
