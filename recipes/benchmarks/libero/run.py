"""One run of the LIBERO benchmark: post-train the pretrained policy on a condition's demonstrations, then let it act."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Bool
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE
from transformers import set_seed

from benchmarks.judged import inspected
from benchmarks.libero.cameras import CAMERAS, Cameras
from benchmarks.libero.conditions import FIRST_TEST_START, Pool, condition_dataset, pretraining_dataset
from benchmarks.libero.scene import LiberoScene, Starts, Suite, instruction
from benchmarks.quiet import be_quiet
from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.cli.export import export
from ptr_hf.data.demonstrations import CLEAN, load_truth
from ptr_hf.hyperparameters import AUTO
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER
from ptr_hf.scoring.inspection import inspect_dataset

_NO_BELIEF = {"num_belief_tokens": 0}
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sft": ("sft", {}),
    "ptr_offline": ("ptr_offline", {}),
    "ptr_offline_pictures": ("ptr_offline", {}),
    "oracle": ("oracle", {}),
    "ptr": ("ptr", _NO_BELIEF),
    "small_loss": ("small_loss", {}),
    "random_weights": ("random_weights", {}),
    "ptr_calibrated": ("ptr_calibrated", {}),
    "clean_only": ("sft", {}),
    "blind": ("sft", {}),
}
"""Name of a run -> preset of the package, and what is changed in it. ``clean_only`` is plain fine-tuning on the good episodes;
``blind`` a policy that is not told where the objects are, on the good episodes too; ``ptr_offline_pictures`` an inspection that
looks at pictures as well."""
TEXT: dict[str, Any] = {"text_dim": 64, "text_layers": 2, "text_heads": 2}
POLICY_FOLDER = "policy"
"""In a run's folder: what it trained, for lerobot-eval. Pixels only."""
VISION: Mapping[str, dict[str, Any]] = {
    "states": {"image_size": 28, "vision_dim": 32, "vision_layers": 1},
    "pixels": {"vision_dim": 96, "vision_layers": 4},
}
"""Without cameras the policy leaves its vision tower out."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a track share.

    Args:
        pool: of demonstrations.
        pretraining_steps: of the policy that every run starts from.
        steps: of a run.
        test_starts: held-out starts of every task.
        test_steps: after which an episode has failed.
    """

    pool: Pool = field(default_factory=Pool)
    pretraining_steps: int = 400
    steps: int = 400
    batch_size: int = 128
    pretraining_rate: float = 2e-3
    learning_rate: float = 1e-3
    chunk_size: int = 8
    test_starts: int = 8
    test_steps: int = 200


SETTINGS: Mapping[str, Setting] = {
    "states": Setting(),
    "pixels": Setting(
        Pool(track="pixels", tasks=(0, 1, 6), pretraining=8, recorded=24, operators=("failed_attempt",), used=12),
        pretraining_steps=1500,
        steps=400,
        batch_size=32,
        pretraining_rate=1e-3,
        learning_rate=5e-4,
    ),
}
"""Pixels cost ten times as much, so there is less of everything; the vision tower is frozen after pretraining."""


@dataclass(frozen=True)
class Cell:
    """One run: a name in :data:`METHODS`, a condition, a seed."""

    preset: str
    condition: str
    seed: int

    def command(self, track: str) -> str:
        """The command line that repeats the run."""
        return (
            f"python recipes/benchmarks/libero/benchmark.py --track {track} --presets {self.preset} "
            f"--conditions {self.condition} --seeds {self.seed}"
        )


def pretrained_policy(setting: Setting, workspace: Path, blind: bool = False) -> Path:
    """The folder of the policy that runs start from: learnt from the expert alone, on other starts."""
    be_quiet()
    folder = workspace / ("pretrained_blind" if blind else "pretrained")
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "model.safetensors").is_file():
            return folder
        source = pretraining_dataset(workspace, blind)
        dataset = LeRobotDataset(source.name, root=source, video_backend="pyav")
        meta = dataset.meta
        texts = list(meta.tasks.index)
        vlm = write_tiny_vlm(folder.with_name(f"{folder.name}_vlm"), texts=texts, **TEXT, **VISION[setting.pool.track])
        shown = torch.linspace(0, len(dataset) - 1, 32).long().tolist() if meta.camera_keys else []
        policy = tiny_smolvla(
            meta.features,
            vlm.resolve(),
            chunk_size=setting.chunk_size,
            num_steps=5,
            expert_width_multiplier=1.0,
            tokenizer_max_length=24,
            frames={key: torch.stack([dataset[n][key] for n in shown]) for key in meta.camera_keys} or None,
        )
        args = _arguments(setting, folder / "run", 0, "sft", setting.pretraining_steps, setting.pretraining_rate)
        trainer = PTRTrainer(policy, args, source)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        if meta.camera_keys:  # runs train what follows the tower
            vars(policy.config)["freeze_vision_encoder"] = True
        trainer.save_model(str(folder / "run"))
        export(folder / "run", folder)  # a LeRobot policy, for any preset to start from
    return folder


def run(setting: Setting, cell: Cell, workspace: Path) -> list[dict[str, Any]]:
    """Train and evaluate; returns the row of the results."""
    be_quiet()
    blind = cell.preset == "blind"
    source = condition_dataset(setting.pool, workspace, cell.condition, cell.seed, blind)
    truth = load_truth(source).kinds()
    folder = workspace / "runs" / f"{cell.preset}_{cell.condition}_{cell.seed}"
    set_seed(cell.seed)
    start = pretrained_policy(setting, workspace, blind)
    preset, changed = METHODS[cell.preset]
    scores = None
    if cell.preset == "ptr_offline_pictures":
        scores = inspect_dataset(str(source), policy="thumbnails", seed=cell.seed, progress=False)
        changed = {"weights": str(scores.save(folder / INSPECTION_FOLDER))}
    changed = {"statistics": "policy", **changed}
    args = _arguments(setting, folder, cell.seed, preset, setting.steps, setting.learning_rate, **changed)
    data: Any = source
    if cell.preset in ("clean_only", "blind"):
        good = [episode for episode, kind in truth.items() if kind == CLEAN]
        data = LeRobotDataset(source.name, root=source, episodes=sorted(good), video_backend="pyav")
    trainer = PTRTrainer(str(start), args, data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    if setting.pool.track == "pixels":
        trainer.save_model(str(folder / POLICY_FOLDER))
    success = evaluate(trainer.policy, trainer.preprocessor, trainer.postprocessor, setting, cell.seed, blind=blind)
    row: dict[str, Any] = {
        "preset": cell.preset,
        "condition": cell.condition,
        "seed": cell.seed,
        "success": float(success.mean()),
        "by_task": json.dumps(
            {str(task): own for task, own in zip(setting.pool.tasks, success.mean(1).tolist(), strict=True)}
        ),
    }
    if trainer.policy.config.weights == AUTO:
        scores = DatasetScores.load(folder / INSPECTION_FOLDER)
    if scores is not None:
        row |= inspected(scores, truth)
    return [row | {"command": cell.command(setting.pool.track)}]


@cache
def shared_scenes(suite: Suite, tasks: Sequence[int]) -> list[LiberoScene]:
    """This process's scenes: building one takes seconds."""
    return [LiberoScene(suite, task) for task in tasks]


@cache
def shared_cameras(suite: Suite, tasks: Sequence[int], size: int, fast: bool) -> list[Cameras]:
    """This process's cameras of those scenes."""
    return [Cameras(scene, size, fast) for scene in shared_scenes(suite, tasks)]


def evaluate(
    policy: Any,
    preprocessor: Any,
    postprocessor: Any,
    setting: Setting,
    seed: int,
    starts: Starts | None = None,
    blind: bool = False,
    fast: bool = True,
) -> Bool[np.ndarray, "tasks starts"]:
    """Which starts of every task the policy solves.

    All episodes advance together, a chunk at a time: one prediction for those that go on, then each carries out its actions;
    cameras draw only what a prediction reads.

    Args:
        policy: predicts chunks of actions.
        preprocessor: from what the robot observes to what the policy reads.
        postprocessor: from what it predicts to actions.
        setting: names tasks, cameras, and how many starts and steps.
        seed: of the held-out starts, and of the policy's own draws.
        starts: LIBERO's own starts in place of the held-out ones, from the first on.
        blind: leave out where the objects are.
        fast: cameras without anti-aliasing, shadows and reflections, as demonstrations are recorded.
    """
    pool = setting.pool
    scenes = shared_scenes(pool.suite, pool.tasks)
    if pool.track == "pixels":
        cameras: list[Any] = shared_cameras(pool.suite, pool.tasks, pool.image_size, fast)
    else:
        cameras = [None] * len(scenes)

    def observation(number: int) -> dict[str, torch.Tensor]:
        scene, camera = scenes[number], cameras[number]
        state = scene.state() if blind or camera is not None else np.concatenate([scene.state(), scene.object_state()])
        found = {OBS_STATE: torch.from_numpy(state)}
        if camera is not None:
            seen = camera.pictures()
            found |= {key: torch.from_numpy(seen[key]).permute(2, 0, 1) / 255 for key in CAMERAS}
        return found

    first = 0 if starts == "official" else FIRST_TEST_START + 1_000 * seed
    episodes = [(number, start) for number in range(len(scenes)) for start in range(first, first + setting.test_starts)]
    snapshots, observed = [], []
    for number, start in episodes:
        scenes[number].reset(start, starts or pool.starts)
        snapshots.append(scenes[number].snapshot())
        observed.append(observation(number))
    policy.eval()
    policy.reset()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        while running := [
            n for n, done in enumerate(snapshots) if not done.success and done.steps < setting.test_steps
        ]:
            batch: dict[str, Any] = {
                key: torch.stack([observed[n][key] for n in running]) for key in observed[running[0]]
            }
            batch["task"] = [instruction(pool.suite, pool.tasks[episodes[n][0]]) for n in running]
            chunks = postprocessor(policy.predict_action_chunk(preprocessor(batch))).float().cpu().numpy()
            for n, chunk in zip(running, chunks, strict=True):
                scene = scenes[episodes[n][0]]
                scene.restore(snapshots[n])
                for action in chunk:
                    scene.step(action)
                    if scene.success or scene.steps >= setting.test_steps:
                        break
                snapshots[n], observed[n] = scene.snapshot(), observation(episodes[n][0])
    return np.array([snapshot.success for snapshot in snapshots]).reshape(len(scenes), setting.test_starts)


def _arguments(
    setting: Setting, folder: Path, seed: int, preset: str, steps: int, rate: float, **changed: Any
) -> PTRTrainingArguments:
    return PTRTrainingArguments(
        output_dir=str(folder),
        preset=preset,
        segment_length=1,
        max_steps=steps,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=rate,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        in_memory=True,
        seed=seed,
        **changed,
    )
