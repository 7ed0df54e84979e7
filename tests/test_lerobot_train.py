"""LeRobot's own `lerobot-train` finds the policy type `ptr` by itself, trains it, saves it and resumes it."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.scripts import lerobot_train
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR
from small_policies import tensors_equal

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.artifacts.checks import read_config
from ptr_hf.presets import PRESETS

LEROBOT_TRAIN = Path(sys.executable).parent / "lerobot-train"
BASE = {
    "type": "act",
    "chunk_size": 4,
    "n_action_steps": 4,
    "dim_model": 32,
    "n_heads": 4,
    "dim_feedforward": 64,
    "n_encoder_layers": 1,
    "use_vae": False,
    # LeRobot resumes data and weights exactly, but not the random stream of dropout.
    "dropout": 0.0,
    "vision_backbone": "resnet18",
    "pretrained_backbone_weights": None,
}
SETTINGS = {
    "preset": "ptr",
    "segment_length": 2,
    "queue_size": 32,
    "queue_negatives": 8,
    "scorer_warmup_steps": 2,
    "controller_interval": 2,
}


Run = Callable[[list[str]], str]


def as_a_command(arguments: list[str]) -> str:
    """The console script in a process of its own, which has to discover the plugin."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(LEROBOT_TRAIN), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def in_this_process(arguments: list[str]) -> str:
    """The console script's function, which spares the seconds of imports."""
    log, argv, handlers = io.StringIO(), sys.argv, logging.getLogger().handlers[:]
    try:
        sys.argv = [str(LEROBOT_TRAIN), *arguments]
        with redirect_stdout(log), redirect_stderr(log):
            lerobot_train.main()
    finally:
        sys.argv = argv
        logging.getLogger().handlers[:] = handlers
    return log.getvalue()


def start(run: Run, points: Path, output: Path, steps: int, **settings: Any) -> str:
    given = {**SETTINGS, **settings}
    arguments = [
        "--policy.type=ptr",
        f"--policy.base={json.dumps(BASE)}",
        *(f"--policy.{name}={value}" for name, value in given.items()),
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=tests/points",
        f"--dataset.root={points}",
        f"--output_dir={output}",
        f"--steps={steps}",
        "--save_freq=2",
        "--log_freq=1",
        "--batch_size=4",
        "--num_workers=0",
        "--env_eval_freq=0",
    ]
    return run(arguments)


def checkpoint(output: Path, step: int) -> Path:
    return output / CHECKPOINTS_DIR / f"{step:06d}" / PRETRAINED_MODEL_DIR


@pytest.mark.parametrize(
    ("run", "tokens"),
    [pytest.param(as_a_command, 0, id="M=0", marks=pytest.mark.full), pytest.param(in_this_process, 2, id="M=2")],
)
def test_it_trains_saves_and_resumes(points: Path, tmp_path: Path, run: Run, tokens: int) -> None:
    output = tmp_path / "run"
    log = start(run, points, output, steps=4, num_belief_tokens=tokens)
    assert "weight_mean" in log
    middle, end = (PTRPolicy.from_pretrained(checkpoint(output, step)) for step in (2, 4))
    assert (middle.objective.step, end.objective.step) == (2, 4)
    assert len(end.objective.queue) > len(middle.objective.queue) > 0
    assert int(end.objective.controller.updates) == 2
    assert end.objective.warmup_steps == 2
    assert not tensors_equal(middle.base.state_dict(), end.base.state_dict())
    config = read_config(checkpoint(output, 4))
    assert isinstance(config, PTRConfig)
    assert (config.base["type"], config.num_belief_tokens, config.base_config.chunk_size) == ("act", tokens, 4)

    in_this_process([f"--config_path={checkpoint(output, 2) / 'train_config.json'}", "--resume=true"])
    resumed = PTRPolicy.from_pretrained(checkpoint(output, 4))
    assert resumed.objective.step == 4
    assert tensors_equal(resumed.state_dict(), end.state_dict())


@pytest.mark.full
def test_wrong_bounds_of_episodes_are_set_right_for_lerobots_own_dataset(points: Path, tmp_path: Path) -> None:
    shutil.copytree(points, tmp_path / "off")
    (path,) = (tmp_path / "off" / "meta" / "episodes").rglob("*.parquet")
    rows = pq.read_table(path).to_pandas()
    pq.write_table(pa.Table.from_pandas(rows.assign(dataset_to_index=rows["dataset_from_index"] + 1)), path)
    logs = [start(in_this_process, root, tmp_path / f"run_{root.name}", steps=1) for root in (points, tmp_path / "off")]
    losses = [re.findall(r"loss:\S+", log) for log in logs]
    assert losses[0] == losses[1] != []
    assert "dataset_from_index and dataset_to_index" in logs[1]


@pytest.mark.full
def test_a_preset_with_a_scorer_weighs_the_episodes_of_lerobots_data(points: Path, tmp_path: Path) -> None:
    settings = {"preset": "ptr_calibrated", "score_refresh_steps": 1, "scorer_warmup_steps": 1, "segment_length": 1}
    start(in_this_process, points, tmp_path / "run", steps=4, **settings)
    policy = PTRPolicy.from_pretrained(checkpoint(tmp_path / "run", 4))
    assert policy.config.hyperparameters().items() >= (PRESETS["ptr_calibrated"].fields | settings).items()
    assert len(policy.objective.weigher.memory.first_slot) == 4
    assert int(policy.objective.weigher.memory.count.sum()) > 0
