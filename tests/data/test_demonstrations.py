"""The bundled demonstrations are what their truth says, load offline with LeRobot, and stay small."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from episodes import Episode, write_demonstrations
from faults import CorruptionPlan
from ptr_hf.data import demonstrations
from ptr_hf.data.demonstrations import BUNDLED, CLEAN, Truth, bundled_demonstrations, load_truth, save_truth, truth_path

CHUNK = 16
KINDS = ("noise", "truncation", "wrong_instruction", "wrong_convention")
SIMILAR = (
    {"Reach a goal position", "Push the puck to a goal", "Pick and place a puck to a goal"},
    {"Rotate the faucet counter-clockwise", "Rotate the faucet clockwise"},
)


def load(path: Path, **options: object) -> LeRobotDataset:
    return LeRobotDataset(path.name, root=path, video_backend="pyav", **options)


@pytest.fixture(scope="module")
def train() -> LeRobotDataset:
    return load(bundled_demonstrations("train"))


@pytest.fixture(scope="module")
def heldout() -> LeRobotDataset:
    return load(bundled_demonstrations("heldout"))


def episode_actions(dataset: LeRobotDataset, index: int) -> np.ndarray:
    rows = dataset.hf_dataset.select_columns("action")
    row = dataset.meta.episodes[index]
    return np.stack([np.asarray(rows[i]["action"]) for i in range(row["dataset_from_index"], row["dataset_to_index"])])


def test_everything_bundled_fits_in_eight_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) <= 8_000_000


@pytest.mark.parametrize("split", ["train", "heldout", "states"])
def test_training_folders_hold_no_truth(split: str) -> None:
    path = bundled_demonstrations(split)
    assert truth_path(path).parent == path.parent
    for file in path.rglob("*"):
        assert "truth" not in file.name
        if file.suffix in (".json", ".parquet"):
            content = file.read_bytes()
            assert not any(kind.encode() in content for kind in (*KINDS, "corrupt")), file.name


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_features_are_those_of_lerobots_metaworld(split: str, request: pytest.FixtureRequest) -> None:
    dataset = request.getfixturevalue(split)
    assert dataset.fps == 80
    assert dataset.meta.video_keys == ["observation.image"]
    item = dataset[0]
    assert item["observation.image"].shape == (3, 84, 84)
    assert item["observation.state"].shape == item["action"].shape == (4,)
    assert item["action"].dtype == item["observation.state"].dtype == torch.float32
    actions = torch.stack(list(dataset.hf_dataset["action"]))
    assert actions.abs().max() <= 1.0


def test_every_frame_decodes_and_shows_a_scene(train: LeRobotDataset) -> None:
    for index in range(0, len(train), 97):
        image = train[index]["observation.image"]
        assert 0.0 <= image.min() <= image.max() <= 1.0
        assert image.std() > 0.1
        red, green, blue = image[:, :40, :42].mean((1, 2))
        assert red > green
        assert red > blue, "the red arm comes in from the upper left"


@pytest.mark.full
def test_the_camera_follows_the_arm(train: LeRobotDataset) -> None:
    """Images belong to their states: a frame fits its own time step better than one 12 steps away."""
    for episode in (0, 3, 9):
        row = train.meta.episodes[episode]
        steps = range(row["dataset_from_index"], row["dataset_from_index"] + 30)
        images = torch.stack([train[i]["observation.image"] for i in steps])
        hands = torch.stack([train[i]["observation.state"][:3] for i in steps])
        apart = (images[12:] - images[:-12]).abs().mean((1, 2, 3))
        adjacent = (images[1:] - images[:-1]).abs().mean((1, 2, 3))
        assert apart.mean() > 2 * adjacent.mean()
        assert (hands[12:] - hands[:-12]).norm(dim=1).mean() > 0.01


def test_a_third_is_corrupted_one_of_each_kind_per_task(train: LeRobotDataset) -> None:
    truth = load_truth(bundled_demonstrations("train"))
    assert truth.num_episodes == train.num_episodes == len(truth.records)
    assert truth.corrupted.sum() * 3 == truth.num_episodes
    tasks = sorted({record.source_task for record in truth.records})
    assert len(tasks) >= 5
    cells = Counter((record.kind, record.source_task) for record in truth.records if record.kind != CLEAN)
    assert cells == {(kind, task): 1 for kind in KINDS for task in tasks}


def test_the_truth_matches_the_instructions(train: LeRobotDataset) -> None:
    for record in load_truth(bundled_demonstrations("train")).records:
        assert train.meta.episodes[record.episode_index]["tasks"] == [record.task]
        if record.kind == "wrong_instruction":
            assert record.task != record.source_task
            scene = next(scene for scene in SIMILAR if record.source_task in scene)
            assert record.task in scene, "a wrong instruction must be plausible for what the images show"
        else:
            assert record.task == record.source_task


def test_the_truth_matches_the_lengths(train: LeRobotDataset) -> None:
    truth = load_truth(bundled_demonstrations("train"))
    for record, source in zip(truth.records, truth.sources, strict=True):
        assert record.episode_index == source.episode_index
        length = train.meta.episodes[record.episode_index]["length"]
        assert source.recorded_steps - 1 - source.success_step >= CHUNK
        if record.kind == "truncation":
            assert length == record.parameters["steps"]
            assert 0.4 <= length / source.recorded_steps <= 0.7
        else:
            assert length == source.recorded_steps


def test_the_truth_matches_the_motion(train: LeRobotDataset) -> None:
    """In a clean episode the hand moves where the action points; under the wrong convention x and y go the other way."""

    def agreement(index: int) -> np.ndarray:
        row = train.meta.episodes[index]
        span = range(row["dataset_from_index"], row["dataset_to_index"])
        hands = np.stack([np.asarray(train.hf_dataset[i]["observation.state"])[:3] for i in span])
        moved = hands[4:] - hands[:-4]
        asked = episode_actions(train, index)[:-4, :3]
        return (moved * asked).sum(0)

    truth = load_truth(bundled_demonstrations("train"))
    for record in truth.records:
        aligned = agreement(record.episode_index)
        sign = -1 if record.kind == "wrong_convention" else 1
        assert sign * aligned[:2].sum() > 0, record
        assert aligned[2] > 0, record


def test_noisy_actions_are_less_smooth_than_clean_ones(train: LeRobotDataset) -> None:
    truth = load_truth(bundled_demonstrations("train"))

    def jerk(index: int) -> float:
        return float(np.median(np.abs(np.diff(episode_actions(train, index)[:, :3], n=2, axis=0))))

    noisy = [jerk(record.episode_index) for record in truth.of_kind("noise")]
    clean = [jerk(record.episode_index) for record in truth.of_kind(CLEAN)]
    assert min(noisy) > 2 * max(clean)


def test_heldout_is_clean_and_of_other_scenes(heldout: LeRobotDataset) -> None:
    truth = load_truth(bundled_demonstrations("heldout"))
    training = load_truth(bundled_demonstrations("train"))
    assert not truth.corrupted.any()
    assert truth.num_episodes == heldout.num_episodes
    assert {record.task for record in truth.records} == {record.source_task for record in training.records}
    seeds, training_seeds = ({source.environment_seed for source in item.sources} for item in (truth, training))
    assert not seeds & training_seeds
    for source in truth.sources:
        assert heldout.meta.episodes[source.episode_index]["length"] == source.recorded_steps


def test_futures_a_chunk_ahead_are_there_until_the_end(train: LeRobotDataset) -> None:
    future = load(train.root, episodes=[0], delta_timestamps={"observation.image": [0.0, CHUNK / 80]})
    row = train.meta.episodes[0]
    assert not future[row["length"] - CHUNK - 1]["observation.image_is_pad"].any()
    assert future[row["length"] - CHUNK]["observation.image_is_pad"].tolist() == [False, True]


def test_writing_and_reading_gives_the_same_episodes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clean = [
        Episode(
            {
                "action": rng.uniform(-1, 1, (length, 4)).astype(np.float32),
                "observation.image": np.tile(rng.integers(0, 256, (1, 1, 1, 3), dtype=np.uint8), (length, 64, 64, 1)),
            },
            task,
        )
        for length, task in ((12, "reach"), (9, "push"))
    ]
    plan = CorruptionPlan({"wrong_instruction": 0.5}, alternatives={"reach": ["push"], "push": ["reach"]})
    written = list(plan.apply(clean, ["reach", "push"]))
    path = tmp_path / "uneven"
    assert write_demonstrations(path, (item for item, _ in written), fps=10) == 2
    truth = Truth(tuple(record for _, records in written for record in records), plan={"seed": 0})
    assert save_truth(path, truth).parent == tmp_path
    assert load_truth(path) == truth
    assert load_truth(truth_path(path)) == truth
    dataset = load(path)
    assert [row["length"] for row in dataset.meta.episodes] == [12, 9]
    start = 0
    for item, _ in written:
        for step in range(item.length):
            frame = dataset[start + step]
            assert frame["task"] == item.task
            np.testing.assert_array_equal(frame["action"].numpy(), item.actions[step])
            color = torch.from_numpy(item.frames["observation.image"][step]).permute(2, 0, 1) / 255
            assert (frame["observation.image"] - color).abs().max() < 0.05
        start += item.length
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_demonstrations(path, clean, fps=10)
    assert write_demonstrations(path, clean[:1], fps=10, overwrite=True) == 1
    assert load(path).num_episodes == 1


def test_errors_name_the_input_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no truth sidecar data\.truth\.json"):
        load_truth(tmp_path / "data")
    with pytest.raises(ValueError, match="There are no episodes"):
        write_demonstrations(tmp_path / "empty", [], fps=10)
    content = json.loads(truth_path(bundled_demonstrations("heldout")).read_text())
    content["records"].pop(1)
    (tmp_path / "gap.truth.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leaves out episodes"):
        load_truth(tmp_path / "gap.truth.json")
    monkeypatch.setattr(demonstrations, "BUNDLED", tmp_path)
    with pytest.raises(FileNotFoundError, match="record_demonstrations"):
        bundled_demonstrations("train")
