"""Copying real small datasets with the paper's corruptions, episode by episode against the truth."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from demonstrations import write_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from stand_ins import INSTRUCTIONS, LIBERO, ROBOCASA, write_stand_in

from faults import IMAGE_KINDS, frozen, shifted
from ptr_hf.data.demonstrations import Truth, TruthRecord, load_truth

RECIPE = Path(__file__).parents[2] / "recipes" / "corrupt_dataset.py"
LENGTHS = (10, 13, 11, 12, 11, 12, 10, 13)
SHARES = ("--noise", "0.25", "--truncation", "0.25", "--wrong_instruction", "0.25")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The recipe as a module, to call its `main` without another start of Python."""
    specification = importlib.util.spec_from_file_location("corrupt_dataset", RECIPE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["corrupt_dataset"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight episodes with three cameras as video, three instructions, and columns that are neither state nor action."""
    return write_stand_in(tmp_path_factory.mktemp("source") / "kitchen", "robocasa", LENGTHS)


@pytest.fixture(scope="module")
def copied(recipe: ModuleType, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("copy") / "kitchen_combined"
    recipe.main(["--dataset", str(source), "--output_dir", str(output), *SHARES, "--noise_bounds", "-1", "1"])
    return output


def opened(path: Path) -> LeRobotDataset:
    return LeRobotDataset(path.name, root=path, video_backend="pyav", return_uint8=True)


def episodes(path: Path) -> list[dict[str, Any]]:
    """Every episode of a dataset: its instruction and its streams, frames as (steps, 3, height, width)."""
    dataset = opened(path)
    items = [dataset[index] for index in range(len(dataset))]
    found: list[dict[str, Any]] = []
    for number in range(dataset.meta.total_episodes):
        frames = [item for item in items if int(item["episode_index"]) == number]
        streams = [key for key in dataset.meta.features if key not in ("index", "episode_index", "task_index")]
        episode: dict[str, Any] = {key: np.stack([np.asarray(frame[key]) for frame in frames]) for key in streams}
        found.append(episode | {"task": {frame["task"] for frame in frames}})
    return found


@pytest.fixture(scope="module")
def pairs(source: Path, copied: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(zip(episodes(source), episodes(copied), strict=True))


@pytest.fixture(scope="module")
def truth(copied: Path) -> Truth:
    return load_truth(copied)


def same(before: dict[str, Any], after: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """Every stream is as recorded; video comes through another encoder, so it is nearly so."""
    steps = len(after["action"])
    for key in before.keys() - {"task", *but}:
        if key in ROBOCASA["cameras"]:
            difference = np.abs(after[key].astype(int) - before[key][:steps])
            assert difference.mean() < 6, key
        else:
            np.testing.assert_array_equal(after[key], before[key][:steps], err_msg=key)
    if "task" not in but:
        assert after["task"] == before["task"]


def test_the_copy_has_the_datasets_schema(source: Path, copied: Path) -> None:
    before, after = opened(source).meta, opened(copied).meta
    assert (after.fps, after.robot_type) == (before.fps, before.robot_type)
    assert set(after.video_keys) == set(before.video_keys) == set(ROBOCASA["cameras"])
    assert after.features.keys() == before.features.keys()
    for key in before.features:
        assert (after.features[key]["dtype"], tuple(after.features[key]["shape"])) == (
            before.features[key]["dtype"],
            tuple(before.features[key]["shape"]),
        )
    assert after.features["action"]["names"] == before.features["action"]["names"]
    assert not list(copied.rglob("*truth*"))


def test_each_share_is_met_exactly(truth: Truth) -> None:
    kinds = ("clean", "noise", "truncation", "wrong_instruction")
    assert {kind: len(truth.of_kind(kind)) for kind in kinds} == dict.fromkeys(kinds, 2)
    assert truth.num_episodes == len(LENGTHS)
    assert truth.plan["shares"] == {"noise": 0.25, "truncation": 0.25, "wrong_instruction": 0.25}


@pytest.mark.full
def test_clean_episodes_are_as_recorded(truth: Truth, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for record in truth.of_kind("clean"):
        before, after = pairs[record.episode_index]
        assert len(after["action"]) == len(before["action"])
        same(before, after)


def test_noise_is_on_the_actions_alone(truth: Truth, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for record in truth.of_kind("noise"):
        before, after = pairs[record.episode_index]
        same(before, after, but=("action",))
        inside = np.abs(after["action"]) < 1
        assert np.abs(after["action"]).max() <= 1
        assert (after["action"] - before["action"])[inside].std() == pytest.approx(0.1, rel=0.2)


def test_truncation_keeps_the_beginning(truth: Truth, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for record in truth.of_kind("truncation"):
        before, after = pairs[record.episode_index]
        steps = len(after["action"])
        assert 0.4 * len(before["action"]) <= steps <= 0.7 * len(before["action"])
        assert record.parameters == {"steps": steps, "recorded_steps": len(before["action"])}
        same(before, after)


def test_a_wrong_instruction_is_another_tasks(truth: Truth, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for record in truth.of_kind("wrong_instruction"):
        before, after = pairs[record.episode_index]
        same(before, after, but=("task",))
        assert before["task"] == {record.source_task}
        assert after["task"] == {record.task} != before["task"]
        assert record.task in INSTRUCTIONS


@pytest.mark.full
def test_images_become_videos_and_the_seed_decides_everything(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_stand_in(tmp_path / "images", "libero", (10, 12, 11, 10), videos=False)
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / name), "--noise", "0.5", "--seed", seed])
    shown = capsys.readouterr()
    assert "first: 4 episodes (clean 2, noise 2); truth in" in shown.out
    assert "4/4" in shown.err
    assert len(opened(tmp_path / "first").meta.video_keys) == 2
    first, again, other = (episodes(tmp_path / name) for name in ("first", "again", "other"))
    recorded = episodes(source)
    for index, kind in enumerate(record.kind for record in load_truth(tmp_path / "first").records):
        assert (first[index]["action"] == recorded[index]["action"]).all() == (kind == "clean")
        np.testing.assert_array_equal(first[index]["action"], again[index]["action"])
    assert any((a["action"] != b["action"]).any() for a, b in zip(first, other, strict=True))
    with pytest.raises(SystemExit, match="exists; pass --overwrite"):
        recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / "first")])
    recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / "first"), "--overwrite"])
    assert {record.kind for record in load_truth(tmp_path / "first").records} == {"clean"}


def spoiled(before: dict[str, Any], record: TruthRecord) -> np.ndarray:
    """The pictures (steps, height, width, 3) that a camera should show, by the truth about an episode."""
    done = dict(record.parameters)
    shown = before[done.pop("camera")].transpose(0, 2, 3, 1)
    if record.kind == "wrong_camera":
        return before[done["shows"]].transpose(0, 2, 3, 1)
    return {"camera_moved": shifted, "frozen_frames": frozen}[record.kind](shown, **done)


@pytest.mark.full
def test_faults_of_pictures_change_one_camera_alone(recipe: ModuleType, tmp_path: Path) -> None:
    source = write_stand_in(tmp_path / "source", "libero", (12, 11, 10, 12))
    shares = [word for kind in IMAGE_KINDS for word in (f"--{kind}", "0.25")]
    recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / "copy"), *shares])
    recorded, copied = episodes(source), episodes(tmp_path / "copy")
    records = load_truth(tmp_path / "copy").records
    assert sorted(record.kind for record in records) == ["camera_moved", "clean", "frozen_frames", "wrong_camera"]
    for before, after, record in zip(recorded, copied, records, strict=True):
        for key in LIBERO["cameras"]:
            expected = before[key]
            if key == record.parameters.get("camera"):
                expected = spoiled(before, record).transpose(0, 3, 1, 2)
            distance = [np.abs(after[key].astype(int) - shown).mean() for shown in (expected, before[key])]
            assert distance[0] < 6, (record, distance)
            assert distance[0] <= distance[1], (record, distance)
        for key in before.keys() - {*LIBERO["cameras"], "task"}:
            np.testing.assert_array_equal(before[key], after[key])


def test_pictures_of_no_camera_cannot_change(recipe: ModuleType, tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "blind", (12, 12), cameras=())
    with pytest.raises(SystemExit, match="no camera to change pictures of; leave --frozen_frames out"):
        recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / "copy"), "--frozen_frames", "0.5"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--noise", "0.8", "--truncation", "0.8"], "add up to more than 1; lower them or allow overlapping"),
        (["--noise", "1.5"], "Every share lies between 0 and 1"),
        (["--noise", "0.3", "--noise_bounds", "1"], "must be two numbers"),
        (["--output_dir", "{source}", "--overwrite"], "holds the dataset itself"),
        (["--dataset", "{source}/meta"], "is no LeRobotDataset"),
    ],
)
def test_a_refusal_is_one_sentence_and_comes_first(
    recipe: ModuleType, source: Path, options: list[str], sentence: str, tmp_path: Path
) -> None:
    given = [option.replace("{source}", str(source)) for option in options]
    with pytest.raises(SystemExit, match=sentence):
        recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / "copy"), *given])
    assert not (tmp_path / "copy").exists()
    assert (source / "meta" / "info.json").is_file()


def test_one_instruction_alone_cannot_be_wrong(recipe: ModuleType, tmp_path: Path) -> None:
    source = write_stand_in(tmp_path / "single", "libero", (8, 8), videos=False, tasks=("open the drawer",))
    with pytest.raises(SystemExit, match="one instruction only"):
        recipe.main(["--dataset", str(source), "--output_dir", str(tmp_path / "copy"), "--wrong_instruction", "0.5"])


def test_help_explains_every_option(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    shown = capsys.readouterr().out
    for option in ("--dataset", "--noise", "--truncation", "--wrong_instruction", "--overlapping", "--seed"):
        assert option in shown
