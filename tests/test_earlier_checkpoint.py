"""A checkpoint that version 0.1 has written: it loads, and its run goes on as it went on then.

    python tests/test_earlier_checkpoint.py FOLDER      # write one of now, with its figures, into a new folder

On the machine that recorded them the figures are bit-equal; on another processor they differ by rounding.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.policies.tiny import tiny_act

EARLIER = Path(__file__).with_name("earlier_checkpoint")
SAVED, END = 4, 8
COLUMNS = ("loss", "grad_norm", "accuracy", "score", "weight_mean", "weight_max", "learning_rate")


def write_points(root: Path) -> Path:
    """Four episodes of a point that moves to its goal, with the goal as the state of the environment."""
    sizes = {"observation.state": 3, "observation.environment_state": 2, "action": 2}
    features = {key: {"dtype": "float32", "shape": (size,), "names": None} for key, size in sizes.items()}
    dataset = LeRobotDataset.create("tests/earlier", 10, features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for length in (14, 11, 13, 12):
        point, goal = random.uniform(0.2, 0.8, (2, 2))
        for frame in range(length):
            action = 0.2 * (goal - point) + random.normal(0, 0.01, 2)
            item = {"observation.state": [*point, frame / 10], "observation.environment_state": goal, "action": action}
            dataset.add_frame({key: np.float32(value) for key, value in item.items()} | {"task": "reach the goal"})
            point = point + action
        dataset.save_episode()
    dataset.finalize()
    return root


def run(folder: Path, root: Path) -> PTRTrainer:
    """A run whose checkpoint of step 4 lies between the log rows of steps 3 and 6, in the middle of an epoch."""
    sizes = {"chunk_size": 4, "dim_model": 8, "dim_feedforward": 8, "n_encoder_layers": 1, "n_heads": 2}
    policy = tiny_act(LeRobotDatasetMetadata("tests/earlier", root=root).features, **sizes)
    args = PTRTrainingArguments(
        output_dir=str(folder),
        preset="ptr",
        segment_length=2,
        num_belief_tokens=2,
        scorer_dim=16,
        queue_size=16,
        queue_negatives=4,
        scorer_warmup_steps=1,
        controller_interval=2,
        max_steps=END,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=3,
        save_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(0)
    return PTRTrainer(policy, args, root)


def outcome(trainer: PTRTrainer) -> dict[str, Any]:
    """The figures of every log row, and Σ|θ| of policy and side pathway after the last step."""
    *rows, last = trainer.state.log_history
    found: dict[str, Any] = {name: [row[name] for row in rows] for name in COLUMNS}
    total = sum(float(value.detach().double().abs().sum()) for value in trainer.policy.state_dict().values())
    return {**found, "train_loss": last["train_loss"], "parameters": total}


def actions(folder: Path) -> list[float]:
    """What the policy of a checkpoint does at first, without a processor."""
    policy = PTRPolicy.from_pretrained(folder).eval()
    shown = {"observation.state": torch.ones(1, 3), "observation.environment_state": torch.zeros(1, 2)}
    with torch.no_grad():
        return [float(value) for value in policy.select_action({**shown, "task": ["reach the goal"]}).flatten()]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((EARLIER / "expected.json").read_text())


def test_it_goes_on_as_it_did(expected: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / f"checkpoint-{SAVED}"
    shutil.copytree(EARLIER / checkpoint.name, checkpoint)
    trainer = run(checkpoint.parent, write_points(tmp_path / "points"))
    trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in trainer.state.log_history] == [3, 6, END, END]
    found = outcome(trainer)
    for name, values in expected["outcome"].items():
        assert found[name] == pytest.approx(values, rel=1e-3), name


def test_lerobot_parses_its_configuration_which_says_how_large_the_data_were() -> None:
    folder = EARLIER / f"checkpoint-{SAVED}"
    assert "num_episodes" in json.loads((folder / "config.json").read_text())
    config = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(config, PTRConfig)
    assert config.num_episodes is None


def test_its_policy_acts_as_it_did(expected: dict[str, Any]) -> None:
    assert actions(EARLIER / f"checkpoint-{SAVED}") == pytest.approx(expected["actions"], rel=1e-3)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        trained = run(Path(scratch) / "run", write_points(Path(scratch) / "points"))
        trained.train()
        shutil.copytree(Path(scratch) / "run" / f"checkpoint-{SAVED}", target / f"checkpoint-{SAVED}")
    figures = {"outcome": outcome(trained), "actions": actions(target / f"checkpoint-{SAVED}")}
    (target / "expected.json").write_text(json.dumps(figures, indent=1) + "\n")
