"""The fast Meta-World scene is LeRobot's environment at another size, and its recordings are reproducible."""

import os
import runpy
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.configs import MetaworldEnv as LeRobotMetaworldConfig
from lerobot.envs.metaworld import MetaworldEnv as LeRobotMetaworldEnv
from lerobot.envs.utils import preprocess_observation
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.experts import record_demonstrations, record_expert, similar_instructions
from ptr_hf.data.demonstrations import CLEAN, bundled_demonstrations, load_truth
from ptr_hf.envs.metaworld import FPS, MetaworldScene, instruction

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmarks" / "record_demonstrations.py"
TASKS = ("reach-v3", "push-v3", "pick-place-v3", "faucet-open-v3", "faucet-close-v3")


@pytest.mark.parametrize("task", ["push-v3", "faucet-close-v3"])
def test_the_expert_succeeds_and_the_recording_goes_on_past_success(task: str) -> None:
    scene = MetaworldScene(task)
    first = record_expert(scene, seed=3, images=False)
    assert first is not None
    assert scene.success
    assert first.episode.length - 1 - first.success_step == 20
    assert np.abs(first.episode.actions).max() <= 1.0
    other = record_expert(scene, seed=4, images=False)
    again = record_expert(scene, seed=3, images=False)
    assert other is not None
    assert again is not None
    for key, stream in first.episode.frames.items():
        np.testing.assert_array_equal(stream, again.episode.frames[key])
    assert not np.array_equal(first.episode.actions[:40], other.episode.actions[:40])


def test_an_expert_that_runs_out_of_steps_gives_no_recording() -> None:
    scene = MetaworldScene("reach-v3")
    assert record_expert(scene, seed=0, max_steps=20, images=False) is None
    with pytest.raises(RuntimeError, match="solved only 0 of 4 scenes of 'reach-v3'"):
        record_demonstrations(scene, 2, 0, max_steps=20, images=False)


def test_the_bundled_episodes_come_out_of_the_simulator() -> None:
    """One clean episode of each scene, recorded again: same states and actions, up to the simulator's own version."""
    path = bundled_demonstrations("train")
    dataset = LeRobotDataset(path.name, root=path, video_backend="pyav")
    truth = load_truth(path)
    clean = [source for record, source in zip(truth.records, truth.sources, strict=True) if record.kind == CLEAN]
    for task in ("reach-v3", "faucet-open-v3"):
        source = next(source for source in clean if source.environment == task)
        recording = record_expert(MetaworldScene(task), source.environment_seed, images=False)
        assert recording is not None
        assert recording.success_step == source.success_step
        row = dataset.meta.episodes[source.episode_index]
        stored = dataset.hf_dataset.select(range(row["dataset_from_index"], row["dataset_to_index"]))
        for key in ("observation.state", "action"):
            bundled = torch.stack(list(stored[key])).numpy()
            np.testing.assert_allclose(bundled, recording.episode.frames[key], atol=2e-3)


@pytest.mark.full
def test_observations_are_those_of_lerobots_environment() -> None:
    """Same seed, same actions: equal states, and equal images up to shadows, antialiasing and the marker's colour."""
    ours = MetaworldScene("push-v3", goal_color=None)
    ours.reset_physics(seed=11)
    actions = []
    for _ in range(8):
        actions.append(ours.expert_action())
        ours.step_physics(actions[-1])
    theirs = LeRobotMetaworldEnv("push-v3", obs_type="pixels_agent_pos")
    try:
        assert ours.task_description == theirs.task_description
        # LeRobot's environment renders into whatever context is current, so it goes first.
        theirs_first, _ = theirs.reset(seed=11)
        expected, *_ = [theirs.step(action) for action in actions][-1]
        ours_first, _ = ours.reset(seed=11)
        observed, *_ = [ours.step(action) for action in actions][-1]
        np.testing.assert_array_equal(ours_first["agent_pos"], theirs_first["agent_pos"])
        np.testing.assert_array_equal(observed["agent_pos"], expected["agent_pos"])
        theirs_small = adaptive_avg_pool2d(torch.tensor(expected["pixels"].copy()).permute(2, 0, 1).float(), 84)
        reference = theirs_small.permute(1, 2, 0).numpy()
        assert np.abs(reference - observed["pixels"]).mean() < 3.0
        assert np.abs(reference[::-1] - observed["pixels"]).mean() > 20.0
        assert set(preprocess_observation(observed)) == {"observation.image", "observation.state"}
        assert LeRobotMetaworldConfig().fps == FPS == ours.metadata["render_fps"]
    finally:
        ours.close()
        theirs.close()


def test_scenes_of_different_tasks_do_not_disturb_each_other() -> None:
    """Two rendering contexts in one process: every image is the one its scene gives alone."""
    reach, faucet = MetaworldScene("reach-v3"), MetaworldScene("faucet-open-v3")
    try:
        first, _ = reach.reset(seed=1)
        other, _ = faucet.reset(seed=1)
        np.testing.assert_array_equal(reach.render(), first["pixels"])
        np.testing.assert_array_equal(faucet.render(), other["pixels"])
        assert np.abs(first["pixels"].astype(float) - other["pixels"]).mean() > 3.0
    finally:
        reach.close()
        faucet.close()


@pytest.mark.full
def test_reach_and_pick_place_look_alike() -> None:
    """On the same seed the instruction alone tells the tasks apart; with Meta-World's marker colours the image does."""
    alike, different = [], []
    for task in ("reach-v3", "pick-place-v3"):
        for color, images in (((0.0, 0.8, 0.0, 1.0), alike), (None, different)):
            scene = MetaworldScene(task, goal_color=color)
            images.append(scene.reset(seed=5)[0]["pixels"].astype(int))
            scene.close()
    assert np.abs(alike[0] - alike[1]).max() <= 8
    assert np.abs(different[0] - different[1]).max() > 60


def test_step_ends_on_success_but_resets_nothing() -> None:
    scene = MetaworldScene("reach-v3", image_size=32, supersample=1, shadow_size=0)
    try:
        observation, info = scene.reset(seed=0)
        assert scene.observation_space.contains(observation)
        terminated = False
        while not terminated:
            observation, _, terminated, truncated, info = scene.step(scene.expert_action())
            assert not truncated
        assert info["is_success"]
        assert info["final_info"]["is_success"]
        hand = observation["agent_pos"]
        observation, *_ = scene.step(np.zeros(4, np.float32))
        assert np.linalg.norm(observation["agent_pos"][:3] - hand[:3]) < 0.05, "stepping on continues the episode"
    finally:
        scene.close()


def test_instructions() -> None:
    descriptions = {task: instruction(task) for task in TASKS}
    assert len(set(descriptions.values())) == len(TASKS)
    similar = similar_instructions(TASKS)
    assert set(similar) == set(descriptions.values())
    assert similar[descriptions["faucet-open-v3"]] == (descriptions["faucet-close-v3"],)
    assert set(similar[descriptions["reach-v3"]]) == {descriptions["push-v3"], descriptions["pick-place-v3"]}
    with pytest.raises(ValueError, match="no task 'juggle-v3'"):
        instruction("juggle-v3")


@pytest.mark.full
def test_the_recipe_records_both_splits_and_does_not_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"record --output_dir {tmp_path} --tasks reach-v3 push-v3 --episodes_per_task 2 --heldout_per_task 1"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--corrupted_share", "1", "--image_size", "32"])
    runpy.run_path(str(RECIPE), run_name="__main__")
    for name, count, kinds in (
        ("metaworld_uneven", 4, {"noise", "truncation", "wrong_instruction", "wrong_convention"}),
        ("metaworld_heldout", 2, {CLEAN}),
    ):
        truth = load_truth(tmp_path / name)
        assert {record.kind for record in truth.records} == kinds
        dataset = LeRobotDataset(name, root=tmp_path / name, video_backend="pyav")
        assert dataset.num_episodes == truth.num_episodes == count
        assert dataset[0]["observation.image"].shape == (3, 32, 32)
        assert all(str(tmp_path) not in file.read_text() for file in tmp_path.rglob("*.json"))
    with pytest.raises(SystemExit, match="--overwrite"):
        runpy.run_path(str(RECIPE), run_name="__main__")
