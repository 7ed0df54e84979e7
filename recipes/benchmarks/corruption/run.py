"""One run of the corruption benchmark: post-train the pretrained policy on corrupted demonstrations, judge it and its weights."""

import contextlib
import io
import json
import logging
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from filelock import FileLock
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from transformers import TrainerCallback, set_seed

from benchmarks.corruption.conditions import (
    EXPERT,
    SLOPPY,
    load_recordings,
    record_benchmark,
    save_recordings,
    write_condition,
)
from benchmarks.judged import inspected
from ptr_hf import PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.data.demonstrations import load_truth, truth_path
from ptr_hf.envs.metaworld_tasks import PIXEL_TASKS, STATE_TASKS, Goals, Track
from ptr_hf.hyperparameters import AUTO
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.evaluation import detection, effective_sample_share, episode_weights
from ptr_hf.scores import SlotMemory
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER
from ptr_hf.training.rollouts import evaluate_success

TASKS: dict[str, tuple[str, ...]] = {"state": STATE_TASKS, "pixels": PIXEL_TASKS}
# sizes of the VLM, and of the policy around it
TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "state": (
        {"text_dim": 64, "text_layers": 2, "text_heads": 2, "image_size": 28, "vision_dim": 32, "vision_layers": 1},
        {"expert_width_multiplier": 1.0, "tokenizer_max_length": 16},
    ),
    "pixels": ({"text_heads": 2}, {}),
}
PRETRAIN_SEED, TRAIN_SEED, TEST_SEED = 50_000, 0, 100_000
"""First start of the demonstrations to pretrain on, to post-train on, and of the held-out starts: they never meet."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a track share."""

    track: Track
    demonstrations: int = 50
    pretraining_demonstrations: int = 50
    pretraining_steps: int = 4000
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 5e-4
    test_starts: int = 15
    chunk_size: int = 16
    operators: tuple[str, ...] = (EXPERT, SLOPPY)
    freeze_vision: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS[self.track]


SETTINGS = {
    "state": Setting("state"),
    "pixels": Setting(
        "pixels",
        demonstrations=30,
        pretraining_demonstrations=30,
        pretraining_steps=1200,
        steps=300,
        test_starts=10,
        operators=(EXPERT,),
        freeze_vision=True,
    ),
}
"""Pixels cost ten times as much, so there is less of everything; the vision tower is frozen after pretraining."""


@dataclass(frozen=True)
class Cell:
    """One run: a preset (with further options of the method), a condition of the data, a seed."""

    preset: str
    condition: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """How the run is called in the results: its preset, or what was changed in it."""
        return self.label or self.preset

    @property
    def key(self) -> tuple[str, str, int]:
        return self.name, self.condition, self.seed

    def command(self, setting: Setting) -> str:
        """The command line that repeats the run."""
        options = json.dumps({"preset": self.preset, **self.options})
        return (
            f"python recipes/benchmarks/corruption/benchmark.py --track {setting.track} --conditions {self.condition} "
            f"--seeds {self.seed} --run {shlex.quote(options)} --label {self.name}"
        )


def prepare(setting: Setting, workspace: Path) -> None:
    """Record the clean demonstrations and pretrain the policy, once; what is there already is kept."""
    _be_quiet()
    demonstrations: tuple[tuple[str, Goals, int, int, tuple[str, ...]], ...] = (
        ("train", "train", setting.demonstrations, TRAIN_SEED, setting.operators),
        ("pretrain", "pretrain", setting.pretraining_demonstrations, PRETRAIN_SEED, (EXPERT,)),
    )
    for name, goals, count, first, operators in demonstrations:
        folder = workspace / f"recordings_{name}"
        if not truth_path(folder).is_file():
            recordings = record_benchmark(setting.track, setting.tasks, count, first, goals, operators)
            save_recordings(folder, recordings, overwrite=True)
    pretrained_policy(setting, workspace)


def pretrained_policy(setting: Setting, workspace: Path) -> Path:
    """The folder of the policy that every run starts from: SFT on clean demonstrations whose goals lie elsewhere."""
    folder = workspace / "pretrained"
    if (folder / "model.safetensors").is_file():
        return folder
    dataset = condition_dataset(setting, workspace, "clean", 0, "pretrain")
    demonstrations = LeRobotDataset(dataset.name, root=dataset, video_backend="pyav")
    meta = demonstrations.meta
    vlm_sizes, options = TINY[setting.track]
    vlm = write_tiny_vlm(workspace / "vlm", texts=list(meta.tasks.index), **vlm_sizes)
    if meta.camera_keys:
        shown = torch.linspace(0, len(demonstrations) - 1, 32).long().tolist()
        options = options | {
            "frames": {key: torch.stack([demonstrations[i][key] for i in shown]) for key in meta.camera_keys}
        }
    policy = tiny_smolvla(meta.features, vlm.resolve(), chunk_size=setting.chunk_size, seed=0, num_steps=5, **options)
    args = PTRTrainingArguments(
        **_arguments(setting, folder, setting.pretraining_steps, 0) | {"learning_rate": 1e-3}, preset="sft"
    )
    trainer = PTRTrainer(policy, args, dataset)
    trainer.train()
    policy.save_pretrained(folder)
    return folder


def load_pretrained(setting: Setting, workspace: Path) -> PreTrainedPolicy:
    """The policy every run starts from, with its vision tower frozen where the track says so."""
    folder = workspace / "pretrained"
    config = PreTrainedConfig.from_pretrained(folder)
    if setting.freeze_vision:
        vars(config)["freeze_vision_encoder"] = True
    return get_policy_class(config.type).from_pretrained(folder, config=config)


def condition_dataset(setting: Setting, workspace: Path, condition: str, seed: int, name: str = "train") -> Path:
    """The LeRobotDataset of a condition and a seed, written at first use by one of the processes that want it."""
    folder = workspace / "datasets" / f"{name}_{condition}_{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.with_suffix(".done").exists():
            recordings = load_recordings(workspace / f"recordings_{name}")
            write_condition(folder, setting.track, condition, seed, recordings, overwrite=True)
            folder.with_suffix(".done").touch()
    return folder


def run(setting: Setting, cell: Cell, workspace: Path) -> list[dict[str, Any]]:
    """Train, score, evaluate; returns the row of the results."""
    _be_quiet()
    dataset = condition_dataset(setting, workspace, cell.condition, cell.seed)
    folder = workspace / "runs" / f"{cell.name}_{cell.condition}_{cell.seed}"
    set_seed(cell.seed)
    options = {"segment_length": 1} | cell.options
    args = PTRTrainingArguments(**_arguments(setting, folder, setting.steps, cell.seed), preset=cell.preset, **options)
    trainer = PTRTrainer(load_pretrained(setting, workspace), args, dataset)
    truth = load_truth(dataset).kinds()
    quarter = _ScoreAt(setting.steps // 4, trainer, cell.seed)
    trainer.add_callback(quarter)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    trainer.save_model()
    row: dict[str, Any] = {"preset": cell.name, "condition": cell.condition, "seed": cell.seed}
    row |= outcome(setting, trainer, cell.seed)
    if trainer.policy.objective is not None:
        scores = scored(trainer, cell.seed)
        row |= judged(scores, truth) | {"corr_motion": _correlation(scores.weight, motion(dataset, scores))}
        if quarter.scores is not None:
            early = judged(quarter.scores, truth)
            row |= {f"{name}_25": early[name] for name in ("auc_chunk", "auc_episode")}
    elif trainer.policy.config.weights == AUTO:
        row |= inspected(DatasetScores.load(folder / INSPECTION_FOLDER), truth)
        row["ess"] = trainer.policy.config.weights_record["effective_sample_size"]
    return [row | {"command": cell.command(setting)}]


def outcome(setting: Setting, trainer: PTRTrainer, seed: int) -> dict[str, Any]:
    """Success on held-out starts, other ones for every seed."""
    first = TEST_SEED + 1000 * seed
    rollouts = evaluate_success(
        trainer.policy,
        trainer.preprocessor,
        trainer.postprocessor,
        tasks=setting.tasks,
        track=setting.track,
        seeds=range(first, first + setting.test_starts),
        seed=seed,
        progress=False,
    )
    by_task = {task: round(value, 4) for task, value in rollouts.by_task.items()}
    return {"success": rollouts.mean, "by_task": json.dumps(by_task)}


def scored(trainer: PTRTrainer, seed: int) -> ChunkScores:
    """Score and weight of every chunk of the training data; a weight kept per episode is the one in use at this step."""
    scores = score_dataset(
        trainer.policy,
        trainer.train_dataset,
        preprocessor=trainer.preprocessor,
        batch_size=32,
        seed=seed,
        progress=False,
    )
    objective = trainer.policy.objective
    memory = None if objective is None or objective.weigher is None else objective.weigher.memory
    if not isinstance(memory, SlotMemory):
        return scores
    slot = memory.slot(torch.from_numpy(scores.episode_index), torch.from_numpy(scores.index))
    return replace(scores, weight=memory.weight[slot].double().numpy())


def motion(dataset: Path, scores: ChunkScores) -> np.ndarray:
    """Mean square of the recorded actions from each chunk's first frame to the next chunk's."""
    action = np.stack(pq.read_table(dataset / "data", columns=["action"])["action"].to_numpy())
    squares = np.square(action).mean(axis=1)
    return np.add.reduceat(squares, scores.index) / np.diff(np.append(scores.index, len(squares)))


def judged(scores: ChunkScores, truth: dict[int, str]) -> dict[str, Any]:
    """What the weights are worth: AUC against the truth, spread, what they follow."""
    weight = scores.weight[scores.usable]
    last = _is_last_chunk(scores)
    corrupted = set(truth.values()) != {"clean"}
    episodes = episode_weights(scores)
    lengths = {episode: int(scores.frame_index[scores.episode_index == episode[1]].max()) for episode in episodes}
    done = sorted({part for kind in truth.values() for part in kind.split("+")} - {"clean"})
    return {
        "auc_chunk": detection(scores, truth, level="chunk").auc if corrupted else "",
        "auc_episode": detection(scores, truth).auc if corrupted else "",
        "auc_by_kind": json.dumps({kind: round(detection(scores, truth, kind=kind).auc, 4) for kind in done}),
        "auc_by_score": json.dumps(_auc_by_score(scores, truth)) if corrupted else "",
        "ess": effective_sample_share(scores),
        "weight_at_end": float(scores.weight[last].mean() / scores.weight[~last].mean()),
        "corr_length": _correlation(list(episodes.values()), list(lengths.values())),
        "corr_loss": _correlation(weight, scores.loss[scores.usable]),
        "histogram": json.dumps(np.histogram(weight, bins=np.geomspace(0.01, 4.5, 21).clip(max=4.5))[0].tolist()),
    }


def _auc_by_score(scores: ChunkScores, truth: dict[int, str]) -> dict[str, float]:
    """AUC of every single score's episode mean, and of the policy's own loss."""
    single = scores.verdicts | {"negated loss": -scores.loss}
    found = {}
    for name, verdict in single.items():
        found[name] = round(detection(replace(scores, weight=verdict), truth).auc, 4)
    return found


def _is_last_chunk(scores: ChunkScores) -> np.ndarray:
    return np.append(np.diff(scores.episode_index) != 0, True)


def _correlation(x: Any, y: Any) -> float:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 3 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return float("nan")
    return float(np.corrcoef(x[known].argsort().argsort(), y[known].argsort().argsort())[0, 1])


def _arguments(setting: Setting, folder: Path, steps: int, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": setting.batch_size,
        "learning_rate": setting.learning_rate,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "in_memory": True,
        "seed": seed,
    }


class _ScoreAt(TrainerCallback):
    """Scores the training data once, in the middle of training."""

    def __init__(self, step: int, trainer: PTRTrainer, seed: int) -> None:
        self.step, self.trainer, self.seed = step, trainer, seed
        self.scores: ChunkScores | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.trainer.policy.objective is not None:
            self.scores = scored(self.trainer, self.seed)


def _be_quiet() -> None:
    torch.set_num_threads(1)
    av.logging.set_libav_level(av.logging.ERROR)
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
