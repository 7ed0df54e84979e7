"""The statistics that normalise a dataset: right ones stay as they are, wrong ones are computed anew or refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_frames import spoiled
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, UnnormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from small_policies import stats_of

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.data.normalization import foreign, sound_statistics
from ptr_hf.data.normalizers import check_normalizers, harmless
from ptr_hf.data.segments import SegmentLayout

PLAIN = SegmentLayout(None, (0, 1, 2, 3), 1, 4, None)
CAMERA = "observation.image"
MODES = (NormalizationMode.MEAN_STD, NormalizationMode.MIN_MAX, NormalizationMode.QUANTILES)
BAD = {
    ("observation.state", 40): np.nan,
    ("action", 71): np.inf,
    ("action", 93): -np.inf,
    ("observation.state", 29): np.nan,
}


def edited(root: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a dataset with other statistics."""
    shutil.copytree(root, folder)
    path = folder / "meta" / "stats.json"
    statistics = json.loads(path.read_text())
    change(statistics)
    path.write_text(json.dumps(statistics))
    return folder


def moved(factor: float, offset: float) -> Callable[[dict[str, Any]], None]:
    """Statistics of actions as they are in other units."""

    def change(statistics: dict[str, Any]) -> None:
        for name, value in statistics[ACTION].items():
            if name != "count":
                shift = 0.0 if name == "std" else offset
                statistics[ACTION][name] = [number * factor + shift for number in value]

    return change


def read(root: Path, mode: NormalizationMode, episodes: list[int] | None = None, camera: bool = False) -> Any:
    dataset = open_dataset(root, PLAIN, episodes=episodes)
    modes = {OBS_STATE: mode, ACTION: mode} | ({CAMERA: mode} if camera else {})
    return sound_statistics(dataset.meta, dataset, modes)


def same(first: Any, second: Any, keys: tuple[str, ...] = (OBS_STATE, ACTION), tolerance: float = 1e-3) -> bool:
    return all(np.allclose(first[key][name], second[key][name], atol=tolerance) for key in keys for name in second[key])


class TestRightOnes:
    @pytest.mark.full
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("episodes", [None, [1], [3, 0]])
    def test_they_stay_as_they_are(
        self, points: Path, mode: NormalizationMode, episodes: list[int] | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = read(points, mode, episodes, camera=True)
        recorded = LeRobotDatasetMetadata("tests/points", root=points).stats
        if mode is NormalizationMode.QUANTILES and episodes != [1]:
            # the last number of the state is the episode: LeRobot's average of the episodes' quantiles is one number
            assert recorded[OBS_STATE]["q99"][3] - recorded[OBS_STATE]["q01"][3] < 1e-8
            assert (found[OBS_STATE]["q01"][3], found[OBS_STATE]["q99"][3]) == (0.0, 3.0)
            assert "do not tell q01 from q99 in 3 (episode)" in caplog.text
            caplog.clear()
            found[OBS_STATE] |= {name: recorded[OBS_STATE][name] for name in ("q01", "q99")}
        assert all(np.array_equal(found[key][name], recorded[key][name]) for key in recorded for name in recorded[key])
        assert not [record for record in caplog.records if record.name.startswith("ptr_hf")]

    def test_those_of_bundled_demonstrations(self, caplog: pytest.LogCaptureFixture) -> None:
        for split in ("train", "heldout"):
            root = bundled_demonstrations(split)
            read(root, NormalizationMode.MEAN_STD)
        assert not [record for record in caplog.records if record.name.startswith("ptr_hf")]

    def test_an_outlier_does_not_make_them_foreign(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        read(spoiled(points, tmp_path / "huge", {("action", 40): 1e25}), NormalizationMode.MEAN_STD)
        assert not [record for record in caplog.records if record.name.startswith("ptr_hf")]

    @pytest.mark.parametrize("seed", range(3))
    def test_no_distribution_is_foreign_to_its_own(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        heavy = random.standard_cauchy((5000, 3)) * 10.0 ** random.integers(-3, 4, 3)
        rare = (random.random((5000, 2)) < 0.001).astype(float)
        values = np.concatenate(
            [heavy, rare, np.full((5000, 1), 5000.1), random.exponential(size=(5000, 1)) - 70], axis=1
        )
        known = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        assert foreign(known, values, {}, whole=True) is None
        assert foreign(known, values[:50], {}, whole=False) is None


class TestWrongOnes:
    def test_none_at_all(self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        root = edited(points, tmp_path / "bare", dict.clear)
        (root / "meta" / "stats.json").unlink()
        found = read(root, NormalizationMode.MEAN_STD, camera=True)
        recorded = LeRobotDatasetMetadata("tests/points", root=points).stats
        for key in (OBS_STATE, ACTION, CAMERA):
            assert found[key]["mean"].shape == recorded[key]["mean"].shape
            assert np.allclose(found[key]["mean"], recorded[key]["mean"], atol=1e-4)
            assert np.allclose(found[key]["std"], recorded[key]["std"], atol=1e-3)
            assert f"statistics of '{key}'" in caplog.text
        assert caplog.text.count("are missing") == 3

    @pytest.mark.full
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda known: [known[ACTION].pop(name) for name in ("q01", "q99")], "lack q01, q99"),
            (lambda known: known[ACTION].update({"q01": [0.0] * 6}), r"another shape \(q01 has 6 numbers"),
            (moved(57.3, 0.0), r"dimension 0 \(dx\)"),
            (moved(1 / 57.3, 0.0), "not of these data"),
            (moved(1.0, 3.0), "not of these data"),
            (moved(20.0, -7.0), "not of these data"),
        ],
    )
    def test_they_are_computed_anew(
        self, points: Path, tmp_path: Path, change: Any, why: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorded = LeRobotDatasetMetadata("tests/points", root=points).stats
        found = read(edited(points, tmp_path / "wrong", change), NormalizationMode.QUANTILES)
        for name in ("mean", "std", "min", "max"):
            assert np.allclose(found[ACTION][name], recorded[ACTION][name], atol=1e-4)
        assert (found[ACTION]["q01"] < found[ACTION]["q99"]).all()
        (record,) = [record for record in caplog.records if "'action'" in record.getMessage()]
        assert record.getMessage().startswith("The statistics of 'action' in meta/stats.json of")
        assert re.search(why, record.getMessage())

    def test_of_some_episodes_those_are_foreign_that_lie_elsewhere(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = read(edited(points, tmp_path / "wrong", moved(1.0, 3.0)), NormalizationMode.MEAN_STD, [0, 2])
        assert "its 70 frames" in caplog.text
        assert abs(found[ACTION]["mean"]).max() < 0.1

    def test_a_deviation_of_zero_where_the_data_vary(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = edited(points, tmp_path / "zero", lambda known: known[ACTION].update(std=[0.0, 0.01]))
        recorded = LeRobotDatasetMetadata("tests/points", root=points).stats
        assert np.allclose(read(root, NormalizationMode.MEAN_STD)[ACTION]["std"], recorded[ACTION]["std"], atol=1e-5)
        assert "dimension 0 (dx)" in caplog.text

    def test_pictures_from_0_to_255(self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def change(known: dict[str, Any]) -> None:
            for name in ("mean", "std"):
                known[CAMERA][name] = (np.asarray(known[CAMERA][name]) * 255).tolist()

        recorded = LeRobotDatasetMetadata("tests/points", root=points).stats
        found = read(edited(points, tmp_path / "bytes", change), NormalizationMode.MEAN_STD, camera=True)
        assert np.allclose(found[CAMERA]["mean"], recorded[CAMERA]["mean"], atol=1e-4)
        assert "from 0 to 255" in caplog.text

    def test_nan_as_lerobot_writes_it(self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        root = spoiled(points, tmp_path / "bad", BAD, with_statistics=True)
        dataset = open_dataset(root, PLAIN)
        assert np.isnan(dataset.meta.stats[OBS_STATE]["mean"]).any()
        found = read(root, NormalizationMode.MEAN_STD)
        state = np.stack(dataset.hf_dataset.with_format("numpy")[:][OBS_STATE])
        finite = np.delete(state, [29, 40], axis=0)
        assert np.allclose(found[OBS_STATE]["mean"], finite.mean(axis=0), atol=1e-6)
        assert np.allclose(found[OBS_STATE]["std"], finite.std(axis=0), atol=1e-5)
        assert all(np.isfinite(value).all() for value in found[ACTION].values())
        assert "those 110 of its 112 frames" in caplog.text

    def test_a_feature_without_a_finite_frame_is_refused(self, points: Path, tmp_path: Path) -> None:
        values = {(OBS_STATE, frame): np.nan for frame in range(112)}
        dataset = open_dataset(spoiled(points, tmp_path / "bad", values, with_statistics=True), PLAIN)
        with pytest.raises(ValueError, match=r"No frame of .* has a finite 'observation.state'"):
            sound_statistics(dataset.meta, dataset, {OBS_STATE: NormalizationMode.MEAN_STD})
        sound_statistics(dataset.meta, dataset, {ACTION: NormalizationMode.MEAN_STD})

    @pytest.mark.full
    def test_where_nothing_can_be_computed_the_command_works(self, points: Path, tmp_path: Path) -> None:
        root = edited(points, tmp_path / "bare", dict.clear)
        (root / "meta" / "stats.json").unlink()
        meta = LeRobotDatasetMetadata("tests/points", root=root)
        modes = {ACTION: NormalizationMode.QUANTILES, CAMERA: NormalizationMode.MEAN_STD}
        for key, mode in modes.items():
            with pytest.raises(ValueError, match=rf"'{key}' .* are missing: write them by `") as refusal:
                sound_statistics(meta, None, {key: mode})
            program, *rest = shlex.split(str(refusal.value).split("`")[1])
            if program == "lerobot-edit-dataset":
                rest = ["-c", "from lerobot.scripts.lerobot_edit_dataset import main; main()", *rest]
            subprocess.run([sys.executable, *rest], check=True)
            meta = LeRobotDatasetMetadata("tests/points", root=root)
            sound_statistics(meta, None, {key: mode})
        assert same(meta.stats, stats_of(points), (OBS_STATE, ACTION, CAMERA), tolerance=1e-2)

    def test_relative_actions_are_not_compared_with_the_columns(self, points: Path, tmp_path: Path) -> None:
        dataset = open_dataset(edited(points, tmp_path / "relative", moved(1.0, 3.0)), PLAIN)
        modes = {ACTION: NormalizationMode.MEAN_STD}
        found = sound_statistics(dataset.meta, dataset, modes, relative_actions=True)
        assert found[ACTION]["mean"][0] > 2
        dataset.meta.stats.pop(ACTION)
        with pytest.raises(ValueError, match=r"relative_action true"):
            sound_statistics(dataset.meta, dataset, modes, relative_actions=True)


@pytest.fixture(scope="module")
def still(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Actions whose first number never varies, and whose second does in one frame of a hundred."""
    folder = tmp_path_factory.mktemp("still") / "points"
    shutil.copytree(points, folder)
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    column = [[0.7, float(frame == 50)] for frame in range(table.num_rows)]
    place = table.schema.get_field_index(ACTION)
    table = table.set_column(place, table.schema.field(place), pa.array(column, table.schema.field(place).type))
    pq.write_table(table, file)
    (folder / "meta" / "stats.json").unlink()
    return folder


class TestConstants:
    @pytest.mark.full
    @pytest.mark.parametrize("mode", [*MODES, NormalizationMode.QUANTILE10])
    def test_what_does_not_vary_is_not_divided_by_nothing(
        self, still: Path, mode: NormalizationMode, caplog: pytest.LogCaptureFixture
    ) -> None:
        statistics = read(still, mode)
        features = {ACTION: PolicyFeature(FeatureType.ACTION, (2,))}
        arguments = {"features": features, "norm_map": {FeatureType.ACTION: mode}, "stats": statistics}
        raw = PolicyProcessorPipeline(steps=[NormalizerProcessorStep(**arguments)])
        pipeline = harmless(raw, LeRobotDatasetMetadata("tests/points", root=still).features)
        assert "action in 0 (dx)" in caplog.text
        values = torch.tensor([[0.7, 0.0], [0.7, 1.0], [0.9, 0.5]])
        scaled = pipeline.steps[0]._normalize_action(values, inverse=False)
        assert scaled.abs().max() < 12, "a frame in a hundred lies ten deviations off"
        assert raw.steps[0]._normalize_action(values, inverse=False).abs().max() > 1e4
        recorded = 0.0 if mode is NormalizationMode.MEAN_STD else -1.0
        assert scaled[:2, 0].tolist() == pytest.approx([recorded] * 2, abs=1e-5)
        back = UnnormalizerProcessorStep(**arguments)._normalize_action(scaled, inverse=True)
        assert torch.allclose(back[:2], values[:2], atol=1e-4)
        assert back[2].tolist() == pytest.approx([0.7, 0.5], abs=1e-3), "the robot gets the value that was recorded"
        caplog.clear()
        assert harmless(pipeline) is pipeline
        assert not [record for record in caplog.records if record.name.startswith("ptr_hf")]

    def test_what_varies_is_left_alone(self, points: Path) -> None:
        features = {OBS_STATE: PolicyFeature(FeatureType.STATE, (4,)), ACTION: PolicyFeature(FeatureType.ACTION, (2,))}
        for mode in MODES:
            modes = {FeatureType.ACTION: mode, FeatureType.STATE: mode}
            step = NormalizerProcessorStep(features=features, norm_map=modes, stats=read(points, mode))
            pipeline = PolicyProcessorPipeline(steps=[step])
            assert harmless(pipeline) is pipeline


def test_a_preprocessor_without_what_it_reads_is_refused(points: Path) -> None:
    dataset = LeRobotDataset("tests/points", root=points)
    features = {
        OBS_STATE: PolicyFeature(FeatureType.STATE, (4,)),
        CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    }
    modes = {FeatureType.STATE: NormalizationMode.MEAN_STD, FeatureType.VISUAL: NormalizationMode.IDENTITY}
    known = dataset.meta.stats[OBS_STATE]
    for statistics, why in (
        ({}, "are missing"),
        ({OBS_STATE: {"mean": known["mean"]}}, "lack std"),
        ({OBS_STATE: {**known, "std": known["std"] * np.nan}}, "are not finite"),
        ({OBS_STATE: {"mean": np.zeros(7), "std": np.ones(7)}}, "are of another shape"),
    ):
        step = NormalizerProcessorStep(features=features, norm_map=modes, stats=statistics)
        with pytest.raises(
            ValueError, match=f"normalises 'observation.state' by MEAN_STD, and its statistics of it {why}"
        ):
            check_normalizers(PolicyProcessorPipeline(steps=[step]), dataset.meta.features)
    step = NormalizerProcessorStep(features=features, norm_map=modes, stats={OBS_STATE: known})
    check_normalizers(PolicyProcessorPipeline(steps=[step]), dataset.meta.features)
