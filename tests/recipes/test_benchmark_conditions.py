"""Datasets of the benchmark: what LeRobot's writer would give, with what each condition promises and nothing else changed."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from benchmarks.corruption.conditions import (
    CONDITIONS,
    Condition,
    Recordings,
    SloppyOperator,
    load_recordings,
    record_benchmark,
    save_recordings,
    similar_tasks,
    write_condition,
)
from benchmarks.corruption.recordings import ENCODER
from benchmarks.fast_writer import VideoSource, write_frames
from episodes import Episode, write_demonstrations
from ptr_hf.data.demonstrations import CLEAN, load_truth, save_truth
from ptr_hf.envs.metaworld import FPS
from ptr_hf.envs.metaworld_tasks import BenchmarkScene, task_instruction

pytestmark = pytest.mark.full

TASKS = ("reach-left", "reach-right", "push-left", "push-right")
COUNT = 10


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    recorded = record_benchmark("state", TASKS, COUNT, 700, operators=("expert", "sloppy"), progress=False)
    return save_recordings(tmp_path_factory.mktemp("state") / "recordings", recorded)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    recorded = record_benchmark("pixels", TASKS[:2], 2, 700, steps_after_success=2, progress=False)
    return save_recordings(tmp_path_factory.mktemp("pixels") / "recordings", recorded)


def opened(path: Path) -> LeRobotDataset:
    return LeRobotDataset(path.name, root=path, video_backend="pyav", return_uint8=True)


def column(path: Path, key: str) -> np.ndarray:
    return np.stack(pq.read_table(path / "data")[key].to_numpy())


def episodes_of(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    index = column(path, "episode_index")
    actions, states = column(path, "action"), column(path, "observation.state")
    return [(actions[index == episode], states[index == episode]) for episode in range(index.max() + 1)]


def synthetic(lengths: tuple[int, ...] = (7, 12, 5, 9), images: bool = False) -> list[Episode]:
    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(lengths):
        frames = {
            "observation.state": rng.normal(size=(length, 39)).astype(np.float32),
            "action": rng.normal(size=(length, 4)).astype(np.float32),
        }
        if images:
            frames["observation.image"] = np.full((length, 32, 32, 3), 20 + 30 * number, np.uint8)
            frames["observation.image"] += np.arange(length, dtype=np.uint8)[:, None, None, None]
        episodes.append(Episode(frames, f"task {number % 2}"))
    return episodes


def same_files(ours: Path, theirs: Path) -> None:
    """The same tables up to rounding in statistics, and the same information."""
    assert json.loads((ours / "meta/info.json").read_text()) == json.loads((theirs / "meta/info.json").read_text())
    for name in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        first, second = pq.ParquetFile(ours / name), pq.ParquetFile(theirs / name)
        assert first.schema_arrow.equals(second.schema_arrow)
        if name.startswith("data"):
            assert first.num_row_groups == second.num_row_groups
            assert first.read().equals(second.read())
            described = [json.loads(file.schema_arrow.metadata[b"huggingface"])["info"] for file in (first, second)]
            assert described[0]["features"] == described[1]["features"]
        else:
            for mine, other in zip(first.read().to_pylist(), second.read().to_pylist(), strict=True):
                for key, value in mine.items():
                    numbers = key.startswith("stats/")
                    assert np.allclose(value, other[key], rtol=1e-6, atol=1e-9) if numbers else value == other[key]
    mine, other = (json.loads((path / "meta/stats.json").read_text()) for path in (ours, theirs))
    assert mine.keys() == other.keys()
    for key, stats in mine.items():
        assert stats.keys() == other[key].keys()
        for name, value in stats.items():
            np.testing.assert_allclose(value, other[key][name], rtol=1e-6, atol=1e-9)


def test_the_fast_writer_gives_what_lerobots_gives(tmp_path: Path) -> None:
    names = {"action": ["x", "y", "z", "gripper"]}
    for write, name in ((write_frames, "fast/data"), (write_demonstrations, "slow/data")):
        assert write(tmp_path / name, synthetic(), FPS, names=names, robot_type="sawyer") == 4
    same_files(tmp_path / "fast/data", tmp_path / "slow/data")
    ours, theirs = opened(tmp_path / "fast/data"), opened(tmp_path / "slow/data")
    assert len(ours) == len(theirs) == 33
    for frame in (0, 6, 7, 19, 32):
        first, second = ours[frame], theirs[frame]
        assert first.keys() == second.keys()
        assert first["task"] == second["task"]
        assert all(torch.equal(first[key], second[key]) for key in first if key != "task")


def test_videos_are_linked_and_may_be_cut(tmp_path: Path) -> None:
    full = synthetic(images=True)
    write_demonstrations(tmp_path / "full", full, FPS, encoder=ENCODER)
    picked = [3, 0, 1]
    cut = [Episode({key: full[i].frames[key][:5] for key in ("observation.state", "action")}, "other") for i in picked]
    write_frames(tmp_path / "cut", cut, FPS, videos=VideoSource(tmp_path / "full", picked))
    source, dataset = opened(tmp_path / "full"), opened(tmp_path / "cut")
    assert dataset.meta.video_keys == ["observation.image"]
    assert dataset.meta.features["observation.image"] == source.meta.features["observation.image"]
    starts = source.meta.episodes["dataset_from_index"]
    for place, episode in enumerate(picked):
        for step in range(5):
            mine, theirs = dataset[5 * place + step], source[starts[episode] + step]
            assert torch.equal(mine["observation.image"], theirs["observation.image"])
            assert torch.equal(mine["observation.state"], theirs["observation.state"])
            assert mine["task"] == "other"
    assert dataset.meta.stats["observation.image"]["mean"].shape == (3, 1, 1)
    video = next((tmp_path / "cut").rglob("*.mp4"))
    assert video.stat().st_ino == next((tmp_path / "full").rglob("*.mp4")).stat().st_ino


def test_what_the_fast_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no episodes"):
        write_frames(tmp_path / "none", [], FPS)
    with pytest.raises(ValueError, match="write_demonstrations"):
        write_frames(tmp_path / "images", synthetic(images=True), FPS)
    write_frames(tmp_path / "once", synthetic(), FPS)
    with pytest.raises(FileExistsError, match="once"):
        write_frames(tmp_path / "once", synthetic(), FPS)
    write_demonstrations(tmp_path / "videos", synthetic(images=True), FPS, encoder=ENCODER)
    with pytest.raises(ValueError, match="4 episodes but videos for 1"):
        write_frames(tmp_path / "few", synthetic(), FPS, videos=VideoSource(tmp_path / "videos", [0]))
    with pytest.raises(ValueError, match="has 5 frames, not 7"):
        write_frames(tmp_path / "short", synthetic((7,)), FPS, videos=VideoSource(tmp_path / "videos", [2]))


def test_recordings_come_back_as_they_were_stored(recordings: Recordings) -> None:
    assert recordings.folder is not None
    assert recordings.tasks == TASKS
    assert recordings.operators == ("expert",) * 40 + ("sloppy",) * 40
    first = recordings.items[0]
    scene = BenchmarkScene(first.environment)
    scene.reset_physics(first.environment_seed)
    np.testing.assert_array_equal(first.episode.frames["observation.state"][0], scene.agent_pos)
    for action, state in zip(first.episode.actions, first.episode.frames["observation.state"], strict=True):
        np.testing.assert_array_equal(state, scene.agent_pos)
        scene.step_physics(action)
    assert scene.success
    assert first.episode.length == first.success_step + 21
    again = load_recordings(recordings.folder)
    assert [item.episode.task for item in again.items] == [item.episode.task for item in recordings.items]


def test_a_sloppy_operators_labels_are_what_was_executed(recordings: Recordings) -> None:
    """Slower than the expert, on the same starts, still successful, and consistent with the states that follow."""
    pairs = list(zip(recordings.of("expert"), recordings.of("sloppy"), strict=True))
    items = recordings.items
    assert all(items[a].environment_seed == items[b].environment_seed for a, b in pairs)
    expert, sloppy = (np.array([items[index].success_step for index in side]) for side in zip(*pairs, strict=True))
    assert 1.2 * expert.mean() < sloppy.mean() < 3 * expert.mean()
    item = items[pairs[0][1]]
    scene = BenchmarkScene(item.environment)
    scene.reset_physics(item.environment_seed)
    for action, state in zip(item.episode.actions, item.episode.frames["observation.state"], strict=True):
        np.testing.assert_array_equal(state, scene.agent_pos)
        scene.step_physics(action)
    assert scene.success
    pauses = (item.episode.actions[:, :3] == 0).all(1)
    assert 3 <= pauses.sum() < 0.6 * len(pauses)
    assert SloppyOperator([1]).settings["std"] == 0.8


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions(name: str, recordings: Recordings, tmp_path: Path) -> None:
    condition, folder = CONDITIONS[name], tmp_path / name
    truth = write_condition(folder, "state", name, 4, recordings)
    assert load_truth(folder) == load_truth(save_truth(tmp_path / "again", truth))
    kinds = Counter(record.kind for record in truth.records)
    minority = name == "minority"
    shares = {**condition.shares, **({"sloppy": condition.sloppy} if condition.sloppy else {})}
    exposed = 2 * COUNT if minority else 4 * COUNT
    assert {kind: number for kind, number in kinds.items() if kind != CLEAN} == {
        kind: round(share * exposed) for kind, share in shares.items()
    }
    total = 2 * COUNT + 2 * 8 if minority else 4 * COUNT
    dataset = opened(folder)
    assert dataset.num_episodes == truth.num_episodes == total
    by_record = {record.episode_index: set() for record in truth.records}
    for record in truth.records:
        by_record[record.episode_index].add(record.kind)
    originals = {(item.environment, item.environment_seed): item.episode for item in recordings.items[:40]}
    tasks = dataset.meta.episodes["tasks"]
    for source, (actions, states) in zip(truth.sources, episodes_of(folder), strict=True):
        kinds_here = by_record[source.episode_index]
        original = originals[source.environment, source.environment_seed]
        if kinds_here == {"sloppy"}:
            assert not np.array_equal(actions[:40], original.actions[:40])
            continue
        np.testing.assert_array_equal(states, original.frames["observation.state"][: len(states)])
        assert (len(states) < original.length) == ("truncation" in kinds_here)
        changed = not np.array_equal(actions, original.actions[: len(actions)])
        assert changed == bool(kinds_here & {"noise", "wrong_convention", "delay", "zeroed", "scaled"})
        assert (tasks[source.episode_index] != [original.task]) == ("wrong_instruction" in kinds_here)
        if minority and source.environment.startswith("push"):
            assert kinds_here == {CLEAN}


def test_the_seed_decides_which_episodes(recordings: Recordings, tmp_path: Path) -> None:
    truths = [write_condition(tmp_path / f"{seed}", "state", "noise", seed, recordings, 5) for seed in (0, 1)]
    again = write_condition(tmp_path / "again", "state", "noise", 0, recordings, 5)
    assert truths[0].num_episodes == 20
    assert np.array_equal(truths[0].corrupted, again.corrupted)
    assert not np.array_equal(truths[0].corrupted, truths[1].corrupted)
    np.testing.assert_array_equal(column(tmp_path / "0", "action"), column(tmp_path / "again", "action"))


def test_another_severity(recordings: Recordings, tmp_path: Path) -> None:
    mild = CONDITIONS["noise"].with_severity(noise={"std": 0.05})
    truth = write_condition(tmp_path / "mild", "state", mild, 0, recordings)
    assert truth.plan["parameters"] == {"noise": {"std": 0.05, "bounds": (-1.0, 1.0)}}
    assert {record.parameters["std"] for record in truth.of_kind("noise")} == {0.05}
    assert CONDITIONS["noise"].parameters["noise"]["std"] > 0.05


def test_pixels_keep_their_videos(pixels: Recordings, tmp_path: Path) -> None:
    half = Condition("half", "every other one cut", {"truncation": 0.5})
    truth = write_condition(tmp_path / "half", "pixels", half, 0, pixels)
    dataset, source = opened(tmp_path / "half"), opened(pixels.folder)
    assert dataset.meta.features["observation.state"]["shape"] == (4,)
    assert Counter(record.kind for record in truth.records) == {"truncation": 2, CLEAN: 2}
    for row, full in zip(dataset.meta.episodes, source.meta.episodes, strict=True):
        for offset in (0, row["length"] - 1):
            mine, theirs = dataset[row["dataset_from_index"] + offset], source[full["dataset_from_index"] + offset]
            assert torch.equal(mine["observation.image"], theirs["observation.image"])
            assert torch.equal(mine["observation.state"], theirs["observation.state"])
    scene = BenchmarkScene("reach-left", "pixels")
    image = scene.reset(seed=pixels.items[0].environment_seed)[0]["pixels"]
    scene.close()
    stored = source[0]["observation.image"].permute(1, 2, 0).numpy()
    assert np.abs(stored.astype(int) - image).mean() < 4.0


def test_alternatives_fit_the_scene() -> None:
    tasks = ("reach-left", "push-right", "faucet-open-v3", "faucet-close-v3", "drawer-close-v3")
    words = {task: task_instruction(task) for task in tasks}
    alternatives = similar_tasks(tasks)
    assert alternatives[words["reach-left"]] == (words["push-right"],)
    assert alternatives[words["faucet-open-v3"]] == (words["faucet-close-v3"],)
    assert set(alternatives[words["drawer-close-v3"]]) == set(words.values()) - {words["drawer-close-v3"]}


def test_wrong_arguments(recordings: Recordings, pixels: Recordings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no condition 'rust'"):
        write_condition(tmp_path / "a", "state", "rust", 0, recordings)
    with pytest.raises(ValueError, match="track 'state'"):
        write_condition(tmp_path / "a", "pixels", "clean", 0, recordings)
    with pytest.raises(ValueError, match="Too few recordings"):
        write_condition(tmp_path / "a", "state", "clean", 0, recordings, per_task=COUNT + 1)
    with pytest.raises(ValueError, match="needs recordings of faucet-close-v3, faucet-open-v3"):
        write_condition(tmp_path / "a", "pixels", "minority", 0, pixels)
    with pytest.raises(ValueError, match="Store recordings with images first"):
        write_condition(tmp_path / "a", "pixels", "clean", 0, replace(pixels, folder=None))
    with pytest.raises(ValueError, match=r"Unknown operators \['lazy'\]"):
        record_benchmark("state", TASKS, 1, 0, operators=("lazy",), progress=False)
    with pytest.raises(ValueError, match="Too few recordings by the sloppy"):
        write_condition(tmp_path / "a", "pixels", "sloppy", 0, pixels)
