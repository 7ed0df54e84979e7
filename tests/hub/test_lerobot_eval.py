"""`lerobot-eval` in real processes, on checkpoints that `PTRTrainer` pushed and the command pulls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lerobot.datasets import LeRobotDatasetMetadata
from loopback_hub import LoopbackHub, environment
from small_policies import CHUNK, vlm_folder

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.policies.tiny import tiny_smolvla

BIN = Path(sys.executable).parent
REPO = "lab/policy"

# LeRobot's evaluation as the console script runs it, where nobody can import ptr_hf; its Meta-World renders 500 large images
# an episode, which the first ten steps spare.
WITHOUT_PTR_HF = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ptr_hf", "lerobot_policy_ptr"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
from lerobot.envs.metaworld import MetaworldEnv
from lerobot.scripts.lerobot_eval import main

built = MetaworldEnv.__init__
def shorter(self, *args, **kwargs):
    built(self, *args, **kwargs)
    self._max_episode_steps = 10
MetaworldEnv.__init__ = shorter
main()
assert not [name for name in sys.modules if name.startswith("ptr_hf")]
"""


def publish(folder: Path, tokens: int) -> None:
    """One step on the bundled demonstrations, pushed."""
    root = bundled_demonstrations("heldout")
    args = PTRTrainingArguments(
        preset="ptr",
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        segment_length=2,
        queue_size=32,
        queue_negatives=8,
        num_belief_tokens=tokens,
        hub_model_id=REPO,
    )
    features = LeRobotDatasetMetadata(root.name, root=root).features
    trainer = PTRTrainer(tiny_smolvla(features, vlm_folder(), chunk_size=CHUNK, num_steps=2), args, root)
    trainer.train()
    trainer.push_to_hub()


def run(command: list[str], hub: LoopbackHub, folder: Path) -> str:
    variables = {**environment(hub, folder / "process_home"), "MUJOCO_GL": "egl"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert hub.seen(r"/resolve/.*/model\.safetensors"), "the weights came from the hub"
    return done.stdout + done.stderr


@pytest.mark.full
def test_without_belief_nobody_needs_ptr_hf(online: LoopbackHub, tmp_path: Path) -> None:
    """In LeRobot's own Meta-World environment, in an interpreter that cannot import this project."""
    publish(tmp_path / "run", tokens=0)
    log = run(
        [
            *(sys.executable, "-c", WITHOUT_PTR_HF),
            f"--policy.path={REPO}",
            "--policy.device=cpu",
            *("--env.type=metaworld", "--env.task=reach-v3"),
            *("--eval.n_episodes=1", "--eval.batch_size=1", "--output_dir=out"),
        ],
        online,
        tmp_path,
    )
    assert "Could not import third-party plugin: lerobot_policy_ptr" in log
    found = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 1
    assert len(found["per_task"][0]["metrics"]["successes"]) == 1


@pytest.mark.full
def test_with_belief_the_command_finds_the_plugin(online: LoopbackHub, tmp_path: Path) -> None:
    publish(tmp_path / "run", tokens=2)
    run(
        [
            str(BIN / "lerobot-eval"),
            f"--policy.path={REPO}",
            "--policy.device=cpu",
            "--env.type=ptr_metaworld",
            "--env.task=reach-left,faucet-open-v3",
            *("--env.track=pixels", "--env.episode_length=10"),
            *("--eval.n_episodes=4", "--eval.batch_size=2", "--output_dir=out"),
        ],
        online,
        tmp_path,
    )
    found = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert [task["task_group"] for task in found["per_task"]] == ["reach-left", "faucet-open-v3"]
    assert [len(task["metrics"]["successes"]) for task in found["per_task"]] == [4, 4]
