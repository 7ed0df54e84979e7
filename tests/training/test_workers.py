"""Processes that read data start once, and read what they are asked for."""

from pathlib import Path
from typing import Any

import psutil
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from small_policies import base_policy
from transformers import TrainerCallback

from ptr_hf import PTRTrainer, PTRTrainingArguments


class Readers(TrainerCallback):
    """The processes that were there at some step."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen |= {child.pid for child in psutil.Process().children()}


def trainer_with(folder: Path, points: Path, callback: TrainerCallback, **settings: Any) -> PTRTrainer:
    args = PTRTrainingArguments(
        output_dir=str(folder),
        preset="sft",
        num_train_epochs=3,
        per_device_train_batch_size=40,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return PTRTrainer(base_policy("act", points), args, points, points, callbacks=[callback])


def test_workers_start_once_in_three_epochs(points: Path, tmp_path: Path) -> None:
    for persistent, processes in ((None, 2), (False, 6)):
        readers, before = Readers(), {child.pid for child in psutil.Process().children()}
        given = {} if persistent is None else {"dataloader_persistent_workers": persistent}
        trainer_with(tmp_path / str(persistent), points, readers, dataloader_num_workers=2, **given).train()
        assert len(readers.seen - before) == processes


def test_evaluation_reads_the_dataset_that_it_is_given(points: Path, tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, points, Readers(), dataloader_num_workers=1)
    whole = trainer.evaluate()["eval_loss"]
    other = PTRTrainer(
        trainer.policy, trainer.args, points, LeRobotDataset("tests/points", root=points, episodes=[3])
    ).eval_dataset
    assert len(other) < len(trainer.eval_dataset)
    assert trainer.evaluate(other)["eval_loss"] != whole
    assert trainer.evaluate()["eval_loss"] == whole


def test_without_workers_there_is_nothing_to_keep(points: Path, tmp_path: Path) -> None:
    assert not trainer_with(tmp_path, points, Readers()).args.dataloader_persistent_workers
