"""The batch of a step over all processes: which rows were recorded once, and how it reaches the ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from lerobot.datasets import LeRobotDatasetMetadata
from torch import Tensor, nn

from ptr_hf.data.segment_dataset import TASK, TASK_INDEX
from ptr_hf.data.segments import CHUNK_PREFIX


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


@dataclass(frozen=True)
class TensorsOnly:
    """A collate function without text: with `dispatch_batches` one process reads, and only tensors reach the others.

    Args:
        collate: that of the dataset.
    """

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Collate and keep the tensors."""
        return {key: value for key, value in self.collate(samples).items() if isinstance(value, Tensor)}


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of its batches, which ranks see differently."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def instructions_of(meta: LeRobotDatasetMetadata) -> tuple[str, ...]:
    """The instruction of every `task_index` of a dataset."""
    tasks = meta.tasks
    return tuple(tasks["task_index"].sort_values().index)


def with_instructions(batch: dict[str, Any], instructions: Sequence[str]) -> dict[str, Any]:
    """Put the text back that `TensorsOnly` has left out; it reads the task numbers off the device."""
    batch = {**batch, TASK: [instructions[number] for number in batch[TASK_INDEX].tolist()]}
    if CHUNK_PREFIX + TASK_INDEX in batch:
        of_chunks = batch[CHUNK_PREFIX + TASK_INDEX].T.tolist()
        batch[CHUNK_PREFIX + TASK] = [[instructions[number] for number in column] for column in of_chunks]
    return batch
