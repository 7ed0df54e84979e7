"""Runs that are resumed in this process: to the bit whatever the settings, from the right checkpoint, in the right place."""

import logging
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
from ptr_hf.checkpoints import PARTIAL, checkpoints, fault, step_of
from ptr_hf.report import DYNAMICS_FILE, read_dynamics

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


def log_rows(of: PTRTrainer) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in of.state.log_history]


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


class TestOtherLayout:
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
