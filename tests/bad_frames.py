"""Copies of small real datasets in which some recorded values are not finite, and runs of PTRTrainer on them."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lerobot.datasets.compute_stats import get_feature_stats
from small_policies import base_policy
from torch import nn

from ptr_hf import PTRTrainer, PTRTrainingArguments

EPISODES = ((0, 30), (30, 54), (54, 94), (94, 112))
"""First frame and end of the episodes of `write_dataset`."""
FRAME = 40
"""In the middle of the episode of frames 30 to 53."""
SEEN_FROM = {"observation.state": (32, 36, 40), "action": tuple(range(33, 41))}
"""Where the segments begin that hold the frame, at T = 2, chunks of 4 and a consequence 4 frames on."""
SMALL = {"segment_length": 2, "consequence_offset": 4, "queue_size": 64, "queue_negatives": 8, "head_dim": 16}
PRESETS = {"ptr": {"num_belief_tokens": 2}, "ptr_calibrated": {"score_refresh_steps": 2}}


def spoiled(root: Path, folder: Path, values: Mapping[tuple[str, int], float], with_statistics: bool = False) -> Path:
    """A copy of a dataset in which the first number of a feature at a frame has another value.

    Args:
        root: of the dataset, with one parquet file.
        folder: where the copy goes.
        values: by feature and frame.
        with_statistics: also renew the feature's statistics as LeRobot does when it records such a value.
    """
    shutil.copytree(root, folder)
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    for key in {key for key, _ in values}:
        column = table[key].to_pylist()
        for (of, frame), value in values.items():
            if of == key:
                column[frame][0] = value
        place = table.schema.get_field_index(key)
        table = table.set_column(place, table.schema.field(place), pa.array(column, table.schema.field(place).type))
        if with_statistics:
            path = folder / "meta" / "stats.json"
            statistics = json.loads(path.read_text())
            with np.errstate(invalid="ignore"):
                renewed = get_feature_stats(np.asarray(column, dtype=np.float32), axis=0, keepdims=False)
            statistics[key] = {name: number.tolist() for name, number in renewed.items()}
            path.write_text(json.dumps(statistics))
    pq.write_table(table, file)
    return folder


def arguments(folder: Path, preset: str = "ptr", **settings: Any) -> PTRTrainingArguments:
    own = {} if preset == "sft" else {"scorer_warmup_steps": 2, **SMALL, **PRESETS.get(preset, {})}
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "logging_steps": 5,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PTRTrainingArguments(output_dir=str(folder), preset=preset, **{**defaults, **own, **settings})


def trainer_for(
    family: str, points: Path, root: Path, folder: Path, kind: type[PTRTrainer] = PTRTrainer, **settings: Any
) -> PTRTrainer:
    # the side pathway's first weights
    torch.manual_seed(0)
    return kind(base_policy(family, points), arguments(folder, **settings), train_dataset=root)


def rows_of(trainer: PTRTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def spoil_gradients(trainer: PTRTrainer, steps: Iterable[int], loss_too: bool = False) -> None:
    """Make a gradient (and the loss) NaN at some steps, by a hook of autograd."""
    parameter = next(parameter for parameter in trainer.policy.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda grad: grad * (torch.nan if trainer.state.global_step in steps else 1.0))
    if loss_too:

        def spoil(_policy: nn.Module, _inputs: Any, output: Any) -> Any:
            return (output[0] * torch.nan, *output[1:]) if trainer.state.global_step in steps else output

        trainer.policy.register_forward_hook(spoil)
