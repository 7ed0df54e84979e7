"""1, 2 and 4 gloo processes give one process's gradients, queue and side pathway; see distributed_gradients.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_gradients import CASES, Case

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case with every number of processes, in one process that forks their ranks."""
    output = tmp_path_factory.mktemp("distribution") / "distribution.json"
    script = Path(__file__).with_name("distributed_gradients.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, script.name, str(output)], cwd=script.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())["runs"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_do_not_depend_on_the_number_of_processes(runs: list[dict[str, Any]], case: Case) -> None:
    rows = [row for row in runs if row["case"] == case.name]
    assert [row["processes"] for row in rows] == list(case.worlds)
    for row in rows:
        assert len(row["relative_gradient_differences"]) >= 4
        assert max(row["relative_gradient_differences"]) <= TOLERANCE, row
        assert row["ranks_agree"]
        assert row["queue_as_alone"]
        assert row["gradient_norm"] > 0.1
