"""What a run says before its first step is what it then does."""

import logging
from pathlib import Path
from typing import Any

import pytest
from lerobot.datasets import LeRobotDatasetMetadata
from peft import LoraConfig
from small_policies import base_policy
from transformers import TrainerState

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.training.checkpoint_files import checkpoints
from ptr_hf.training.plan import checkpoint_bytes, duration, free_bytes, plan, saves, too_little_room


def new_trainer(points: Path, folder: Path, family: str = "act", **settings: Any) -> PTRTrainer:
    lora = LoraConfig(r=2, target_modules=r".*(linear1|linear2)") if settings.pop("lora", False) else None
    given = {"report_to": "none", "use_cpu": True, "preset": "sft", "save_total_limit": 0} | settings
    args = PTRTrainingArguments(output_dir=str(folder), **given)
    base = base_policy(family, points)
    if lora is not None:
        base.save_pretrained(folder / "base")
        base.config.pretrained_path = folder / "base"
    return PTRTrainer(base, args, points, peft_config=lora)


def test_a_run_begins_with_its_plan(points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 14}
    settings = {**counts, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2, "segment_length": 2}
    trainer = new_trainer(points, tmp_path / "out", **settings)
    trainer.train()
    shown = capsys.readouterr().out.splitlines()
    meta = LeRobotDatasetMetadata("tests/points", root=points)
    segments = len(trainer.train_dataset)  # type: ignore[arg-type]
    data, step, run, weights, written, before, time = (line for line in shown if line)
    assert data.endswith(
        f"{meta.total_episodes:,} episodes, {meta.total_frames:,} frames, {segments:,} segments of 2 chunks"
    )
    assert step == "a step       8 segments of 2 chunks (4 at a time x 2 accumulated)"
    assert run == f"the run      14 steps, {14 * 8 / segments:.3g} epochs"
    assert weights == "weights      none: plain fine-tuning (SFT)"
    assert written.startswith("checkpoints  4, every 4 steps; the last 2 are kept, about ")
    assert before == "time         said after 11 steps"
    assert time.endswith("for the 3 steps left")
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-14", "checkpoint-12"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [("act", {}), ("act", {"lora": True}), ("smolvla", {"preset": "ptr", "segment_length": 2, "queue_size": 64})],
    ids=["act", "lora", "a scorer in the step"],
)
def test_the_size_of_a_checkpoint(points: Path, tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    counts = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    trainer = new_trainer(points, tmp_path, family, disable_tqdm=True, queue_negatives=8, **counts, **settings)
    expected = checkpoint_bytes(trainer.policy, trainer.args)
    trainer.train()
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file())
    # configurations, random streams and headers are not counted
    assert 0 < size - expected < 0.1 * expected + 150_000


def test_a_disk_without_room_is_named_before_the_first_step(
    points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = {"max_steps": 2 * 10**9, "save_strategy": "steps", "save_steps": 1}
    trainer = new_trainer(points, tmp_path, disable_tqdm=True, **counts)
    state = TrainerState(max_steps=2 * 10**9, save_steps=1)
    sentence = too_little_room(trainer.args, state, trainer.policy)
    assert sentence is not None
    assert f"{tmp_path} has " in sentence
    assert "(the policy and 2000000000 checkpoints at a time)" in sentence
    assert "lower save_total_limit" in sentence
    assert too_little_room(trainer.args.with_options(save_total_limit=2), state, trainer.policy) is None
    trainer.control.should_training_stop = True
    with caplog.at_level(logging.WARNING, logger="ptr_hf.training.plan"):
        trainer.state = state
        trainer.callback_handler.on_train_begin(trainer.args, state, trainer.control)
    assert sentence.partition(" of free disk")[2] in caplog.text


@pytest.mark.parametrize(
    ("settings", "state", "number"),
    [
        ({"save_strategy": "no"}, {}, 0),
        ({"save_strategy": "steps"}, {"max_steps": 20, "save_steps": 6}, 4),
        ({"save_strategy": "steps"}, {"max_steps": 20, "save_steps": 6, "global_step": 12}, 2),
        ({"save_strategy": "epoch"}, {"num_train_epochs": 5, "epoch": 1.5}, 4),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}, {}, None),
    ],
)
def test_how_many_checkpoints(
    tmp_path: Path, settings: dict[str, Any], state: dict[str, Any], number: int | None
) -> None:
    args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert saves(args, TrainerState(**state)) == number


@pytest.mark.full
def test_where_weights_come_from(points: Path, tmp_path: Path) -> None:
    trainer = new_trainer(points, tmp_path, preset="ptr_offline", disable_tqdm=True)
    trainer.state.max_steps = 100
    assert plan(trainer)["weights"].startswith("from the inspection: ")
    scorer = new_trainer(points, tmp_path, preset="ptr", scorer_warmup_steps=7, disable_tqdm=True)
    scorer.state.max_steps = 100
    scorer.policy.set_run_length(100)
    assert plan(scorer)["weights"] == "from a scorer in the step (preset ptr), after 7 steps of warm-up"


def test_a_disk_that_does_not_say(tmp_path: Path) -> None:
    there = free_bytes(tmp_path / "not" / "yet")
    assert there is not None
    assert there > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0423, "0.042 s"), (40, "40 s"), (700, "12 min"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
