"""Does the benchmark's own evaluation agree with `lerobot-eval`, and do its faster cameras change success?

    .venv-libero/bin/python recipes/benchmarks/libero/compare_evaluation.py \
        --runs sft_clean_1 ptr_offline_combined_1 --tasks 6 --count 10

takes policies that `benchmark.py --track pixels` has trained and lets them act on LIBERO's own first starts of the benchmark's
tasks: in this process with the cameras that demonstrations are recorded with, with LeRobot's cameras, and by `lerobot-eval`. The
policies' own draws differ between the three. Results go to `results/libero_evaluation.json`. `--film` draws instead how the runs
act from one held-out start, a row a run, as the first camera shows it to them:

    ... compare_evaluation.py --runs sft_combined_0 ptr_offline_combined_0 --film results/figures/libero_policies.png --task 6
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.constants import OBS_STATE
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.commits import commit
from benchmarks.libero.cameras import CAMERAS, Cameras
from benchmarks.libero.conditions import FIRST_TEST_START
from benchmarks.libero.install_assets import install
from benchmarks.libero.run import POLICY_FOLDER, SETTINGS, Setting, evaluate
from benchmarks.libero.scene import LiberoScene, instruction


def by_lerobot(policy: Path, setting: Setting) -> dict[int, float]:
    """Success of each task as `lerobot-eval` measures it."""
    pool = setting.pool
    with TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "lerobot.scripts.lerobot_eval", f"--policy.path={policy}", "--policy.device=cpu"),
            *("--env.type=libero", f"--env.task={pool.suite}", f"--env.task_ids={list(pool.tasks)}"),
            *("--env.hard_reset=false", f"--env.episode_length={setting.test_steps}"),
            *(f"--env.observation_height={pool.image_size}", f"--env.observation_width={pool.image_size}"),
            *(f"--eval.n_episodes={setting.test_starts}", "--eval.batch_size=1", "--eval.use_async_envs=false"),
            f"--output_dir={folder}/out",
        ]
        subprocess.run(command, check=True, env=os.environ | {"LIBERO_CONFIG_PATH": str(install().parent)})
        info = json.loads(Path(folder, "out", "eval_info.json").read_text(encoding="utf-8"))
    found = {part["task_id"]: part["metrics"]["successes"] for part in info["per_task"]}
    return {task: sum(found[task]) / len(found[task]) for task in pool.tasks}


def compare(policy: Path, setting: Setting) -> dict[str, Any]:
    """Success by task, measured in three ways."""
    config = PreTrainedConfig.from_pretrained(policy)
    loaded = get_policy_class(config.type).from_pretrained(policy, config=config)
    preprocessor, postprocessor = make_pre_post_processors(config, pretrained_path=str(policy))
    found = {
        name: dict(
            zip(
                setting.pool.tasks,
                evaluate(loaded, preprocessor, postprocessor, setting, 0, "official", fast=fast).mean(1).tolist(),
                strict=True,
            )
        )
        for name, fast in (("in process", True), ("in process, LeRobot's cameras", False))
    }
    found["lerobot-eval"] = by_lerobot(policy, setting)
    return {name: {"mean": sum(own.values()) / len(own), "by_task": own} for name, own in found.items()}


def film(policy: Path, setting: Setting, task: int, start: int, frames: int = 8) -> np.ndarray:
    """Frames of an episode from its first to its last, side by side."""
    config = PreTrainedConfig.from_pretrained(policy)
    loaded = get_policy_class(config.type).from_pretrained(policy, config=config).eval()
    preprocessor, postprocessor = make_pre_post_processors(config, pretrained_path=str(policy))
    pool = setting.pool
    scene = LiberoScene(pool.suite, task)
    shown = []
    with Cameras(scene, pool.image_size) as cameras, torch.inference_mode():
        torch.manual_seed(start)
        scene.reset(start, pool.starts)
        while not scene.success and scene.steps < setting.test_steps:
            seen = cameras.pictures()
            shown.append(seen[next(iter(CAMERAS))])
            observed: dict[str, Any] = {OBS_STATE: torch.from_numpy(scene.state())[None]}
            observed |= {key: torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 for key, picture in seen.items()}
            observed["task"] = [instruction(pool.suite, task)]
            for action in postprocessor(loaded.predict_action_chunk(preprocessor(observed)))[0].float().numpy():
                scene.step(action)
                if scene.success or scene.steps >= setting.test_steps:
                    break
        shown.append(cameras.pictures()[next(iter(CAMERAS))])
    print(f"{policy.parent.name}: {'solved' if scene.success else 'not solved'} after {scene.steps} steps")
    return np.concatenate([shown[n] for n in np.linspace(0, len(shown) - 1, frames).round().astype(int)], axis=1)


def main(argv: list[str]) -> None:
    """Compare, and write what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--runs", nargs="+", required=True, help="folders of runs in the workspace: preset_condition_seed"
    )
    options.add_argument("--tasks", nargs="+", type=int, help="of the benchmark's; all of them by default")
    options.add_argument("--count", type=int, default=10, help="starts of each task")
    options.add_argument("--workspace", type=Path, default=Path("outputs/libero"), help="of the benchmark")
    options.add_argument("--results", type=Path, default=Path("results/libero_evaluation.json"), help="file to write")
    options.add_argument(
        "--film", type=Path, help="PNG file of how the runs act from one start; nothing is measured then"
    )
    options.add_argument("--task", type=int, default=SETTINGS["pixels"].pool.tasks[0], help="of the film")
    options.add_argument("--start", type=int, default=FIRST_TEST_START, help="of the film, a held-out one")
    given = options.parse_args(argv)
    setting = replace(SETTINGS["pixels"], test_starts=given.count)
    if unknown := sorted(set(given.tasks or ()) - set(setting.pool.tasks)):
        options.error(f"--tasks {unknown[0]}: the policies have learnt {', '.join(map(str, setting.pool.tasks))}.")
    runs = given.workspace / "pixels" / "runs"
    if given.film is not None:
        rows = [film(runs / name / POLICY_FOLDER, setting, given.task, given.start) for name in given.runs]
        picture = Image.fromarray(np.concatenate(rows)).convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
        picture.save(given.film, optimize=True)
        return
    setting = replace(setting, pool=replace(setting.pool, tasks=tuple(given.tasks or setting.pool.tasks)))
    found = {name: compare(runs / name / POLICY_FOLDER, setting) for name in given.runs}
    tasks = " ".join(map(str, setting.pool.tasks))
    command = (
        f"python recipes/benchmarks/libero/compare_evaluation.py --runs {' '.join(given.runs)} --tasks {tasks} "
        f"--count {given.count}"
    )
    content = {"command": command, "commit": commit(), "episodes": given.count * len(setting.pool.tasks), "runs": found}
    given.results.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
