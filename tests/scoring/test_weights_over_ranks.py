"""Σ w ℓ / Σ w over two ranks is that of one process with all of their chunks."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from meeting import meeting_place
from safetensors.torch import load_file
from small_policies import base_policy, tensors_equal


@pytest.mark.full
def test_two_ranks_take_the_step_of_one(points: Path, tmp_path: Path) -> None:
    pd.DataFrame({"episode_index": range(4), "weight": [1.0, 0.02, 0.4, 1.0]}).to_csv(
        tmp_path / "weights.csv", index=False
    )
    tests = Path(__file__).parents[1]
    for ranks in (1, 2):
        _store, place = meeting_place()
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **place}
            shared = {"OMP_NUM_THREADS": "1"}
            paths = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
            environment = os.environ | shared | {"PYTHONPATH": paths} | (own if ranks > 1 else {})
            script = [
                sys.executable,
                str(Path(__file__).with_name("given_weights_ranks.py")),
                str(points),
                str(tmp_path),
            ]
            processes.append(subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            for process in processes:
                _, errors = process.communicate()
                assert process.returncode == 0, errors[-3000:]
        finally:
            for process in processes:
                process.kill()
    one, *both = (load_file(tmp_path / f"rank-{r}-of-{n}.safetensors") for r, n in ((0, 1), (0, 2), (1, 2)))
    assert tensors_equal(*both)
    start = base_policy("act", points, dropout=0.0, use_vae=False).state_dict()
    head = "model.action_head.weight"
    moved = [state[head] - start[head] for state in (one, both[0])]
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-6)
