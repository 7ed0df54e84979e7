"""Shows that LIBERO works here: `lerobot-eval` runs LeRobot's own environment with a tiny policy of random weights.

    .venv-libero/bin/python recipes/benchmarks/libero/smoke_test.py

Needs a headless GL, no network and no checkpoint. The policy solves nothing; that the evaluation ends is the test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.libero.install_assets import install
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm

SIZE = 84


def save_random_policy(folder: Path) -> Path:
    """A tiny SmolVLA that reads LIBERO's two cameras and its state of 8."""
    inputs = {
        "observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
        "observation.images.image2": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
        "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
    }
    features = (inputs, {"action": PolicyFeature(FeatureType.ACTION, (7,))})
    policy = tiny_smolvla(features, write_tiny_vlm(folder / "vlm", image_size=SIZE).resolve(), num_steps=1)
    path = folder / "policy"
    policy.save_pretrained(path)
    for processor in make_pre_post_processors(policy.config, dataset_stats={}):
        processor.save_pretrained(path)
    return path


def main(episode_length: int = 5) -> dict[str, float]:
    """Evaluate one short episode of one task, and return LeRobot's figures."""
    config = install()
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            *(sys.executable, "-m", "lerobot.scripts.lerobot_eval"),
            *(f"--policy.path={save_random_policy(Path(folder))}", "--policy.device=cpu"),
            *("--env.type=libero", "--env.task=libero_object", "--env.task_ids=[0]", "--env.hard_reset=false"),
            *(f"--env.episode_length={episode_length}", f"--env.observation_height={SIZE}"),
            *(f"--env.observation_width={SIZE}", "--eval.n_episodes=1", "--eval.batch_size=1"),
            *("--eval.use_async_envs=false", f"--output_dir={out}"),
        ]
        variables = {"MUJOCO_GL": "egl"} | os.environ | {"LIBERO_CONFIG_PATH": str(config.parent)}
        subprocess.run(command, check=True, env=variables)
        return dict(json.loads((out / "eval_info.json").read_text(encoding="utf-8"))["overall"])


if __name__ == "__main__":
    print(main())
