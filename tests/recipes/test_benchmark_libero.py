"""LIBERO's experts and recorder: plans and conventions; where LIBERO is installed also its scenes, starts and operators."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from benchmarks import grid
from benchmarks.fast_writer import write_frames
from benchmarks.libero import benchmark
from benchmarks.libero.conditions import CONDITIONS, OPERATORS, Pool, condition_dataset, load_episodes
from benchmarks.libero.experts import GAIN, KINDS, Operator, downward
from benchmarks.libero.install_assets import install
from benchmarks.libero.record_libero import RecordingArguments, kinds_of, write
from benchmarks.libero.recordings import AFTER, record
from benchmarks.libero.scene import STATE_NAMES, STEP_METRES, LiberoScene, NoStartError, narrow_side
from episodes import Episode
from ptr_hf.data.demonstrations import EpisodeSource, Truth, TruthRecord, load_truth, save_truth

INSTALLED = importlib.util.find_spec("libero") is not None
needs_libero = pytest.mark.skipif(not INSTALLED, reason="LIBERO has an environment of its own")


@pytest.mark.skipif(INSTALLED, reason="LIBERO is installed here")
def test_without_libero_the_setup_says_what_to_install() -> None:
    with pytest.raises(FileNotFoundError, match=r"install recipes/benchmarks/libero/libero\.txt first"):
        install()


@given(per_task=st.integers(1, 60), share=st.floats(0.0, 1.0), kinds=st.lists(st.sampled_from(KINDS[1:]), unique=True))
@settings(max_examples=60, deadline=None)
def test_a_share_of_the_episodes_is_by_the_named_operators_in_turns(
    per_task: int, share: float, kinds: list[str]
) -> None:
    given_to = kinds_of(per_task, list(kinds), share)
    assert len(given_to) == per_task
    counts = [given_to.count(kind) for kind in kinds]
    assert sum(counts) == (round(share * per_task) if kinds else 0)
    assert not counts or max(counts) - min(counts) <= 1
    assert given_to.count("clean") == per_task - sum(counts)


def test_the_recorder_is_told_who_records_and_refuses_who_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser(RecordingArguments)
    command = ["--output_dir", "out", "--tasks", "1", "2", "--kinds", "failed_attempt", "recovery", "--share", "0.5"]
    (told,) = parser.parse_args_into_dataclasses(command)
    assert (told.tasks, told.kinds, told.share) == ([1, 2], ["failed_attempt", "recovery"], 0.5)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "out", "--kinds", "lazy"])
    assert "invalid choice: 'lazy'" in capsys.readouterr().err


@given(angle=st.floats(-np.pi, np.pi), long=st.floats(0.03, 0.1), short=st.floats(0.01, 0.025))
@settings(max_examples=40, deadline=None)
def test_the_narrow_side_of_a_box_is_found(angle: float, long: float, short: float) -> None:
    corners = np.array([[x, y, z] for x in (-long, long) for y in (-short, short) for z in (0.0, 0.02)])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    found = narrow_side(corners @ turn.T)
    assert abs(found @ turn[:, 1]) > np.cos(np.deg2rad(5.1))  # directions are tried in steps of 5 degrees


def test_the_hand_points_down_and_opens_along_the_angle() -> None:
    rotation = downward(0.3)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation[:, 2], [0, 0, -1])
    np.testing.assert_allclose(rotation[:, 0], [np.cos(0.3), np.sin(0.3), 0])


def test_a_long_way_is_cut_without_bending_it() -> None:
    action = Operator._action(np.array([0.3, -0.15, 0.0]), np.zeros(3), 1.0)
    np.testing.assert_allclose(action, [1.0, -0.5, 0.0, 0, 0, 0, 1.0])
    near = Operator._action(np.array([0.01, 0.0, 0.0]), np.zeros(3), -1.0)
    assert near[0] == pytest.approx(GAIN * 0.01 / STEP_METRES)


# ---- conditions and the table ------------------------------------------------------------------------------------------

POOL = Pool(tasks=(0, 1), recorded=16, used=8)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of motions that no simulator made: per task 8 by the expert and 8 by the other operators, of 20 to 35 steps."""
    folder = tmp_path_factory.mktemp("libero")
    rng = np.random.default_rng(0)
    episodes, records, sources = [], [], []
    for number in range(32):
        task, steps = f"pick up thing {number // 16}", 20 + number % 16
        state = rng.normal(size=(steps, len(STATE_NAMES) + 10)).astype(np.float32)
        action = rng.uniform(-0.9, 0.9, (steps, 7)).astype(np.float32)
        episodes.append(Episode({"observation.state": state, "action": action}, task))
        kind = "clean" if number % 2 else OPERATORS[number // 2 % len(OPERATORS)]
        records.append(TruthRecord(number, kind, task, task))
        sources.append(EpisodeSource(number, f"libero_object/{number // 16}", number, steps, steps))
    write_frames(folder / "pool" / "training", episodes, 20)
    save_truth(folder / "pool" / "training", Truth(tuple(records), tuple(sources)))
    return folder


def test_faults_change_labels_and_say_so(workspace: Path) -> None:
    folder = condition_dataset(POOL, workspace, "combined", 3)
    recorded = {
        item.frames["observation.state"][0].tobytes(): item for item in load_episodes(workspace / "pool/training")
    }
    kinds = load_truth(folder).kinds()
    episodes = load_episodes(folder)
    assert len(episodes) == len(kinds) == 16
    found = {kind: sum(kind in own for own in kinds.values()) for kind in CONDITIONS["combined"].faults}
    assert found == {"noise": 5, "truncation": 4, "wrong_instruction": 3}
    for number, episode in enumerate(episodes):
        original, done = recorded[episode.frames["observation.state"][0].tobytes()], kinds[number].split("+")
        steps = episode.length
        assert (steps < original.length) == ("truncation" in done)
        assert (episode.task != original.task) == ("wrong_instruction" in done)
        assert (episode.actions != original.actions[:steps]).any() == ("noise" in done)
        np.testing.assert_array_equal(episode.frames["observation.state"], original.frames["observation.state"][:steps])


def test_operators_take_their_share_of_every_task_and_seeds_choose_others(workspace: Path) -> None:
    pool = Pool(tasks=(0, 1), recorded=16, used=5)
    one, other = (condition_dataset(pool, workspace, "failed_attempts", seed) for seed in (0, 1))
    episodes = load_episodes(one)
    kinds = load_truth(one).kinds()
    for task in ("pick up thing 0", "pick up thing 1"):
        own = [kinds[number] for number, episode in enumerate(episodes) if episode.task == task]
        assert sorted(own) == ["clean"] * 3 + ["failed_attempt"] * 2
    assert [e.length for e in episodes] != [e.length for e in load_episodes(other)]
    with pytest.raises(
        ValueError, match="4 episodes of kind 'hesitation' are needed of libero_object/0; 3 are recorded"
    ):
        condition_dataset(Pool(used=10), workspace, "hesitation", 0)


def test_a_blind_policy_reads_the_robot_alone(workspace: Path) -> None:
    folder = condition_dataset(POOL, workspace, "clean", 0, blind=True)
    seeing = load_episodes(condition_dataset(POOL, workspace, "clean", 0))
    for blind, whole in zip(load_episodes(folder), seeing, strict=True):
        np.testing.assert_array_equal(blind.frames["observation.state"], whole.frames["observation.state"][:, :8])
    assert set(load_truth(folder).kinds().values()) == {"clean"}


def test_the_table_pairs_seeds(tmp_path: Path) -> None:
    results = tmp_path / "libero_states.csv"
    for seed, (sft, offline) in enumerate([(0.5, 0.75), (0.25, 0.75), (0.5, 0.5)]):
        common = {"condition": "failed_attempts", "seed": seed, "commit": "abc", "command": "python"}
        rows = [{"preset": "sft", "success": sft}, {"preset": "ptr_offline", "success": offline, "auc_episode": 0.875}]
        grid.append(results, [common | row for row in rows], benchmark.COLUMNS)
    command = [sys.executable, benchmark.__file__, "--report", "--results", str(results)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "41.7 ± 8.3" in shown  # SFT
    assert "+25.0 ± 14.4" in shown  # the mean of 25, 50 and 0, and their standard deviation over √3
    assert "0.875" in shown
    assert (tmp_path / "figures" / "libero_states.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(INSTALLED, reason="LIBERO is installed here")
def test_without_libero_the_grid_says_where_its_commands_stand(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"LIBERO is not installed here.*docs/libero\.md has the commands"):
        benchmark.main(["--results", str(tmp_path / "none.csv"), "--workspace", str(tmp_path)])


# ---- with LIBERO -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soup() -> LiberoScene:
    return LiberoScene("libero_object", 0)


@pytest.fixture(scope="module")
def bowl() -> LiberoScene:
    return LiberoScene("libero_spatial", 2)


@needs_libero
def test_the_expert_solves_and_repeats_itself(soup: LiberoScene) -> None:
    one = record(soup, 3, "official")
    record(soup, 4, "official", "failed_attempt")
    again = record(soup, 3, "official")
    assert one.success_step is not None
    assert np.array_equal(one.states, again.states)
    assert np.array_equal(one.actions, again.actions)
    assert one.states.shape == (len(one.actions), 8)
    assert one.actions.shape[1:] == (7,)


@needs_libero
@pytest.mark.parametrize(
    ("task", "start"),
    [pytest.param(0, 19, id="a bowl that slips in the hand"), pytest.param(4, 2, id="a bowl near a drawer's wall")],
)
def test_the_expert_solves_what_takes_care(task: int, start: int) -> None:
    assert record(LiberoScene("libero_spatial", task), start, "official").success_step is not None


@needs_libero
@pytest.mark.parametrize("kind", KINDS)
def test_operators_do_what_they_say(bowl: LiberoScene, kind: str) -> None:
    clean, item = record(bowl, 1000, "wide"), record(bowl, 1000, "wide", kind)  # type: ignore[arg-type]
    assert clean.success_step is not None
    assert item.is_as_meant
    assert (item.success_step is None) == (kind == "failed_attempt")
    for one in (clean, item):
        opened = len(one.actions) - 1 - np.flatnonzero(one.actions[:, 6] > 0)[-1]
        assert 5 <= opened <= AFTER, "whoever has lost the object stops when the others do"
    if kind in ("hesitation", "recovery"):
        assert len(item.actions) > len(clean.actions) + 10
    if kind == "wrong_convention":
        np.testing.assert_array_equal(item.actions * np.float32([-1, -1, 1, -1, -1, 1, 1]), clean.actions)
    if kind == "failed_attempt":
        # until the bowl is let go the arm does what the clean one does, and so do the fingers; the bowl does not
        shared = clean.success_step - 10
        assert np.abs(item.states[:shared, :3] - clean.states[:shared, :3]).max() < 0.06
        assert np.abs(item.states[:shared, 6:] - clean.states[:shared, 6:]).max() < 0.005
        assert np.abs(item.objects[-1] - clean.objects[-1]).max() > 0.05


@needs_libero
def test_a_start_that_the_sampler_does_not_find_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reset = LiberoScene.reset

    def without_1000(scene: LiberoScene, start: int, *rest: str) -> None:
        if start == 1000:
            raise NoStartError(f"no start {start}")
        reset(scene, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LiberoScene, "reset", without_1000)
    write(RecordingArguments(tmp_path / "data", tasks=[0], per_task=2, track="states"))
    assert [source.environment_seed for source in load_truth(tmp_path / "data").sources] == [1001, 1002]


@needs_libero
def test_wide_starts_spread_what_lies_on_the_table(bowl: LiberoScene) -> None:
    places = []
    for start in range(6):
        bowl.reset(start, "wide")
        places.append(np.concatenate([bowl.pose(name).position[:2] for name in bowl.objects]))
        assert min(bowl.points(name)[:, 2].min() for name in bowl.objects) > 0.88, "nothing fell"
    assert np.std(places, axis=0).mean() > 0.02


@needs_libero
def test_episodes_that_take_turns_go_as_those_alone(bowl: LiberoScene) -> None:
    actions = np.clip(np.random.default_rng(0).normal(0, 0.6, (2, 20, 7)), -1, 1)
    ends = []
    for start in (7, 8):
        bowl.reset(start, "wide")
        for action in actions[start - 7]:
            bowl.step(action)
        ends.append(np.concatenate([bowl.state(), bowl.object_state()]))
    snapshots = []
    for start in (7, 8):
        bowl.reset(start, "wide")
        snapshots.append(bowl.snapshot())
    for part in (slice(0, 12), slice(12, 20)):
        for n in (0, 1):
            bowl.restore(snapshots[n])
            for action in actions[n][part]:
                bowl.step(action)
            snapshots[n] = bowl.snapshot()
            if part.stop == 20:
                np.testing.assert_allclose(np.concatenate([bowl.state(), bowl.object_state()]), ends[n], atol=1e-6)


@needs_libero
def test_looks_are_the_pictures_of_their_steps_and_stand_until_the_next(soup: LiberoScene) -> None:
    from benchmarks.libero.cameras import POSITIONS, Cameras

    with Cameras(soup, 64) as cameras:
        whole = record(soup, 5, "official", film=cameras.pictures)
        places = record(soup, 5, "official", film=cameras.positions)
        looks = cameras.looks(places.pictures[POSITIONS], 4)
    steps = len(whole.actions)
    drawn = [round(third * (steps - 1) / 3) for third in range(4)]
    for key, pictures in whole.pictures.items():
        assert looks[key].shape == pictures.shape
        for step, following in zip(drawn, [*drawn[1:], steps], strict=True):
            apart = np.abs(looks[key][step].astype(int) - pictures[step])
            assert apart.mean() < 2.0, "the same picture, but for a step of the physics"
            assert (looks[key][step:following] == looks[key][step]).all()
        assert (looks[key][drawn[0]] != looks[key][drawn[1]]).any()


@needs_libero
def test_what_was_recorded_goes_the_same_way_in_lerobots_environment(soup: LiberoScene) -> None:
    from lerobot.envs.libero import LiberoEnv

    from benchmarks.libero.cameras import CAMERAS, Cameras
    from benchmarks.libero.scene import _suite

    with Cameras(soup, 64, fast=False) as cameras:
        recorded = record(soup, 5, "official", film=cameras.pictures)
    env = LiberoEnv(
        _suite("libero_object"), 0, "libero_object", obs_type="pixels_agent_pos", hard_reset=False, episode_index=5,
        observation_width=64, observation_height=64,
    )  # fmt: skip
    observed, _ = env.reset(seed=5)
    done = False
    for step, action in enumerate(recorded.actions):
        np.testing.assert_allclose(observed["robot_state"]["eef"]["pos"], recorded.states[step, :3], atol=1e-4)
        if step % 25 == 0:
            for key, shown in zip(CAMERAS, observed["pixels"].values(), strict=True):
                apart = np.abs(shown[::-1, ::-1].astype(int) - recorded.pictures[key][step])
                assert apart.mean() < 2.0, "the same picture"
        if done:
            break
        observed, _, done, _, _ = env.step(action)
    env.close()
    assert done
