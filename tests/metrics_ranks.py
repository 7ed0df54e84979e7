"""Ranks of test_metrics_groups.py: one process imports everything once and forks them; each adds its rows and flushes."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from meeting import meeting_place
from metrics_rows import NAMES, TASKS, config_of, output_of

from ptr_hf.training.metrics import MetricsWindow

RANKS, ROWS = 2, 12


def rank_of(number: int, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    window = MetricsWindow(config_of("ptr"), NAMES, TASKS)
    for micro_step in range(2):
        window.add({"loss": torch.tensor(1.0)}, output_of(range(number * ROWS, (number + 1) * ROWS), seed=micro_step))
    _, columns = window.flush(accelerator, (1.0, 0.25, 4.0))
    (folder / f"rank-{number}.json").write_text(json.dumps(columns))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _store, place = meeting_place()
    children = []
    for number in range(RANKS):
        child = os.fork()
        if child == 0:
            os.environ |= {
                **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)},
                **place,
                "LOCAL_WORLD_SIZE": str(RANKS),
            }
            status = 1
            try:
                rank_of(number, Path(sys.argv[1]))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * RANKS
