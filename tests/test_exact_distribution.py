"""1, 2 and 4 gloo processes give one process's gradients, queue and side pathway; see distributed_gradients.py."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from distributed_gradients import CASES, Case

TOLERANCE = 1e-5


@cache
def rows_of(slow: bool) -> list[dict[str, Any]]:
    """The rows of all cases that are slow, or of all that are not, from one process that forks their ranks."""
    script = Path(__file__).with_name("distributed_gradients.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with TemporaryDirectory() as folder:
        output = Path(folder) / "distribution.json"
        command = [sys.executable, script.name, str(output), "slow" if slow else "fast"]
        done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(output.read_text())["runs"]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.full if case.slow else (), id=case.name) for case in CASES],
)
def test_gradients_do_not_depend_on_the_number_of_processes(case: Case) -> None:
    rows = [row for row in rows_of(case.slow) if row["case"] == case.name]
    assert [row["processes"] for row in rows] == list(case.worlds)
    for row in rows:
        assert len(row["relative_gradient_differences"]) >= 4
        assert max(row["relative_gradient_differences"]) <= TOLERANCE, row
        assert row["ranks_agree"]
        assert row["queue_as_alone"]
        assert row["gradient_norm"] > 0.1
