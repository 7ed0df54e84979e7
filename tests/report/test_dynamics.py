"""The dynamics file: what goes in comes out, and what is on disk is always whole."""

import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import ptr_rows, sft_rows

from ptr_hf.report.dynamics import (
    DYNAMICS_COLUMNS,
    Dynamics,
    DynamicsLog,
    read_dynamics,
    weight_bin_edges,
    weight_histogram,
)

APPEND_FOREVER = """
import sys
from ptr_hf.report.dynamics import DynamicsLog
log = DynamicsLog(sys.argv[1])
for step in range(1, 1_000_000):
    log.append({"step": step, "loss": 1.0 / step})
"""


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    rows, log = ptr_rows(rows=20), DynamicsLog(tmp_path / "d.parquet")
    log.append(*rows[:7])
    for row in rows[7:]:
        log.append(row)
    read = read_dynamics(tmp_path / "d.parquet")
    assert read.table.column_names == list(DYNAMICS_COLUMNS)
    assert [{name: row[name] for name in rows[0]} for row in read.table.to_pylist()] == rows
    assert set(read.table["run"].to_pylist()) == {"ptr"}


def test_columns_left_out_are_null_and_read_as_nan(tmp_path: Path) -> None:
    DynamicsLog(tmp_path / "d.parquet", run="sft").append({"step": 5, "loss": 0.5})
    read = read_dynamics(tmp_path / "d.parquet")
    assert read.table["score"].null_count == 1
    assert np.isnan(read.column("score", "sft")).all()
    assert not read.logged("score", "sft")
    assert math.isnan(read.tail("score", "sft"))
    assert read.tail("loss", "sft") == 0.5


def test_metrics_may_still_be_tensors(tmp_path: Path) -> None:
    row = {"step": torch.tensor(3), "loss": torch.tensor(0.25), "weight_histogram": torch.tensor([1, 2])}
    DynamicsLog(tmp_path / "d.parquet").append(row)
    assert read_dynamics(tmp_path / "d.parquet").table.select(["step", "loss", "weight_histogram"]).to_pylist() == [
        {"step": 3, "loss": 0.25, "weight_histogram": [1, 2]}
    ]


def test_sft_and_ptr_share_a_file_and_restart_apart(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    DynamicsLog(path, run="sft").append(*sft_rows(rows=4, total=40))
    DynamicsLog(path, run="ptr").append(*ptr_rows(rows=6, total=60))
    assert read_dynamics(path).runs == ("sft", "ptr")
    DynamicsLog(path, run="ptr", start_step=30).append({"step": 31})
    assert read_dynamics(path).steps("ptr").tolist() == [10, 20, 30, 31]
    DynamicsLog(path, run="ptr").append({"step": 7})
    assert read_dynamics(path).steps("ptr").tolist() == [7]
    assert read_dynamics(path).steps("sft").tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 10, "loss": 1.0}, "step after 10"),
        ({"loss": 1.0}, "step after 11, got None"),
    ],
)
def test_a_wrong_row_is_refused_and_the_file_stays(tmp_path: Path, row: dict, message: str) -> None:
    path = tmp_path / "d.parquet"
    log = DynamicsLog(path)
    log.append({"step": 10, "loss": 1.0})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        log.append({"step": 11}, row) if "step" not in row else log.append(row)
    assert path.read_bytes() == before
    log.append({"step": 11})
    assert read_dynamics(path).steps("ptr").tolist() == [10, 11]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.parquet"
    log = DynamicsLog(path)
    log.append({"step": 1})

    def full_disk(table: pa.Table, where: Path) -> None:
        Path(where).write_bytes(b"PAR1 half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full_disk)
        with pytest.raises(OSError, match="No space"):
            log.append({"step": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.parquet"]
    assert read_dynamics(path).steps("ptr").tolist() == [1]
    # the row is written with the next one
    log.append({"step": 3})
    assert read_dynamics(path).steps("ptr").tolist() == [1, 2, 3]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, log = tmp_path / "d.parquet", DynamicsLog(tmp_path / "d.parquet")
    log.append({"step": 1})
    seen: list[int] = []
    done = threading.Event()

    def read_on() -> None:
        finished = False
        while not finished:
            # the last look comes after the last row, however the threads are scheduled
            finished = done.is_set()
            seen.append(len(read_dynamics(path).steps("ptr")))

    reader = threading.Thread(target=read_on)
    reader.start()
    for step in range(2, 40):
        log.append({"step": step})
    done.set()
    reader.join()
    assert seen[-1] == 39
    assert seen == sorted(seen)


@pytest.mark.full
def test_a_killed_run_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    process = subprocess.Popen([sys.executable, "-c", APPEND_FOREVER, str(path)])
    try:
        while not (path.exists() and len(read_dynamics(path).steps("ptr")) > 5):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    steps = read_dynamics(path).steps("ptr").tolist()
    assert len(steps) > 5
    assert steps == list(range(1, len(steps) + 1))
    DynamicsLog(path, start_step=3).append({"step": 4, "loss": 0.5})
    assert read_dynamics(path).column("loss", "ptr").tolist() == [1.0, 0.5, 1.0 / 3.0, 0.5]


def test_files_that_are_not_dynamics_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet"):
        read_dynamics(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"step": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="'loss_action'"):
        read_dynamics(tmp_path / "other.parquet")


def test_a_folder_named_like_a_partition_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run=7" / "d.parquet"
    DynamicsLog(path).append({"step": 1})
    assert read_dynamics(path).runs == ("ptr",)


def test_joined_files_keep_their_runs(tmp_path: Path) -> None:
    for run in ("sft", "ptr"):
        DynamicsLog(tmp_path / f"{run}.parquet", run=run).append({"step": 1})
    sft, ptr = read_dynamics(tmp_path / "sft.parquet"), read_dynamics(tmp_path / "ptr.parquet")
    assert Dynamics.join(sft, ptr).runs == ("sft", "ptr")
    with pytest.raises(ValueError, match="more than one"):
        Dynamics.join(ptr, ptr)
    with pytest.raises(ValueError, match="'belief'"):
        ptr.column("loss", "belief")


def test_early_and_late_weights_leave_out_the_warm_up(dynamics: Dynamics) -> None:
    counts = dynamics.weight_counts("ptr")
    assert counts is not None
    early, late = counts
    # 300 rows, the first 15 warm up: the first and the last tenth of the other 285.
    assert (early.first_step, early.last_step) == (320, 860)
    assert late.last_step == 6000
    assert early.counts.sum() == late.counts.sum() == 28 * 256
    assert late.counts[-1] > 4 * early.counts[-1]
    assert dynamics.weight_counts("sft") is None


@given(
    low=st.floats(1e-3, 1.0),
    high=st.floats(1.0, 100.0),
    bins=st.integers(1, 64),
    weight=st.lists(st.floats(0.0, 200.0, width=32), max_size=50),
)
def test_every_weight_is_counted_once(low: float, high: float, bins: int, weight: list[float]) -> None:
    edges = weight_bin_edges(low, high, bins)
    assert len(edges) == bins + 1
    assert (np.diff(edges) > 0).all()
    if high / low > 1.001:
        assert (edges[0], edges[-1]) == (low, high)
    assert weight_histogram(np.array([*weight, np.nan], dtype=np.float32), edges).sum() == len(weight)


def test_bounds_fall_into_the_end_bins() -> None:
    edges = weight_bin_edges(0.25, 4.0, 4)
    np.testing.assert_allclose(edges, [0.25, 0.5, 1.0, 2.0, 4.0])
    assert weight_histogram(np.array([0.25, 0.25, 0.7, 4.0, 4.0000005]), edges).tolist() == [2, 1, 0, 2]
    with pytest.raises(ValueError, match="lower <= upper"):
        weight_bin_edges(4.0, 0.25)
