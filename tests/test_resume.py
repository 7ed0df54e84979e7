"""A run that was killed, starved of disk space or moved continues as if nothing had happened, or says what it cannot keep."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from killed_runs import BEST, SETTINGS, Runs, kill_again_and_again
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptr_hf.report.dynamics import DYNAMICS_FILE, read_dynamics
from ptr_hf.training.checkpoint_files import MANIFEST_NAME, checkpoints, fault, step_of

pytestmark = pytest.mark.full

STEPS: int = SETTINGS["max_steps"]


type Undisturbed = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    processes = Runs(points, tmp_path_factory.mktemp("processes"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The folder of a run of as many processes that nothing has happened to, with what its ranks have seen beside it."""

    @cache
    def run(ranks: int, steps: int = STEPS) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / f"{ranks}"
        runs.finish(folder, ranks, seen=f"{folder}.seen", settings={"max_steps": steps})
        return folder

    return run


def assert_same_run(first: Path, second: Path, steps: int = STEPS) -> None:
    """Bit for bit: policy, side pathway, optimiser, schedule, random streams, window; and every logged number."""
    last = f"checkpoint-{steps}"
    names = {path.name for path in (first / last).iterdir()}
    assert names == {path.name for path in (second / last).iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "ptr_scorer.safetensors", "ptr_window_0.safetensors"} <= names
    # the arguments name the folder, and the manifest their size
    for name in names - {"training_args.json", MANIFEST_NAME}:
        assert (first / last / name).read_bytes() == (second / last / name).read_bytes(), name
    for name in ("model.safetensors", "ptr_scorer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    tables = [read_dynamics(folder / DYNAMICS_FILE).table for folder in (first, second)]
    assert len(tables[0]) == steps // SETTINGS["logging_steps"]
    assert tables[0].equals(tables[1])


def unfinished(folder: Path) -> list[str]:
    """What a run has left half written."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


class TestKilled:
    @pytest.mark.full
    def test_ten_times(self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
        killed = kill_again_and_again(runs, tmp_path / "run", ranks=1, kills=10, seed=6)
        assert len(killed) == 10
        assert sum(bool(kill["partial"]) for kill in killed) >= 2, "none hit a checkpoint that was being written"
        assert sum(kill["kind"] == "stepping" for kill in killed) >= 2
        assert_same_run(undisturbed(1), tmp_path / "run")
        assert unfinished(tmp_path / "run") == []

    @pytest.mark.parametrize(("kills", "steps"), [(2, 24), pytest.param(10, STEPS, marks=pytest.mark.full)])
    def test_one_or_both_of_two_processes(
        self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path, kills: int, steps: int
    ) -> None:
        killed = kill_again_and_again(runs, tmp_path / "run", ranks=2, kills=kills, seed=2, steps=steps)
        assert len(killed) == kills
        assert any(kill["partial"] for kill in killed)
        assert {"rng_state_1.pth", "ptr_window_1.safetensors"} <= {
            path.name for path in (tmp_path / "run" / f"checkpoint-{steps}").iterdir()
        }
        assert_same_run(undisturbed(2, steps), tmp_path / "run", steps)
        assert unfinished(tmp_path / "run") == []

    def test_after_the_last_step_nothing_is_trained(self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
        """It was killed between its last checkpoint and the final files."""
        shutil.copytree(undisturbed(1), tmp_path / "run")
        (tmp_path / "run" / "model.safetensors").unlink()
        text = runs.finish(tmp_path / "run", resume="last", seen=str(tmp_path / "seen"))
        assert "train_loss" in text
        assert not (tmp_path / "seen-0").exists()
        assert_same_run(undisturbed(1), tmp_path / "run")

    def test_what_tensorboard_has_written_can_be_read(self, runs: Runs, tmp_path: Path) -> None:
        run = runs.start(tmp_path / "run", settings={"report_to": "tensorboard", "logging_steps": 1})
        run.until(lambda run: run.step >= 4)
        run.kill([0])
        run.wait()
        (events,) = (tmp_path / "run" / "runs").glob("*")
        reader = EventAccumulator(str(events))
        reader.Reload()
        assert [event.step for event in reader.Scalars("train/score")][:3] == [1, 2, 3]


class TestTwoRunsInOneFolder:
    def test_the_second_is_refused_and_leaves_the_first_alone(self, runs: Runs, tmp_path: Path) -> None:
        """With one process and with two, also while resuming; see test_run_lock.py for a first one that was killed."""
        first = runs.start(tmp_path / "run", settings={"max_steps": 30})
        first.until(lambda run: run.step >= 1)
        with first.stopped(0):
            seconds = [runs.start(tmp_path / "run", resume="last"), runs.start(tmp_path / "run", 2)]
            for second in seconds:
                codes, text = second.wait()
                sentence = (
                    f"ValueError: {tmp_path / 'run'} is being written by another run: process {first.pids[0]} on "
                )
                assert set(codes) == {1}
                assert text.count(sentence) == len(codes)
                assert "Wait until it ends, or give this run another output_dir." in text
        assert first.wait()[0] == [0]
        assert [fault(path) for path in checkpoints(tmp_path / "run")] == [None] * 10
        assert unfinished(tmp_path / "run") == []


def test_ranks_end_with_their_launcher(runs: Runs, tmp_path: Path) -> None:
    """Also one that waits for another, which is stopped here, in a collective."""
    run = runs.start(tmp_path / "run", 2, launcher=True, settings={"max_steps": 10_000, "save_total_limit": 2})
    run.until(lambda run: run.step >= 4)
    with run.stopped(2):
        run.kill([0])
        run.until(lambda run: f"The launcher of this run (process {run.pids[0]}) was killed: rank 0" in run.text)
    assert "ends without writing anything more" in run.ended()
    assert runs.ask({"do": "wait", "pids": run.pids[:1]}) == [-signal.SIGKILL]
    # nobody holds the folder any more
    text = runs.finish(tmp_path / "run", 2, "last", settings={"max_steps": run.step + 3})
    assert f"was being written by process {run.pids[1]} on " in text
    assert [fault(path) for path in checkpoints(tmp_path / "run")] == [None] * len(checkpoints(tmp_path / "run"))


class TestNoSpace:
    def test_a_full_disk_at_every_file(self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
        """A real disk that is full from the second save on, each time in the middle of another file."""
        run = runs.start(tmp_path / "disk", disk=20_000_000, copy_to=str(tmp_path / "left"))
        (code,), text = run.wait()
        if "mount_small_disk" in text:
            pytest.skip("this kernel does not let an ordinary process mount a disk")
        assert code == 1, "the final files do not fit either, and that is an error"
        assert run.step == STEPS, "training goes on"
        files = {path.name for path in (tmp_path / "left" / "checkpoint-3").iterdir()}
        assert {name for name in files if f"full disk: {name} does not fit" in text} == files
        failed = [line for line in text.splitlines() if "could not be written: " in line and "Training goes on" in line]
        assert len(failed) == text.count("full disk: ") == STEPS // 3 - 1
        assert all(f"the last good checkpoint is {tmp_path / 'disk' / 'checkpoint-3'}" in line for line in failed)
        assert f"The policy could not be written into {tmp_path / 'disk'}: " in text
        assert sorted(path.name for path in (tmp_path / "left").iterdir()) == ["checkpoint-3", "filler", DYNAMICS_FILE]
        (tmp_path / "left" / "filler").unlink()
        runs.finish(tmp_path / "left", resume="last")
        assert_same_run(undisturbed(1), tmp_path / "left")

    @pytest.mark.full
    def test_space_comes_back(self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
        """The kernel fails writes in the middle; also those of the logs."""
        limits = {"6": 600, "9": 3000, "12": 5500, "15": 10_000, "18": 600_000, "21": 1_500_000, "24": -1}
        settings = {"report_to": "tensorboard"}
        text = runs.finish(tmp_path / "run", limits=limits, settings=settings)
        assert text.count("Training goes on, and the next save tries again") == len(limits) - 1
        assert "ptr_dynamics.parquet could not be written" in text
        assert "TensorBoard's row could not be written" in text
        assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [*range(60, 21, -3), 3]
        assert_same_run(undisturbed(1), tmp_path / "run")

    def test_on_one_rank_alone(self, runs: Runs, tmp_path: Path) -> None:
        limits = {"3": 1000, "6": -1}
        text = runs.finish(tmp_path / "run", 2, limits=limits, limited_rank=1, settings={"max_steps": 9})
        assert f"{tmp_path / 'run' / 'checkpoint-3'} could not be written" in text
        assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [9, 6]
        assert [fault(path) for path in checkpoints(tmp_path / "run")] == [None, None]
        assert unfinished(tmp_path / "run") == []

    def test_a_best_model_that_was_not_written_is_not_the_best(self, runs: Runs, tmp_path: Path) -> None:
        settings = BEST | {"max_steps": 12, "save_strategy": "best"}
        text = runs.finish(
            tmp_path / "run",
            limits={"9": 600, "10": -1},
            settings=settings,
            grades={"3": 1.0, "6": 2.0, "9": 4.0, "12": 3.0},
        )
        assert "checkpoint-9 could not be written" in text
        assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [12, 6, 3]
        state = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())
        assert state["best_metric"] == 3.0, "the best of those that exist"
        assert state["best_model_checkpoint"] == "checkpoint-12", "by its name: no path of this machine goes out"


class TestOtherLayout:
    @pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
    def test_another_number_of_processes(
        self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path, ranks: int
    ) -> None:
        """As many segments a step: the data goes on where it was, and the optimiser too."""
        before = undisturbed(3 - ranks)
        shutil.copytree(before / "checkpoint-30", tmp_path / "run" / "checkpoint-30")
        size = 4 * (3 - ranks) // ranks
        settings = {"max_steps": 39, "per_device_train_batch_size": size}
        text = runs.finish(tmp_path / "run", ranks, "last", settings=settings, seen=str(tmp_path / "seen"))
        assert text.count(f"was written by {3 - ranks} process(es) with 4 segments each and accumulation 1") == 1
        assert (
            "Kept: weights, optimiser, schedule, the side pathway with its queue and controller, and the position in the data. "
            "Not kept: the random streams (each process starts a new one); the metrics since the last log row."
        ) in text

        def rows(beginning: Path | str, count: int, first: int) -> list[set[int]]:
            """The segments of every step from the given forward pass on, of all ranks together."""
            ranks_ = [Path(f"{beginning}-{rank}").read_text().splitlines()[first:] for rank in range(count)]
            return [{index for line in step for index in json.loads(line)} for step in zip(*ranks_, strict=True)]

        then, now = rows(f"{before}.seen", 3 - ranks, 30), rows(tmp_path / "seen", ranks, 0)
        assert len(now) == 9
        assert now == then[:9]
        state = json.loads((tmp_path / "run" / "checkpoint-39" / "trainer_state.json").read_text())
        losses = [row["loss"] for row in state["log_history"]]
        assert losses[-1] < losses[0], "it still learns"


@pytest.mark.full
def test_the_recipe_after_a_kill(tmp_path: Path) -> None:
    """The demo, killed while SFT is in training: PTR, which comes first, is not trained again, SFT goes on."""
    recipe = Path(__file__).parents[1] / "recipes" / "train_ptr.py"
    options = f"--output_dir {tmp_path} --max_steps 8 --logging_steps 2 --save_strategy steps --save_steps 2".split()
    options += ["--evaluation_starts", "1"]
    first = subprocess.Popen([sys.executable, str(recipe), *options], stdout=subprocess.DEVNULL)
    while not (tmp_path / "sft" / "checkpoint-4").is_dir():
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    trained = (tmp_path / "ptr_offline" / "checkpoint-8" / "optimizer.pt").stat().st_mtime_ns
    command = [sys.executable, str(recipe), *options, "--resume_from_checkpoint", "last"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "ptr_offline" / "checkpoint-8" / "optimizer.pt").stat().st_mtime_ns == trained
    assert [step_of(path) for path in checkpoints(tmp_path / "ptr_offline")] == [8, 6]
    for run in ("sft", "ptr_offline"):
        assert read_dynamics(tmp_path / run / DYNAMICS_FILE).steps(run).tolist() == [2, 4, 6, 8]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() >= {"sft", "ptr_offline"}
