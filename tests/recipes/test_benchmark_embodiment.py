"""The embodiment benchmark: its table, its conventions and its resume; with robosuite also its scenes and operators."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from scipy.spatial.transform import Rotation

from benchmarks import grid
from benchmarks.embodiment import benchmark, data
from benchmarks.embodiment.arms import (
    ARMS,
    EXPERT,
    MIRRORED,
    MISSES,
    ArmScene,
    Demonstration,
    EndEffector,
    Operator,
    record,
)
from benchmarks.embodiment.cameras import KEY, VIEWS, Camera
from ptr_hf.data.demonstrations import load_truth
from ptr_hf.data.mixture.action_space import ActionSpace, resolve_layout
from ptr_hf.data.mixture.metadata import MixtureMetadata

ROOT = Path(__file__).parents[2]


def row(
    preset: str, arm: str, seed: int, success: float, condition: str = "uneven", share: float = 0.5
) -> dict[str, object]:
    given = {"preset": preset, "condition": condition, "arm": arm, "seed": seed, "success": success, "share": share}
    return given | {"commit": "abc", "command": "python"}


SUCCESS = {
    # (Panda, UR5e) by seed
    "generalist_sft": {0: (0.5, 0.7), 1: (0.3, 0.5), 2: (0.4, 0.9)},
    "generalist_ptr": {0: (0.6, 0.7), 1: (0.6, 0.6), 2: (0.9, 0.8)},
    "specialist_sft": {1: (1.0, 0.0)},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "embodiment.csv"
    for preset, by_seed in SUCCESS.items():
        for seed, (panda, ur5e) in by_seed.items():
            grid.append(path, [row(preset, "Panda", seed, panda), row(preset, "UR5e", seed, ur5e)], benchmark.COLUMNS)
    return path


def test_mean_standard_error_and_paired_difference_are_those_by_hand(results: Path) -> None:
    rows = grid.read(results)
    sft = benchmark.by_seed(rows, "uneven", "generalist_sft", "Panda", "success")
    assert sft == {0: 0.5, 1: 0.3, 2: 0.4}
    # standard deviation 0.1 over sqrt(3)
    assert grid.estimate(list(sft.values())) == pytest.approx((0.4, 0.1 / math.sqrt(3), 3))
    ptr = benchmark.by_seed(rows, "uneven", "generalist_ptr", "Panda", "success")
    # differences 0.1, 0.3, 0.5: standard deviation 0.2
    assert grid.paired(ptr, sft) == pytest.approx((0.3, 0.2 / math.sqrt(3), 3))
    # over the arms first, then over the seeds: 0.6, 0.4, 0.65
    mean = benchmark.by_seed(rows, "uneven", "generalist_sft", benchmark.MEAN, "success")
    assert mean == pytest.approx({0: 0.6, 1: 0.4, 2: 0.65})


def test_a_single_seed_has_no_standard_error_and_is_paired_with_its_own(results: Path) -> None:
    rows = grid.read(results)
    one = benchmark.by_seed(rows, "uneven", "specialist_sft", "Panda", "success")
    difference = grid.paired(one, benchmark.by_seed(rows, "uneven", "generalist_sft", "Panda", "success"))
    assert (difference.mean, difference.seeds) == (pytest.approx(0.7), 1)
    assert math.isnan(difference.error)


@pytest.mark.full
def test_the_report_alone_prints_the_table(results: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "recipes/benchmarks/embodiment/benchmark.py"),
        "--report",
        "--results",
        str(results),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""}, check=False)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.replace("│", " ").split()) for line in done.stdout.splitlines()]
    assert "generalist_sft 40.0 ± 5.8 70.0 ± 11.5 55.0 ± 7.6 3" in lines
    # UR5e: differences 0, 0.1, -0.1; mean of the arms: 0.05, 0.2, 0.2
    assert "generalist_ptr +30.0 ± 11.5 +0.0 ± 5.8 +15.0 ± 5.0 3" in lines
    assert "specialist_sft +70.0 -50.0 +10.0 1" in lines


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results yet"):
        benchmark.main(["--report", "--results", str(tmp_path / "none.csv")])


def test_the_grid_goes_on_where_it_stopped(results: Path) -> None:
    done = grid.finished(grid.read(results))
    assert ("generalist_sft", "uneven", 2) in done
    asked = list(benchmark.cells(["generalist_sft", "specialist_sft"], ["uneven", "clean"], [1, 2]))
    missing = [(cell.preset, cell.condition, cell.seed) for cell in asked]
    missing = [key for key in missing if key not in done]
    assert missing == [
        ("specialist_sft", "uneven", 2),
        *((preset, "clean", seed) for seed in (1, 2) for preset in ("generalist_sft", "specialist_sft")),
    ]
    with results.open(newline="") as file:
        assert next(csv.reader(file)) == list(benchmark.COLUMNS)


def test_the_grid_has_every_preset_and_seed_once() -> None:
    cells = list(benchmark.cells(None, None, range(5)))
    assert len(set(cells)) == len(cells) == 5 * sum(map(len, benchmark.GRID.values()))
    assert all(cell.method for cell in cells)


unit = st.floats(-1.0, 1.0, width=32)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
@given(
    action=arrays(np.float64, 7, elements=unit),
    position=arrays(np.float64, 3, elements=unit),
    turn=arrays(np.float64, 3, elements=st.floats(-3.0, 3.0)),
)
@settings(max_examples=25)
def test_what_is_written_down_is_what_is_carried_out(
    arm: object, action: np.ndarray, position: np.ndarray, turn: np.ndarray
) -> None:
    convention = arm.convention  # type: ignore[attr-defined]
    carried = [f"right_ee_delta_rotation_{number}" in convention.channels for number in (1, 2, 3)]
    action[3:6] *= carried
    pose = EndEffector(position, Rotation.from_rotvec(turn).as_matrix())
    recorded = convention.encode(action, pose)
    assert recorded.shape == (len(convention.channels),)
    np.testing.assert_allclose(convention.decode(recorded, pose), action, atol=1e-9)


def test_the_arms_write_the_same_motion_differently_and_every_layout_has_slots() -> None:
    pose = EndEffector(np.array([0.1, 0.2, 1.0]), np.diag([1.0, -1.0, -1.0]))
    action = np.array([0.5, 0.25, -1.0, 0.0, 0.0, 0.0, 1.0])
    recorded = {name: arm.convention.encode(action, pose).tolist() for name, arm in ARMS.items()}
    assert recorded["Panda"] == pytest.approx([0.5, 0.25, -1.0, 1.0])
    assert recorded["Sawyer"] == pytest.approx([0.5, -0.25, 1.0, 1.0])
    assert recorded["UR5e"] == pytest.approx([0.125, 0.2125, 0.95, 0.0])
    assert recorded["IIWA"] == pytest.approx([1.25, -2.5, -5.0, -1.0])
    assert recorded["Kinova3"] == pytest.approx([0.025, 0.0125, -0.05, 0.0, 0.0, 1.0])
    space = ActionSpace.standard()
    for arm in ARMS.values():
        assert len(space.positions(arm.action_names)) == len(arm.convention.channels)
        assert len(space.positions(arm.state_names)) == arm.joints + 3 + 4 + 1 + 6


def test_too_large_a_step_is_cut() -> None:
    pose = EndEffector(np.zeros(3), np.eye(3))
    assert ARMS["UR5e"].convention.decode(np.array([3.0, -3.0, 0.0, 7.0]), pose).tolist() == [1, -1, 0, 0, 0, 0, -1]


@pytest.fixture
def small(tmp_path: Path) -> tuple[data.Pool, Path]:
    """Recordings of two arms as the recipe stores them, of made-up motion."""
    pool = data.Pool(arms=("Panda", "Sawyer"), recorded=6, used=4)
    rng = np.random.default_rng(0)
    for name in pool.arms:
        arm = ARMS[name]

        def made_up(quality: str, seed: int, arm: object = arm) -> Demonstration:
            states = rng.normal(size=(20, len(arm.state_names))).astype(np.float32)  # type: ignore[attr-defined]
            actions = rng.normal(size=(20, len(arm.action_names))).astype(np.float32)  # type: ignore[attr-defined]
            return Demonstration(states, actions, quality, seed, 12 if quality == EXPERT else None)  # type: ignore[arg-type]

        careless = [made_up(MISSES, seed) for seed in range(4)] if name == "Panda" else []
        data.save_recordings(name, pool, tmp_path, [made_up(EXPERT, seed) for seed in range(6)] + careless)
        # an episode's pictures are all of one grey, 20 n in episode n of the recordings
        greys = {n: np.full((20, 64, 64, 3), 20 * n, np.uint8) for n in range(6 + len(careless))}
        data.save_pictures(name, pool, tmp_path, greys)
    return pool, tmp_path


def test_a_condition_is_a_mixture_whose_truth_lies_beside_it(small: tuple[data.Pool, Path]) -> None:
    pool, workspace = small
    mixture = data.condition_mixture(pool, workspace, "uneven", seed=1)
    assert mixture.names == ["Panda", "Sawyer"]
    assert mixture.shares_of([100, 1]) == (0.5, 0.5)
    truths = {name: load_truth(workspace / "datasets" / f"uneven_1_{pool.used}" / name) for name in pool.arms}
    assert truths["Panda"].corrupted.sum() == 2
    assert not truths["Sawyer"].corrupted.any()
    meta = MixtureMetadata.read(mixture)
    assert meta.names == ("Panda", "Sawyer")
    for source in meta.sources:
        assert resolve_layout(None, source.meta.features).action == ARMS[source.name].action_names
    again = data.condition_mixture(pool, workspace, "uneven", seed=1)
    assert again == mixture


@pytest.mark.full
def test_with_cameras_the_same_demonstrations_are_seen(small: tuple[data.Pool, Path]) -> None:
    pool, workspace = small
    mixtures = [data.condition_mixture(pool, workspace, name, seed=1) for name in ("uneven", "uneven_cameras")]
    without, seen = (MixtureMetadata.read(mixture) for mixture in mixtures)
    assert not without.camera_keys
    assert seen.camera_keys == [KEY]
    for plain, filmed in zip(without.sources, seen.sources, strict=True):
        told = [load_truth(source.meta.root).records for source in (plain, filmed)]
        assert told[0] == told[1]
        dataset = LeRobotDataset(filmed.meta.repo_id, root=filmed.meta.root, video_backend="pyav")
        for number, record_ in enumerate(told[1]):
            # experts are recordings 0 to 5, the others follow; each has its start's number
            recording = record_.seed if record_.kind == EXPERT else 6 + record_.seed
            frame = dataset[dataset.meta.episodes[number]["dataset_from_index"] + 7]
            assert 255 * frame[KEY].mean() == pytest.approx(20 * recording, abs=3)


def test_the_seed_chooses_the_demonstrations(small: tuple[data.Pool, Path]) -> None:
    pool, workspace = small
    experts, careless = data.load_recordings("Panda", pool, workspace)
    assert (len(experts), len(careless)) == (6, 4)
    by_seed = [[(item.quality, item.seed) for item in data.chosen(experts, careless, 4, 0.5, s)] for s in range(4)]
    assert all(sum(quality != EXPERT for quality, _ in picked) == 2 for picked in by_seed)
    assert len({tuple(picked) for picked in by_seed}) > 1


def test_every_arm_is_seen_from_elsewhere() -> None:
    assert set(VIEWS) == set(ARMS)
    assert len(set(map(str, VIEWS.values()))) == len(ARMS)


# ---- with robosuite --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panda() -> ArmScene:
    pytest.importorskip("robosuite")
    return ArmScene(ARMS["Panda"])


@pytest.mark.parametrize("arm", ARMS)
def test_the_expert_lifts_the_cube_with_every_arm(arm: str) -> None:
    pytest.importorskip("robosuite")
    scene = data.shared_scene(arm)
    tries = [record(scene, seed) for seed in range(5)]
    assert sum(item.success_step is not None for item in tries) >= 4
    assert {item.states.shape[1:] for item in tries} == {(len(ARMS[arm].state_names),)}
    assert {item.actions.shape[1:] for item in tries} == {(len(ARMS[arm].action_names),)}


@pytest.mark.parametrize("arm", ARMS)
def test_what_was_recorded_lifts_the_cube_again(arm: str) -> None:
    pytest.importorskip("robosuite")
    scene = data.shared_scene(arm)
    recorded = record(scene, 7)
    scene.reset(7)
    for action in recorded.actions:
        scene.step_recorded(action)
    assert scene.success == (recorded.success_step is not None)


def test_a_camera_sees_the_cube_rise_and_disturbs_nothing(panda: ArmScene) -> None:
    with Camera(panda, VIEWS["Panda"]) as camera:
        seen, alone = record(panda, 5, camera=camera.picture), record(panda, 5)
    assert np.array_equal(seen.states, alone.states)
    assert np.array_equal(seen.actions, alone.actions)
    assert seen.pictures is not None
    assert seen.pictures.shape == (len(seen.states), 64, 64, 3)
    red = (seen.pictures[..., 0] > 120) & (seen.pictures[..., 1:] < 90).all(-1)
    heights = [np.nonzero(picture)[0].mean() for picture in (red[0], red[-1])]
    assert heights[1] < heights[0] - 5, "rows count from the top"


def test_bad_operators_do_what_they_say(panda: ArmScene) -> None:
    assert record(panda, 3, MISSES).success_step is None
    assert record(panda, 3, MIRRORED).success_step is not None
    clean, mirrored = Operator([3]), Operator([3], MIRRORED)
    action = np.array([0.5, -0.5, 1.0, 0, 0, 0, -1.0])
    assert clean.written(action).tolist() == action.tolist()
    assert mirrored.written(action).tolist() == [-0.5, 0.5, 1.0, 0, 0, 0, -1.0]


def test_episodes_that_take_turns_go_as_those_alone(panda: ArmScene) -> None:
    alone = [record(panda, seed).states for seed in (11, 12)]
    operators, snapshots, states = [], [], []
    for seed in (11, 12):
        panda.reset(seed)
        snapshots.append(panda.snapshot())
        operators.append(Operator([seed, 0]))
    for step in range(20):
        for number, operator in enumerate(operators):
            panda.restore(snapshots[number])
            states.append(np.abs(panda.state() - alone[number][step]).max())
            panda.step(operator(panda))
            snapshots[number] = panda.snapshot()
    assert max(states) < 1e-6
