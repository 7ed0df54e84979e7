"""What is written or read beside a run may fail; the run, which has done its work, may not."""

import json
import logging
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lerobot.policies.factory import make_pre_post_processors
from small_policies import base_policy, stats_of
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.cli import train_run
from ptr_hf.envs import draw_without_display
from ptr_hf.publishing.push import local_needs
from ptr_hf.report.dynamics import DYNAMICS_FILE, read_dynamics
from ptr_hf.training.evaluation import EVALUATION_FILE, EvaluationCallback
from ptr_hf.training.nonfinite import NONFINITE_FILE, BadFrame, NonFiniteRecord

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def folder_policy(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's ACT in a local folder, as LeRobot saves it."""
    folder = tmp_path_factory.mktemp("policies") / "my_act"
    policy = base_policy("act", points)
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(policy.config, dataset_stats=stats_of(points)):
        processor.save_pretrained(folder)
    return folder


def new_trainer(policy: Path, points: Path, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> PTRTrainer:
    args = PTRTrainingArguments(
        **{
            "output_dir": str(folder),
            "preset": "ptr",
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "segment_length": 2,
            "num_belief_tokens": 0,
            "queue_size": 16,
            "queue_negatives": 4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        }
    )
    return PTRTrainer(policy, args, points, callbacks=callbacks)


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            self.action(Path(args.output_dir))


@pytest.mark.full
def test_a_short_run_of_a_control_in_a_folder_with_brackets(
    points: Path, folder_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer steps than `logging_steps`, a score that compares no candidates, rich's markup in a path, one push of it all."""
    output = tmp_path / "out[/b]"
    train_run.main(
        [
            *("--policy_path", str(folder_policy), "--dataset", str(points), "--eval_dataset", str(points)),
            *("--output_dir", str(output), "--preset", "small_loss", "--score_after", "true", "--max_steps", "3"),
            *(
                "--use_cpu",
                "true",
                "--segment_length",
                "2",
                "--per_device_train_batch_size",
                "2",
                "--report_to",
                "none",
            ),
        ]
    )
    assert read_dynamics(output / DYNAMICS_FILE).steps("small_loss").tolist() == [3]
    results = json.loads((output / "results.json").read_text())["small_loss"]
    assert results.keys() == {"action loss, held-out clean episodes"}
    text = (output / "ptr_report.html").read_text(encoding="utf-8")
    assert "One step was logged, step 3" in text
    assert "picked the true consequence" not in text
    assert str(output) in capsys.readouterr().out
    # what the folder holds may be published: it says nothing of this machine
    for name in ("training_args.json", "ptr_config.json", "config.json", "policy_preprocessor.json", "ptr_report.html"):
        assert str(tmp_path.parent) not in (output / name).read_text(encoding="utf-8"), name
        assert str(folder_policy.parent) not in (output / name).read_text(encoding="utf-8"), name
    loaded = PTRPolicy.from_pretrained(output)
    assert loaded.config.base_path == "my_act"
    assert local_needs(output) == []


def test_held_out_data_that_is_not_there_is_said_before_training(
    points: Path, folder_policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="is no LeRobotDataset"):
        train_run.main(
            [
                *("--policy_path", str(folder_policy), "--dataset", str(points), "--eval_dataset", str(tmp_path)),
                *("--output_dir", str(tmp_path / "out"), "--use_cpu", "true"),
            ]
        )


@pytest.mark.full
def test_an_output_folder_that_is_gone_costs_no_training(
    points: Path,
    folder_policy: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file in the folder's place: nothing can be written there again, whoever tries; nor where TensorBoard should."""
    (tmp_path / "no_folder").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "no_folder" / "board"))

    def lose(output: Path) -> None:
        shutil.rmtree(output)
        output.write_text("somebody else's")

    output = tmp_path / "runs" / "out"
    trainer = new_trainer(
        *(folder_policy, points, output, At(1, lose)),
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to="tensorboard",
    )
    with caplog.at_level(logging.ERROR, logger="ptr_hf"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert "checkpoint-3 could not be written" in caplog.text
    assert re.search(r"[0-9.]+ [MG]B are free on that disk", caplog.text)
    assert "TensorBoard's row could not be written" in caplog.text
    assert output.read_text() == "somebody else's"


@pytest.mark.full
def test_what_a_resumed_run_cannot_read_is_put_aside(
    points: Path, folder_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_trainer(folder_policy, points, tmp_path, save_strategy="steps", save_steps=2, logging_steps=1).train()
    for name in (DYNAMICS_FILE, NONFINITE_FILE, EVALUATION_FILE, "ptr_scores.parquet"):
        (tmp_path / name).write_text('{"frames": ')
    shutil.rmtree(tmp_path / "checkpoint-3")
    resumed = new_trainer(folder_policy, points, tmp_path, save_strategy="steps", save_steps=2, logging_steps=1)
    with caplog.at_level(logging.WARNING, logger="ptr_hf"):
        resumed.train(resume_from_checkpoint=True)
        resumed.publisher.write_card(tmp_path)
    assert resumed.state.global_step == 3
    assert read_dynamics(tmp_path / DYNAMICS_FILE).steps(resumed.policy.config.preset).tolist() == [3]
    assert (tmp_path / f"{DYNAMICS_FILE}.damaged").is_file()
    assert (tmp_path / f"{NONFINITE_FILE}.damaged").is_file()
    assert "The card leaves ptr_scores.parquet out" in caplog.text
    assert "The card leaves the evaluations out" in caplog.text
    assert "not been evaluated" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"frames": 3, "gradients": 0}',
        '{"frames": [{"kind": "values"}], "gradients": 0}',
        '{"frames": [{"kind": "odd", "index": 1, "episode": 0, "times": 2}], "gradients": 0}',
        '{"frames": [{"kind": "values", "index": NaN, "episode": 0, "times": 2}], "gradients": 0}',
        '{"frames": [], "gradients": "two"}',
    ],
)
def test_a_damaged_record_of_bad_frames(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / NONFINITE_FILE
    path.write_text(content)
    record = NonFiniteRecord(path, resumed=True)
    assert "It is kept as ptr_nonfinite.json.damaged" in caplog.text
    assert record.add(Counter([BadFrame("values", 3, 0)]), 0).keys() == {"values"}
    again = NonFiniteRecord(path, resumed=True)
    assert again.frames == {BadFrame("values", 3, 0): 1}


class TestSimulators:
    @pytest.mark.full
    def test_the_environment_is_reset_before_the_first_step(
        self, points: Path, folder_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An environment that another state size than the robot's makes useless still starts; one that does not is named."""
        caplog.set_level(logging.INFO)
        seen: list[str] = []
        trainer = new_trainer(
            *(folder_policy, points, tmp_path, At(0, lambda _: seen.append(caplog.text))), logging_steps=1
        )
        callback = EvaluationCallback(trainer, {"type": "ptr_metaworld", "task": "no-such-task"}, steps=100)
        trainer.add_callback(callback)
        (tmp_path / EVALUATION_FILE).write_text("[")
        trainer.train()
        (said,) = seen
        assert "The evaluation in 'ptr_metaworld' failed" in said
        assert "no-such-task" in said
        assert "Traceback" not in said
        assert trainer.state.global_step == 3
        # of a resumed run
        (tmp_path / EVALUATION_FILE).write_text('[{"task": 3}]')
        callback.on_train_begin(trainer.args, TrainerState(global_step=2), TrainerControl())
        assert (tmp_path / f"{EVALUATION_FILE}.damaged").is_file()

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({}, "egl"),
            ({"MUJOCO_GL": ""}, "egl"),
            ({"MUJOCO_GL": "osmesa"}, "osmesa"),
            ({"DISPLAY": ":0"}, None),
            ({"WAYLAND_DISPLAY": "wayland-0"}, None),
        ],
    )
    def test_without_a_display_egl_draws(
        self, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
    ) -> None:
        for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        draw_without_display()
        assert os.environ.get("MUJOCO_GL") == expected
