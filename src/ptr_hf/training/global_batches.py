"""The batch of a step over all processes: which rows were recorded once."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from lerobot.datasets import LeRobotDatasetMetadata
from torch import Tensor, nn


def repeated_rows(batch: Mapping[str, Any], accelerator: Accelerator) -> Bool[Tensor, " batch"] | None:
    """The rows with which Accelerate has filled the last, uneven batch of an epoch; None where there are none.

    Every rank must hold as many rows, so the loader completes the batch with the epoch's first samples. One process would
    take a smaller batch; leaving the repeated rows out gives its gradient.

    Args:
        batch: this rank's part of the batch that the loader has just returned.
        accelerator: whose loader it came from.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader:
        return None
    rows = len(batch["index"])
    recorded = state.remainder
    if not 0 < recorded < rows * accelerator.num_processes:
        return None
    place = torch.arange(rows, device=batch["index"].device) + rows * accelerator.process_index
    return place >= recorded


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of its batches, which ranks see differently."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def instructions_of(meta: LeRobotDatasetMetadata) -> tuple[str, ...]:
    """The instruction of every `task_index` of a dataset."""
    tasks = meta.tasks
    return tuple(tasks["task_index"].sort_values().index)
