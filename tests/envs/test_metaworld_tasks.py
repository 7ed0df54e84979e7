"""The benchmark's scenes: Meta-World's own physics and successes, episodes that can be put aside, tasks that look alike."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

from collections.abc import Iterator

import mujoco
import numpy as np
import pytest

from benchmarks.experts import record_expert
from ptr_hf.envs.metaworld_tasks import (
    GOAL_Y,
    PIXEL_TASKS,
    PUCK_TASKS,
    STATE_TASKS,
    BenchmarkScene,
    draw_start,
    task_instruction,
)

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def puck() -> BenchmarkScene:
    return BenchmarkScene("reach-left")


@pytest.fixture(scope="module")
def pixels() -> Iterator[dict[str, BenchmarkScene]]:
    scenes = {task: BenchmarkScene(task, "pixels") for task in ("reach-left", "faucet-open-v3", "faucet-close-v3")}
    yield scenes
    for scene in scenes.values():
        scene.close()


def actions(scene: BenchmarkScene, seed: int, count: int) -> list[np.ndarray]:
    """The expert's actions with some noise from the start of the seed, so that fingers, puck and table touch."""
    rng, taken = np.random.default_rng(seed), []
    scene.reset_physics(seed)
    for _ in range(count):
        action = np.clip(scene.expert_action() + rng.normal(0, 0.05, 4), -1, 1).astype(np.float32)
        taken.append(action)
        scene.step_physics(action)
    return taken


@pytest.mark.parametrize("task", ["pick-place-right", "push-left"])
def test_states_are_bit_for_bit_those_of_metaworlds_own_step(puck: BenchmarkScene, task: str) -> None:
    puck.select(task)
    script = actions(puck, 3, 70)
    puck.reset_physics(3)
    states = [puck._full_state()]
    for action in script:
        puck.step_physics(action)
        states.append(puck._full_state())
    assert states[-1][4:6] != pytest.approx(states[0][4:6], abs=0.05), "the puck has moved"

    reference = BenchmarkScene(task)
    reference.reset_physics(3)
    env = reference._env
    for action, expected in zip(script, states[1:], strict=True):
        state, _, _, _, info = env.step(action)
        np.testing.assert_array_equal(state[:36], expected[:36])
    if task == "pick-place-right":  # whose goal Meta-World knows too
        assert bool(info["success"]) == puck.success


@pytest.mark.parametrize("verb", ["reach", "push", "pick-place"])
def test_success_is_metaworlds(puck: BenchmarkScene, verb: str) -> None:
    """Meta-World's own task, with our target put in, calls the same steps a success."""
    puck.select(f"{verb}-left")
    script = actions(puck, 5, 75)
    stock = BenchmarkScene(f"{verb}-v3")
    stock.reset_physics(5)
    puck.reset_physics(5)
    env = stock._env
    env._target_pos = puck.target
    outcomes = []
    for action in script:
        _, solved = puck.step_physics(action)
        state = np.hstack((puck._full_state()[:36], puck.target))
        env.data.qpos[:], env.data.qvel[:] = puck._env.data.qpos, puck._env.data.qvel
        env.data.mocap_pos[:] = puck._env.data.mocap_pos
        mujoco.mj_forward(env.model, env.data)
        _, info = env.evaluate_state(state, action)
        assert bool(info["success"]) == solved
        outcomes.append(solved)
    assert not outcomes[0]
    assert outcomes[-1]


@pytest.mark.parametrize("task", ["pick-place-left", "faucet-open-v3", "door-lock-v3", "plate-slide-v3"])
def test_episodes_put_aside_go_on_as_if_nothing_had_happened(task: str) -> None:
    scene = BenchmarkScene(task)
    scripts = {seed: actions(scene, seed, 40) for seed in (1, 2)}
    alone = {}
    for seed, script in scripts.items():
        scene.reset_physics(seed)
        alone[seed] = [(scene.step_physics(action), scene._full_state().copy()) for action in script]
    fresh = BenchmarkScene(task)
    episodes = {}
    for seed in scripts:
        fresh.reset_physics(seed)
        episodes[seed] = fresh.snapshot()
    for first in range(0, 40, 8):
        for seed, script in scripts.items():
            fresh.restore(episodes[seed])
            for step in range(first, first + 8):
                outcome = fresh.step_physics(script[step])
                assert outcome == alone[seed][step][0]
                np.testing.assert_array_equal(fresh._full_state(), alone[seed][step][1])
            episodes[seed] = fresh.snapshot()
    assert fresh.steps == 40


def test_only_the_instruction_tells_the_six_tasks_apart(puck: BenchmarkScene) -> None:
    states, words = [], set()
    for task in PUCK_TASKS:
        puck.select(task)
        puck.reset_physics(8)
        states.append(puck.agent_pos)
        words.add(puck.task_description)
    assert len(words) == len(PUCK_TASKS)
    assert all(np.array_equal(states[0], state) for state in states)
    assert states[0].shape == (39,)
    np.testing.assert_allclose(states[0][36:], draw_start(8).right, rtol=1e-6)


def test_starts(puck: BenchmarkScene) -> None:
    starts = [draw_start(seed) for seed in range(200)]
    assert all(0.08 <= start.right[0] <= 0.18 for start in starts)
    assert all(GOAL_Y["train"][0] <= start.right[1] <= GOAL_Y["train"][1] for start in starts)
    assert all(np.array_equal(start.left, start.right * [-1, 1, 1]) for start in starts)
    assert all(np.linalg.norm((start.puck - start.left)[:2]) >= 0.15 for start in starts)
    other = [draw_start(seed, "pretrain") for seed in range(200)]
    assert max(start.right[1] for start in other) <= min(start.right[1] for start in starts)
    puck.select("push-left")
    puck.reset_physics(0)
    first = puck.agent_pos
    puck.reset_physics(1)
    assert not np.array_equal(first, puck.agent_pos)
    puck.reset_physics(0)
    np.testing.assert_array_equal(first, puck.agent_pos)
    np.testing.assert_array_equal(puck.target, [*draw_start(0).left[:2], 0.02])


@pytest.mark.parametrize("task", sorted({*STATE_TASKS, *PIXEL_TASKS}))
def test_experts_solve_their_tasks(task: str) -> None:
    for goals in ("train", "pretrain") if task in PUCK_TASKS else ("train",):
        scene = BenchmarkScene(task, goals=goals)
        recordings = [record_expert(scene, seed, images=False, must_stay=False) for seed in range(500, 505)]
        assert all(recording is not None for recording in recordings)
        assert all(recording.success_step < 100 for recording in recordings if recording is not None)


def test_stock_tasks_hide_their_goal_from_the_policy_alone() -> None:
    scene = BenchmarkScene("plate-slide-v3")
    scene.reset_physics(0)
    assert scene.agent_pos.shape == (39,)
    assert not scene.agent_pos[36:].any()
    assert scene._full_state()[36:].any(), "the expert sees it"
    with pytest.raises(RuntimeError, match="no target"):
        _ = scene.target


def test_the_image_shows_both_goals_whatever_the_task(pixels: dict[str, BenchmarkScene]) -> None:
    scene = pixels["reach-left"]
    images = []
    for task in PUCK_TASKS:
        scene.select(task)
        observation, _ = scene.reset(seed=4)
        images.append(observation["pixels"].astype(int))
        assert scene.observation_space.contains(observation)
        assert observation["agent_pos"].shape == (4,)
    assert all(np.array_equal(images[0], image) for image in images)
    green = (images[0][..., 1] > 120) & (images[0][..., 1] > 1.5 * images[0][..., 0])
    columns = np.flatnonzero(green.any(0))
    assert green.sum() >= 8
    assert np.diff(columns).max() > 1, "two markers with something between them"


def test_faucets_look_alike(pixels: dict[str, BenchmarkScene]) -> None:
    images = [pixels[f"faucet-{way}-v3"].reset(seed=2)[0]["pixels"].astype(int) for way in ("open", "close")]
    assert np.abs(images[0] - images[1]).max() <= 8


def test_tasks_that_do_not_exist(puck: BenchmarkScene) -> None:
    with pytest.raises(ValueError, match="needs one of its own"):
        puck.select("faucet-open-v3")
    with pytest.raises(ValueError, match="no task 'juggle-v3'"):
        task_instruction("juggle-v3")
