"""Sources and tasks in a logging window: summed over micro-batches, ranks and checkpoints as if it were one batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from metrics_rows import NAMES, TASKS, TOTAL, config_of, output_of
from safetensors.torch import load, save

from ptr_hf.method import GROUP_STATISTICS
from ptr_hf.report.dynamics import DynamicsLog, read_dynamics
from ptr_hf.report.sources import group_shares
from ptr_hf.training.metrics import MetricsWindow

PAPER = (1.0, 0.25, 4.0)
LOSS = {"loss": torch.tensor(1.0)}


def columns_of(*windows_rows: Any, names: tuple[str, ...] = NAMES, tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    window = MetricsWindow(config_of("ptr"), names, tasks)
    for rows, seed in windows_rows:
        window.add(LOSS, output_of(rows, seed))
    return window.flush(Accelerator(cpu=True), PAPER)[1]


def test_a_window_by_hand() -> None:
    window = MetricsWindow(config_of("ptr"), ("bench", "lab", "gone"))
    output = output_of(range(5))
    output.weight = torch.tensor([0.25, 4.0, 4.0, 1.0, 0.75])
    output.score = torch.tensor([-2.0, 6.0, 4.0, 8.0, 1.0])
    output.loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    output.target_valid = torch.tensor([True, True, True, False, True])
    output.source = torch.tensor([0, 0, 1, 1, 1])
    window.add(LOSS, output)
    _, columns = window.flush(Accelerator(cpu=True), PAPER)
    bench, lab, gone = columns["sources"]
    assert bench == {
        "name": "bench", "chunks": 2, "targets": 2, "share": 0.4, "weight_share": 0.425, "weight": 2.125, "score": 2.0,
        "loss": 1.5, "at_floor": 0.5, "at_ceiling": 0.5,
    }  # fmt: skip
    assert lab == {
        "name": "lab", "chunks": 3, "targets": 2, "share": 0.6, "weight_share": 0.575, "weight": 5.75 / 3, "score": 2.5,
        "loss": 4.0, "at_floor": 0.0, "at_ceiling": 0.5,
    }  # fmt: skip
    assert (gone["chunks"], gone["share"], gone["weight_share"]) == (0, 0.0, 0.0)
    assert [gone[name] for name in ("weight", "score", "loss", "at_floor", "at_ceiling")] == [None] * 5
    assert columns["share_bound"] == 16.0
    assert "tasks" not in columns
    # the window starts anew
    window.add(LOSS, output_of(range(4)))
    assert sum(group["chunks"] for group in window.flush(Accelerator(cpu=True), PAPER)[1]["sources"]) == 4


def test_micro_batches_add_up() -> None:
    whole = columns_of((range(TOTAL), 0))
    parts = columns_of((range(7), 0), (range(7, TOTAL), 0))
    assert parts == whole
    assert [group["name"] for group in whole["sources"]] == list(NAMES)


def test_a_single_group_is_not_looked_at() -> None:
    window = MetricsWindow(config_of("ptr"), ("bench",), ("reach",))
    window.add(LOSS, output_of(range(8)))
    assert set(window.state()) == {"sum.loss", "weights", "count"}
    assert set(window.flush(Accelerator(cpu=True), PAPER)[1]) == {"weight_histogram", "weight_bin_edges"}


def test_without_a_scorer_there_is_nothing_to_weigh() -> None:
    window = MetricsWindow(config_of("sft"), NAMES, TASKS)
    window.add(LOSS)
    assert window.flush(Accelerator(cpu=True), None) == ({"loss": 1.0}, {})


def test_a_checkpoint_in_between_changes_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    whole, before, after = (MetricsWindow(config_of("ptr_calibrated"), NAMES, TASKS) for _ in range(3))
    for window in (whole, before):
        window.add(LOSS, output_of(range(9)))
    after.restore(load(save({name: value.contiguous() for name, value in before.state().items()})))
    for window in (whole, after):
        window.add(LOSS, output_of(range(9, TOTAL)))
    expected = whole.flush(accelerator, PAPER)
    assert after.flush(accelerator, PAPER) == expected
    assert expected[1]["share_bound"] == pytest.approx(100.0)


def test_a_checkpoint_of_other_data_or_an_earlier_version_is_read_without_its_groups() -> None:
    window = MetricsWindow(config_of("ptr"), NAMES, TASKS)
    window.add(LOSS, output_of(range(6)))
    state = window.state()
    more = MetricsWindow(config_of("ptr"), (*NAMES, "another"), TASKS)
    more.restore(state)
    assert {name for name in more.state() if name.startswith("groups")} == {"groups.tasks"}
    old = MetricsWindow(config_of("ptr"), NAMES, TASKS)
    old.restore({name: value for name, value in state.items() if not name.startswith("groups")})
    old.add(LOSS, output_of(range(6, 8)))
    assert sum(group["chunks"] for group in old.flush(Accelerator(cpu=True), PAPER)[1]["sources"]) == 2


def test_of_many_tasks_those_with_the_most_chunks_are_kept(tmp_path: Path) -> None:
    tasks = tuple(f"task {number}" for number in range(100))
    window = MetricsWindow(config_of("ptr"), (), tasks)
    for number in range(100):
        output = output_of(range(1 + number % 3))
        output.task = torch.full_like(output.task, number)
        window.add(LOSS, output)
    _, columns = window.flush(Accelerator(cpu=True), PAPER)
    counts = [group["chunks"] for group in columns["tasks"]]
    assert counts == [3] * 33 + [2] * 31
    DynamicsLog(tmp_path / "d.parquet").append({"step": 1, **columns})
    shares = group_shares(read_dynamics(tmp_path / "d.parquet"), "ptr", "tasks")
    assert len(shares) == 64
    assert shares[0].share == 3 / 199
    assert GROUP_STATISTICS[0] == "chunks"


@pytest.mark.full
def test_two_ranks_are_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("metrics_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)}
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    alone = columns_of((range(TOTAL), 0), (range(TOTAL), 1))
    assert ranks[0]["sources"] == ranks[1]["sources"] == alone["sources"]
    assert ranks[0]["tasks"] == alone["tasks"]
