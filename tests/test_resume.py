"""A run that was killed, starved of disk space or moved continues as if nothing had happened, or says what it cannot keep."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from killed_runs import SETTINGS, Runs, kill_again_and_again
from small_policies import base_policy, tensors_equal
from starved_runs import Grades
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.checkpoints import MANIFEST_NAME, PARTIAL, checkpoints, fault, step_of
from ptr_hf.report import DYNAMICS_FILE, read_dynamics

KILLS_OF_TWO = 3
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 112,
    "metric_for_best_model": "grade",
    "greater_is_better": True,
    "load_best_model_at_end": True,
}
LAST = f"checkpoint-{SETTINGS['max_steps']}"
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")

type Undisturbed = Callable[[int], Path]


@pytest.fixture(scope="module")
def runs(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    processes = Runs(points, tmp_path_factory.mktemp("processes"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The folder of a run of as many processes that nothing has happened to, with what its ranks have seen beside it."""

    @cache
    def run(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / f"{ranks}"
        runs.finish(folder, ranks, seen=f"{folder}.seen")
        return folder

    return run


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit: policy, side pathway, optimiser, schedule, random streams, window; and every logged number."""
    names = {path.name for path in (first / LAST).iterdir()}
    assert names == {path.name for path in (second / LAST).iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "ptr_scorer.safetensors", "ptr_window_0.safetensors"} <= names
    # the arguments name the folder, and the manifest their size
    for name in names - {"training_args.json", MANIFEST_NAME}:
        assert (first / LAST / name).read_bytes() == (second / LAST / name).read_bytes(), name
    for name in ("model.safetensors", "ptr_scorer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    tables = [read_dynamics(folder / DYNAMICS_FILE).table for folder in (first, second)]
    assert len(tables[0]) == SETTINGS["max_steps"] // SETTINGS["logging_steps"]
    assert tables[0].equals(tables[1])


def unfinished(folder: Path) -> list[str]:
    """What a run has left half written."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


class TestKilled:
    def test_ten_times(self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
        killed = kill_again_and_again(runs, tmp_path / "run", ranks=1, kills=10, seed=6)
        assert len(killed) == 10
        assert sum(bool(kill["partial"]) for kill in killed) >= 2, "none hit a checkpoint that was being written"
        assert sum(kill["kind"] == "stepping" for kill in killed) >= 2
        assert_same_run(undisturbed(1), tmp_path / "run")
        assert unfinished(tmp_path / "run") == []

    @pytest.mark.parametrize("kills", [KILLS_OF_TWO, pytest.param(10, marks=pytest.mark.slow)])
    def test_one_or_both_of_two_processes(
        self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path, kills: int
    ) -> None:
        killed = kill_again_and_again(runs, tmp_path / "run", ranks=2, kills=kills, seed=2)
        assert len(killed) == kills
        assert any(kill["partial"] for kill in killed)
        assert {"rng_state_1.pth", "ptr_window_1.safetensors"} <= {p.name for p in (tmp_path / "run" / LAST).iterdir()}
        assert_same_run(undisturbed(2), tmp_path / "run")
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


class TestNoSpace:
    def test_a_full_disk_at_every_file(self, runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> None:
        """A real disk that is full from the second save on, each time in the middle of another file."""
        run = runs.start(tmp_path / "disk", disk=20_000_000, copy_to=str(tmp_path / "left"))
        (code,), text = run.wait()
        if "mount_small_disk" in text:
            pytest.skip("this kernel does not let an ordinary process mount a disk")
        assert code == 1, "the final files do not fit either, and that is an error"
        assert run.step == SETTINGS["max_steps"], "training goes on"
        files = {path.name for path in (tmp_path / "left" / "checkpoint-3").iterdir()}
        assert {name for name in files if f"full disk: {name} does not fit" in text} == files
        failed = [line for line in text.splitlines() if "could not be written: " in line and "Training goes on" in line]
        assert len(failed) == text.count("full disk: ") == SETTINGS["max_steps"] // 3 - 1
        assert all(f"the last good checkpoint is {tmp_path / 'disk' / 'checkpoint-3'}" in line for line in failed)
        assert f"The policy could not be written into {tmp_path / 'disk'}: " in text
        assert sorted(path.name for path in (tmp_path / "left").iterdir()) == ["checkpoint-3", "filler", DYNAMICS_FILE]
        (tmp_path / "left" / "filler").unlink()
        runs.finish(tmp_path / "left", resume="last")
        assert_same_run(undisturbed(1), tmp_path / "left")

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
        assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-12")


class TestOtherLayout:
    @pytest.mark.parametrize("ranks", [1, 2])
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

    def test_another_batch_or_accumulation(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer(tmp_path, points, max_steps=8, save_steps=3).train()
        keep_until(tmp_path, 3)
        resumed = trainer(tmp_path, points, max_steps=8, save_steps=3, gradient_accumulation_steps=2)
        with caplog.at_level(logging.WARNING):
            resumed.train(resume_from_checkpoint=True)
        (message,) = [record.message for record in caplog.records if "was written by" in record.message]
        assert "accumulation 1 (4 a step); this run has 1 with 4 and accumulation 2 (8 a step)" in message
        assert message.endswith(
            "Not kept: the metrics since the last log row; the position in the data (it goes on where 3 steps of the new batch "
            "would have led)."
        )
        assert resumed.state.global_step == 8
        assert resumed.policy.objective.step == 8


class StopAt(TrainerCallback):
    """Ends training after a step, as if the process had been told to."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self._step


def trainer(
    folder: Path,
    points: Path,
    family: str = "smolvla",
    stop: int = 0,
    grades: dict[int, float] | None = None,
    **settings: Any,
) -> PTRTrainer:
    args = PTRTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    torch.manual_seed(0)
    return PTRTrainer(
        base_policy(family, points),
        args,
        train_dataset=points,
        eval_dataset=points if grades else None,
        callbacks=[StopAt(stop), Grades(grades or {})],
    )


def keep_until(folder: Path, step: int) -> None:
    """Delete a run's later checkpoints."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            shutil.rmtree(path)


def log_rows(of: PTRTrainer) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in of.state.log_history]


ACCUMULATION = {"gradient_accumulation_steps": 5, "per_device_train_batch_size": 2, "save_steps": 1}


class TestBitForBit:
    @pytest.mark.parametrize(
        ("family", "steps", "settings"),
        [
            # 14 batches an epoch: 5 steps, the last of two batches
            (
                "smolvla",
                [4, 5, 7],
                {**ACCUMULATION, "per_device_train_batch_size": 8, "max_steps": 12, "save_steps": 1},
            ),
            (
                "smolvla",
                [3],
                {"preset": "ptr_calibrated", "num_belief_tokens": 0, "score_refresh_steps": 2, "max_steps": 8},
            ),
            ("smolvla", [3], {"preset": "sft", "num_belief_tokens": 0, "max_steps": 8}),
            ("act", [3], {"max_steps": 4}),
        ],
        ids=["accumulation over epochs", "weights per episode", "sft", "dropout of act"],
    )
    def test_any_run(self, tmp_path: Path, family: str, steps: list[int], settings: dict[str, Any]) -> None:
        points = write_dataset(tmp_path / "points", lengths=(14, 10))
        whole = trainer(tmp_path / "whole", points, family, **settings)
        whole.train()
        for step in steps:
            folder = tmp_path / f"{step}"
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
            shutil.copy(tmp_path / "whole" / DYNAMICS_FILE, folder)
            resumed = trainer(folder, points, family, **settings)
            with torch.no_grad():
                for parameter in resumed.policy.parameters():
                    parameter.zero_()
            # nor does it matter what was drawn in between
            torch.manual_seed(step)
            resumed.train(resume_from_checkpoint="last")
            assert tensors_equal(resumed.policy.state_dict(), whole.policy.state_dict()), step
            states = [of.optimizer.state_dict()["state"] for of in (resumed, whole)]
            assert states[0].keys() == states[1].keys()
            assert all(tensors_equal(states[0][number], states[1][number]) for number in states[0])
            assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
            assert log_rows(resumed) == log_rows(whole), step
            tables = [read_dynamics(place / DYNAMICS_FILE).table for place in (folder, tmp_path / "whole")]
            assert tables[0].equals(tables[1])


class TestChoice:
    @pytest.fixture(scope="class")
    def short(self, points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "short"
        trainer(folder, points, max_steps=6).train()
        return folder

    @pytest.mark.parametrize("asked", [True, "true", "True", "last"])
    def test_the_newest_that_is_whole(
        self, points: Path, short: Path, tmp_path: Path, asked: str | bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        shutil.copytree(short, tmp_path / "run")
        (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
        shutil.copytree(short / "checkpoint-3", tmp_path / "run" / "checkpoint-9")
        (tmp_path / "run" / "checkpoint-9" / "ptr_checkpoint.json").unlink()
        resumed = trainer(tmp_path / "run", points, max_steps=6)
        assert resumed.choose_checkpoint(asked) == tmp_path / "run" / "checkpoint-3"
        foreign, damaged = [record.message for record in caplog.records if "skipped" in record.message]
        assert f"{tmp_path / 'run' / 'checkpoint-9'} is skipped: it has no ptr_checkpoint.json" in foreign
        assert f"{tmp_path / 'run' / 'checkpoint-6'} is skipped: optimizer.pt has 4 bytes instead of" in damaged

    def test_a_damaged_one_gives_way_to_its_successor(self, points: Path, short: Path, tmp_path: Path) -> None:
        shutil.copytree(short, tmp_path / "run")
        (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
        trainer(tmp_path / "run", points, max_steps=6).train(resume_from_checkpoint=True)
        assert fault(tmp_path / "run" / "checkpoint-6") is None

    def test_nothing_to_resume_from(self, points: Path, short: Path, tmp_path: Path) -> None:
        started = trainer(tmp_path / "run", points, max_steps=6)
        assert started.choose_checkpoint(None) is None
        assert started.choose_checkpoint(False) is None
        assert started.choose_checkpoint("False") is None
        with pytest.raises(ValueError, match=r"nothing to resume from in .*run\. It has no checkpoint: start without"):
            started.train(resume_from_checkpoint=True)
        shutil.copytree(short / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
        (tmp_path / "run" / "checkpoint-3" / "scheduler.pt").unlink()
        with pytest.raises(ValueError, match=r"None of its 1 checkpoints is complete"):
            started.train(resume_from_checkpoint="last")
        with pytest.raises(ValueError, match=r"checkpoint-3 cannot be resumed from: scheduler.pt is missing"):
            started.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")

    def test_weights_alone_are_refused(self, points: Path, tmp_path: Path) -> None:
        trainer(tmp_path, points, max_steps=3, save_only_model=True).train()
        with pytest.raises(ValueError, match="save_only_model=True and holds no state of the optimiser"):
            trainer(tmp_path, points, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_checkpoints_of_an_earlier_run_are_named(
        self, points: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shutil.copytree(short, tmp_path / "run")
        trainer(tmp_path / "run", points, max_steps=1).train()
        assert "holds checkpoint-6, checkpoint-3 of an earlier run" in caplog.text


class TestRotationAndBest:
    SETTINGS = BEST | {"max_steps": 9, "save_total_limit": 2}
    GRADES = {3: 3.0, 6: 1.0, 9: 2.0}  # noqa: RUF012

    def test_after_resuming_in_a_folder_that_was_moved(self, points: Path, tmp_path: Path) -> None:
        whole = trainer(tmp_path / "whole", points, grades=self.GRADES, **self.SETTINGS)
        whole.train()
        trainer(tmp_path / "before", points, stop=7, grades=self.GRADES, **self.SETTINGS).train()
        (tmp_path / "before").rename(tmp_path / "after")
        resumed = trainer(tmp_path / "after", points, grades=self.GRADES, **self.SETTINGS)
        resumed.train(resume_from_checkpoint=True)
        names = [path.name for path in checkpoints(tmp_path / "whole")]
        assert names == ["checkpoint-9", "checkpoint-3"]
        assert [path.name for path in checkpoints(tmp_path / "after")] == names
        assert resumed.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-3")
        assert resumed.state.best_metric == whole.state.best_metric
        assert tensors_equal(resumed.policy.state_dict(), whole.policy.state_dict())
        loaded = PTRPolicy.from_pretrained(tmp_path / "after" / "checkpoint-3")
        assert tensors_equal(loaded.state_dict(), resumed.policy.state_dict())
        assert not list(tmp_path.rglob(f"*{PARTIAL}"))

    def test_a_best_that_was_deleted_is_looked_for_anew(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        stopped = trainer(tmp_path, points, stop=7, grades=self.GRADES, **self.SETTINGS)
        stopped.train()
        best = Path(stopped.state.best_model_checkpoint)
        assert step_of(best) == 3
        shutil.rmtree(best)
        resumed = trainer(tmp_path, points, grades=self.GRADES, **self.SETTINGS)
        resumed.train(resume_from_checkpoint=True)
        assert f"The best checkpoint so far, {best}, is gone" in caplog.text
        assert step_of(Path(resumed.state.best_model_checkpoint)) == 9
        assert fault(Path(resumed.state.best_model_checkpoint)) is None


@pytest.mark.slow
def test_the_recipe_after_a_kill(tmp_path: Path) -> None:
    """The demo, killed while PTR is in training: SFT is not trained again, PTR goes on."""
    recipe = Path(__file__).parents[1] / "recipes" / "train_ptr.py"
    options = f"--output_dir {tmp_path} --max_steps 8 --logging_steps 2 --save_strategy steps --save_steps 2".split()
    first = subprocess.Popen([sys.executable, str(recipe), *options], stdout=subprocess.DEVNULL)
    while not (tmp_path / "ptr" / "checkpoint-4").is_dir():
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    trained = (tmp_path / "sft" / "checkpoint-8" / "optimizer.pt").stat().st_mtime_ns
    command = [sys.executable, str(recipe), *options, "--resume_from_checkpoint", "last"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "sft" / "checkpoint-8" / "optimizer.pt").stat().st_mtime_ns == trained
    assert [step_of(path) for path in checkpoints(tmp_path / "sft")] == [8, 6, 4, 2]
    for run in ("sft", "ptr"):
        assert read_dynamics(tmp_path / run / DYNAMICS_FILE).steps(run).tolist() == [2, 4, 6, 8]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ptr"]["action loss, held-out clean episodes"] > 0
