"""Short training runs that every change has to reproduce: loss, weights, accuracy and the weights of the policy at the end.

    python tests/invariants/test_trajectories.py      # record them anew, where a change of the figures is meant

On the machine that recorded them the figures are bit-equal; on another processor they differ by rounding.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from demonstrations import write_dataset
from small_policies import base_policy

from ptr_hf import PTRTrainer, PTRTrainingArguments

RECORDED = Path(__file__).with_name("trajectories.json")
COLUMNS = ("loss", "weight_mean", "weight_min", "accuracy", "score")
POLICIES = {"act": "act", "smolvla": "smolvla", "smolvla_state": "smolvla"}
MODES: dict[str, dict[str, Any]] = {
    "ptr": {
        "num_belief_tokens": 2,
        "segment_length": 2,
        "queue_size": 32,
        "queue_negatives": 8,
        "scorer_warmup_steps": 2,
    },
    "ptr_offline": {},
}


def trajectory(policy: str, mode: str, folder: Path) -> dict[str, Any]:
    """Six steps: the figures of every step, and Σ|θ| of the policy after the last."""
    cameras = () if policy == "smolvla_state" else ("observation.image",)
    root = write_dataset(folder / "points", (20, 16, 18, 14), cameras=cameras)
    settings = dict(MODES[mode])
    if mode == "ptr_offline":
        frames = pd.DataFrame({"index": range(68), "weight": np.where(np.arange(68) % 3, 1.0, 0.1)})
        frames.to_parquet(folder / "weights.parquet")
        settings["weights"] = str(folder / "weights.parquet")
    args = PTRTrainingArguments(
        output_dir=str(folder / "run"),
        preset=mode,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    torch.manual_seed(0)
    trainer = PTRTrainer(base_policy(POLICIES[policy], root), args, root)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "weight_mean" in row]
    found = {name: [row[name] for row in rows] for name in COLUMNS if name in rows[0]}
    total = sum(float(p.detach().double().abs().sum()) for p in trainer.policy.base.parameters())
    return {**found, "parameters": total}


@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        ("act", "ptr"),
        ("smolvla", "ptr"),
        ("smolvla", "ptr_offline"),
        ("smolvla_state", "ptr_offline"),
        pytest.param("act", "ptr_offline", marks=pytest.mark.full),
        pytest.param("smolvla_state", "ptr", marks=pytest.mark.full),
    ],
)
def test_a_run_is_what_it_was(policy: str, mode: str, tmp_path: Path) -> None:
    expected = json.loads(RECORDED.read_text())[f"{policy} {mode}"]
    found = trajectory(policy, mode, tmp_path)
    assert found.keys() == expected.keys()
    assert len(found["loss"]) == 6
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=2e-3, abs=2e-4), name


if __name__ == "__main__":
    runs = {}
    for own in POLICIES:
        for kind in MODES:
            with tempfile.TemporaryDirectory() as scratch:
                runs[f"{own} {kind}"] = trajectory(own, kind, Path(scratch))
    RECORDED.write_text(json.dumps(runs, indent=1) + "\n")
