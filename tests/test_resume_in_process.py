"""Runs that are resumed in this process: to the bit whatever the settings, from the right checkpoint, in the right place."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from killed_runs import BEST, SETTINGS
from small_policies import base_policy, tensors_equal
from starved_runs import Grades
from transformers import TrainerCallback, TrainerControl, TrainerState

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.report.dynamics import DYNAMICS_FILE, read_dynamics
from ptr_hf.training.checkpoint_contents import checksums
from ptr_hf.training.checkpoint_files import MANIFEST_NAME, PARTIAL, Manifest, SaveError, checkpoints, fault, step_of
from ptr_hf.training.run_lock import LOCK_NAME, RunLock

ACCUMULATION = {"gradient_accumulation_steps": 5, "per_device_train_batch_size": 2, "save_steps": 1}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


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


def garble(path: Path) -> bytes:
    """Change bytes in the middle of a file, whose size stays; what was there."""
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(
        before[:middle] + bytes(byte ^ 0xFF for byte in before[middle : middle + 64]) + before[middle + 64 :]
    )
    return before


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._proof),)


def log_rows(of: PTRTrainer) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in of.state.log_history]


class TestBitForBit:
    @pytest.mark.parametrize(
        ("family", "steps", "settings"),
        [
            # 14 batches an epoch: 5 steps, the last of two batches
            pytest.param(
                "smolvla",
                [4, 5, 7],
                {**ACCUMULATION, "per_device_train_batch_size": 8, "max_steps": 12, "save_steps": 1},
                marks=pytest.mark.full,
            ),
            (
                "smolvla",
                [3],
                {"preset": "ptr_calibrated", "num_belief_tokens": 0, "score_refresh_steps": 2, "max_steps": 8},
            ),
            pytest.param(
                "smolvla", [3], {"preset": "sft", "num_belief_tokens": 0, "max_steps": 8}, marks=pytest.mark.full
            ),
            pytest.param("act", [3], {"max_steps": 4}, marks=pytest.mark.full),
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

    def test_the_newest_that_is_whole(
        self, points: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shutil.copytree(short, tmp_path / "run")
        (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
        shutil.copytree(short / "checkpoint-3", tmp_path / "run" / "checkpoint-9")
        (tmp_path / "run" / "checkpoint-9" / "ptr_checkpoint.json").unlink()
        resumed = trainer(tmp_path / "run", points, max_steps=6)
        for asked in (True, "true", "True", "last"):
            caplog.clear()
            assert resumed.choose_checkpoint(asked) == tmp_path / "run" / "checkpoint-3", asked
            foreign, damaged = [record.message for record in caplog.records if "skipped" in record.message]
            assert f"{tmp_path / 'run' / 'checkpoint-9'} is skipped: it has no ptr_checkpoint.json" in foreign
            assert f"{tmp_path / 'run' / 'checkpoint-6'} is skipped: optimizer.pt has 4 bytes instead of" in damaged

    @pytest.mark.full
    def test_a_few_bytes_of_any_file(
        self, points: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """At unchanged size: the newest is passed over for the one before, and refused where it is asked for by name."""
        shutil.copytree(short, tmp_path / "run")
        resumed, newest = trainer(tmp_path / "run", points, max_steps=6), tmp_path / "run" / "checkpoint-6"
        names = sorted(Manifest.read(newest).files)
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "ptr_window_0.safetensors", "trainer_state.json"} < {
            *names
        }
        for name in names:
            before = garble(newest / name)
            caplog.clear()
            assert resumed.choose_checkpoint("last") == tmp_path / "run" / "checkpoint-3", name
            assert f"{newest} is skipped: " in caplog.text
            assert name in caplog.text
            with pytest.raises(ValueError, match=f"checkpoint-6 cannot be resumed from: .*{name}"):
                resumed.choose_checkpoint(str(newest))
            (newest / name).write_bytes(before)
        assert resumed.choose_checkpoint("last") == newest

    @pytest.mark.full
    def test_of_an_earlier_version(
        self, points: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Without checksums it resumes; a file that cannot be read is named before anything is trained, and runs no code."""
        shutil.copytree(short, tmp_path / "run")
        newest = tmp_path / "run" / "checkpoint-6"
        edit_manifest(newest, checksums={})
        resumed = trainer(tmp_path / "run", points, max_steps=9, save_strategy="no")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "ptr_window_0.safetensors"):
            before = (newest / name).read_bytes()
            torch.save({"state": Payload(tmp_path / "proof")}, newest / name)
            edit_manifest(newest, files=Manifest.read(newest).files | {name: (newest / name).stat().st_size})
            with pytest.raises(ValueError, match=f"checkpoint-6/{name} cannot be resumed from; it is damaged"):
                resumed.train(resume_from_checkpoint=newest)
            (newest / name).write_bytes(before)
            edit_manifest(newest, files=Manifest.read(newest).files | {name: len(before)})
        assert not (tmp_path / "proof").exists()
        assert resumed.state.global_step == 6
        caplog.clear()
        resumed.train(resume_from_checkpoint=True)
        assert caplog.text.count("checkpoint-6 is of an earlier version and has no checksums") == 1
        assert resumed.state.global_step == 9

    def test_what_a_stranger_would_pickle(self, points: Path, short: Path, tmp_path: Path) -> None:
        """The checksums agree with a file that would run code."""
        shutil.copytree(short, tmp_path / "run")
        newest = tmp_path / "run" / "checkpoint-6"
        torch.save(Payload(tmp_path / "proof"), newest / "optimizer.pt")
        known = Manifest.read(newest)
        edit_manifest(
            newest,
            files=known.files | {"optimizer.pt": (newest / "optimizer.pt").stat().st_size},
            checksums=known.checksums | checksums(newest, ["optimizer.pt"]),
        )
        with pytest.raises(ValueError, match=r"optimizer.pt cannot be resumed .* something else than tensors"):
            trainer(tmp_path / "run", points, max_steps=9).train(resume_from_checkpoint=True)
        assert not (tmp_path / "proof").exists()

    def test_a_checkpoint_past_the_end(
        self, points: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It would be given out as trained."""
        shutil.copytree(short, tmp_path / "run")
        shorter = trainer(tmp_path / "run", points, max_steps=5)
        with pytest.raises(
            ValueError, match=r"checkpoint-6 is of step 6, but this run ends at step 5, so nothing would be"
        ):
            shorter.train(resume_from_checkpoint=True)
        assert not (tmp_path / "run" / LOCK_NAME).exists()
        trainer(tmp_path / "run", points, max_steps=6).train(resume_from_checkpoint=True)
        assert "checkpoint-6 is of step 6, the last one of this run: nothing is left to train" in caplog.text

    @pytest.mark.full
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
        with pytest.raises(ValueError, match=r"None of its 1 checkpoints can be used, as said above"):
            started.train(resume_from_checkpoint="last")
        with pytest.raises(ValueError, match=r"checkpoint-3 cannot be resumed from: scheduler.pt is missing"):
            started.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")

    @pytest.mark.full
    def test_weights_alone_are_refused(self, points: Path, tmp_path: Path) -> None:
        trainer(tmp_path, points, max_steps=3, save_only_model=True).train()
        with pytest.raises(ValueError, match="save_only_model=True and holds no state of the optimiser"):
            trainer(tmp_path, points, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    @pytest.mark.full
    def test_checkpoints_of_an_earlier_run_are_named(
        self, points: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shutil.copytree(short, tmp_path / "run")
        trainer(tmp_path / "run", points, max_steps=1).train()
        assert "holds checkpoint-6, checkpoint-3 of an earlier run" in caplog.text


class TestAnotherRunInTheFolder:
    """See test_run_lock.py for other processes."""

    @pytest.mark.full
    def test_neither_trains_nor_saves(self, points: Path, tmp_path: Path) -> None:
        second = trainer(tmp_path / "run", points, max_steps=1, save_strategy="no")
        first = RunLock(tmp_path / "run")
        assert first.acquire() is None
        with pytest.raises(ValueError, match=rf"run is being written by another run: .*process {os.getpid()} on "):
            second.train()
        with pytest.raises(SaveError, match=r"was not written. .*is being written by another run: .*another folder"):
            second.save_model()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_NAME]
        second.save_model(str(tmp_path / "elsewhere"))
        assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
        assert not (tmp_path / "elsewhere" / "README.md").exists(), "nothing was trained that a card could tell of"
        first.release()
        # one after the other, as in a notebook
        second.train()
        second.train()
        trainer(tmp_path / "run", points, max_steps=1, save_strategy="no").train()
        second.save_model()
        assert not list(tmp_path.rglob(".*"))


class TestRotationAndBest:
    SETTINGS = BEST | {"max_steps": 9, "save_total_limit": 2}
    GRADES = {3: 3.0, 6: 1.0, 9: 2.0}  # noqa: RUF012

    @pytest.mark.full
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

    @pytest.mark.full
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
        assert f"The best checkpoint so far, '{best}', is gone" in caplog.text
        assert step_of(Path(resumed.state.best_model_checkpoint)) == 9
        assert fault(Path(resumed.state.best_model_checkpoint)) is None

    @pytest.mark.full
    def test_a_best_that_lies_elsewhere_is_not_followed(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer(tmp_path / "mine", points, stop=7, grades=self.GRADES, **self.SETTINGS).train()
        shutil.move(tmp_path / "mine" / "checkpoint-3", tmp_path / "theirs" / "checkpoint-3")
        newest = tmp_path / "mine" / "checkpoint-6"
        state = json.loads((newest / "trainer_state.json").read_text())
        recorded = str(tmp_path / "theirs" / "checkpoint-3")
        (newest / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": recorded}))
        size = (newest / "trainer_state.json").stat().st_size
        edit_manifest(newest, checksums={}, files=Manifest.read(newest).files | {"trainer_state.json": size})
        resumed = trainer(tmp_path / "mine", points, stop=7, grades=self.GRADES, **self.SETTINGS)
        resumed.train(resume_from_checkpoint=newest)
        assert f"The best checkpoint so far, '{recorded}', is gone or damaged, or lies in another" in caplog.text

    @pytest.mark.full
    def test_a_best_that_is_damaged_at_the_end_leaves_the_last(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class GarbleBest(TrainerCallback):
            def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
                if state.global_step == 5:
                    garble(tmp_path / "checkpoint-3" / "model.safetensors")

        run = trainer(tmp_path, points, grades=self.GRADES, **self.SETTINGS | {"max_steps": 6})
        run.add_callback(GarbleBest())
        run.train()
        assert "checkpoint-3 cannot be loaded: model.safetensors: damaged since it was written" in caplog.text
        last = PTRPolicy.from_pretrained(tmp_path / "checkpoint-6")
        assert tensors_equal(last.state_dict(), run.policy.state_dict())


class TestOtherLayout:
    @pytest.mark.full
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
