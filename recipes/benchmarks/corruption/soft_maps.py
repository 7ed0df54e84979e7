"""What was tried on top of an inspection: softer maps, the policy's loss as a question, a scorer that is warm.

    python recipes/benchmarks/corruption/soft_maps.py maps combined 101   # files <workspace>/soft/combined_101.<map>.parquet
    python recipes/benchmarks/corruption/soft_maps.py loss delay 101      # the loss of a half-trained policy, a JSON line
    python recipes/benchmarks/corruption/soft_maps.py warm combined 101   # ptr after 600 steps of its scorer alone, a row

The data, the pretrained policy and the evaluation are those of `benchmark.py --track state` beside this file, which also trains
with the files: --run '{"preset": "ptr_offline", "weights": FILE}' --label soft_exp. docs/detection.md says what was found.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.commits import commit
from benchmarks.corruption.benchmark import COLUMNS
from benchmarks.corruption.run import (
    SETTINGS,
    _arguments,
    _be_quiet,
    condition_dataset,
    judged,
    load_pretrained,
    outcome,
    prepare,
    scored,
)
from benchmarks.grid import append
from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.demonstrations import load_truth
from ptr_hf.data.in_memory import collate_segments
from ptr_hf.scoring.consequence_from_action import ConsequenceFromAction
from ptr_hf.scoring.crossfit import CrossFit, FitSettings, Reweigh
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.inspection import QUESTIONS, ask_all, inspect_dataset
from ptr_hf.scoring.question import Answer, Question
from ptr_hf.scoring.recordings import Recordings, read_recordings
from ptr_hf.scoring.verdicts import Verdicts, judge

SETTING = SETTINGS["state"]
LEARNED = ("action_from_consequence", "consequence_from_action", "instruction", "completeness")
"""The questions that say how hard an episode is; the others look for faults of recording."""
FAILS = -3.057
"""z of a question that flags an episode alone: nine questions, 1 % false alarms."""
BETA, WEIGHTS = 1.5, (0.25, 4.0)
"""β, w_min and w_max of preset ptr."""
EVERY, DRAWS = 8, 2
"""Frames between two whose loss is read, and draws of noise for each."""


def soft_maps(scores: DatasetScores) -> dict[str, np.ndarray]:
    """(frames,) the weights of every map; they differ from the inspection's only where something is flagged.

    exp: exp(z / 2), clipped to [1/2, 2], for unflagged episodes; z is the sum of the learned questions' z, each clipped to ±3,
        standardised among the task's unflagged episodes.
    thin: the quarter of each task's unflagged episodes with the lowest z weighs 1/2 to 1.
    keep: episodes that fail the question of completeness alone weigh 1.
    """
    episodes = scores.episodes
    flagged = (episodes["weight"] < 1).to_numpy()
    frames = scores.chunks["weight"].to_numpy(np.float64)
    if not flagged.any():
        return dict.fromkeys(("exp", "thin", "keep"), frames)
    total = episodes[list(LEARNED)].clip(-3, 3).sum(axis=1).to_numpy() / 2
    exp, thin = np.ones(len(episodes)), np.ones(len(episodes))
    for rows in episodes.groupby("task").indices.values():
        good = rows[~flagged[rows]]
        if len(good) < 4:
            continue
        deviation = total[good] - np.median(total[good])
        z = deviation / (1.4826 * np.median(np.abs(deviation)) + 1e-6)
        exp[good] = np.clip(np.exp(z / 2), 0.5, 2)
        lowest = good[np.argsort(z)][: len(good) // 4]
        thin[lowest] = np.linspace(0.5, 1, len(lowest), endpoint=False)
    low = (episodes[list(scores.questions)] < FAILS).to_numpy()
    short = flagged & low[:, scores.questions.index("completeness")] & (low.sum(axis=1) == 1)
    row = pd.Index(episodes["episode_index"]).get_indexer(scores.chunks["episode_index"])
    return {
        "exp": np.where(flagged[row], frames, exp[row]),
        "thin": np.where(flagged[row], frames, thin[row]),
        "keep": np.where(short[row], 1.0, frames),
    }


def converged(recordings: Recordings, seed: int) -> np.ndarray:
    """(frames,) Eq. 21 of a T that has converged: the inspection's question about consequences, in nats."""
    answers, _ = ask_all(
        recordings, [ConsequenceFromAction()], FitSettings(seed=seed, progress=False), recordings.group("task")
    )
    (answer,) = answers.values()
    assert answer.frames is not None
    return np.clip(np.exp(np.nan_to_num(answer.frames[:, 0]) / BETA), *WEIGHTS)


def maps(workspace: Path, condition: str, seed: int) -> None:
    """Write the weights files of a dataset."""
    dataset = condition_dataset(SETTING, workspace, condition, seed)
    scores = inspect_dataset(str(dataset), seed=seed, device="cpu", progress=False)
    recordings = read_recordings(str(dataset))
    (workspace / "soft").mkdir(exist_ok=True)
    for name, weight in (soft_maps(scores) | {"eq21": converged(recordings, seed)}).items():
        table = pd.DataFrame({"index": recordings.index, "weight": weight.astype(np.float32)})
        table.to_parquet(workspace / "soft" / f"{condition}_{seed}.{name}.parquet", index=False)
        print(name, f"effective sample size {weight.sum() ** 2 / len(weight) / np.square(weight).sum():.3f}")


class PolicyLoss(Question):
    """What a half-trained policy thinks of an episode: its negated loss (frames, 1), which was read beforehand."""

    name = "policy_loss"
    title = "Does the policy learn it?"

    def __init__(self, frames: np.ndarray) -> None:
        self._answer = Answer((self.name,), frames, 0.02)

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        return self._answer

    def reason(self, parts: tuple[str, ...]) -> str:
        return "the policy does not learn it"


class _StopHalfway(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == SETTING.steps // 2


def losses(trainer: PTRTrainer, recordings: Recordings, seed: int) -> np.ndarray:
    """(frames, 1) the policy's negated loss at every eighth frame, NaN elsewhere."""
    policy = trainer.policy.eval()
    frames = np.flatnonzero(recordings.frame % EVERY == 0)
    found = np.full((len(recordings), 1), np.nan, np.float32)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for batch in np.split(frames, range(128, len(frames), 128)):
            rows = trainer._prepare_inputs(
                collate_segments([trainer.train_dataset[int(recordings.index[frame])] for frame in batch])
            )
            chunks = policy.adapter.arrange(policy._plain(rows))
            found[batch, 0] = -torch.stack([policy.adapter.losses(chunks) for _ in range(DRAWS)]).mean(dim=0).numpy()
    return found


def loss(workspace: Path, condition: str, seed: int) -> None:
    """Print how the inspection detects with and without the loss of a policy after half of its steps."""
    dataset = condition_dataset(SETTING, workspace, condition, seed)
    recordings, truth = read_recordings(str(dataset)), load_truth(dataset).kinds()
    bad = np.array([truth[int(episode)] != "clean" for episode in recordings.episode_index])
    group = recordings.group("task")
    window = int(np.clip(round(recordings.fps * 0.5), 8, 32))
    answers, _ = ask_all(
        recordings, [question() for question in QUESTIONS], FitSettings(seed=seed, progress=False), group
    )

    def verdicts(asked: dict[Question, Answer]) -> Verdicts:
        return judge(recordings, asked, group, false_alarms=0.01, weight_min=0.02, window=window)

    def told(name: str, found: Verdicts) -> dict[str, Any]:
        return {
            f"{name}_auc": round(float(roc_auc_score(bad, -found.worst)), 4),
            f"{name}_bad": int(found.flagged[bad].sum()),
            f"{name}_good": int(found.flagged[~bad].sum()),
        }

    offline = verdicts(answers)
    row: dict[str, Any] = {"condition": condition, "seed": seed, "bad": int(bad.sum()), "good": int((~bad).sum())}
    row |= told("offline", offline)
    file = workspace / f"half_{condition}_{seed}.parquet"
    pd.DataFrame({"index": recordings.index, "weight": offline.weight}).to_parquet(file, index=False)
    for preset in ("ptr_offline", "sft"):
        set_seed(seed)
        options: dict[str, Any] = {"segment_length": 1} | ({"weights": str(file)} if preset == "ptr_offline" else {})
        folder = workspace / "runs" / f"half_{preset}_{condition}_{seed}"
        args = PTRTrainingArguments(**_arguments(SETTING, folder, SETTING.steps, seed), preset=preset, **options)
        trainer = PTRTrainer(load_pretrained(SETTING, workspace), args, dataset)
        trainer.add_callback(_StopHalfway())
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        answer, _ = ask_all(
            recordings, [PolicyLoss(losses(trainer, recordings, seed))], FitSettings(progress=False), group
        )
        row |= told(f"{preset}_loss", verdicts(answer))
        row |= told(f"{preset}_both", verdicts(answers | answer))
    print(json.dumps(row))


def warm(workspace: Path, condition: str, seed: int, results: Path) -> None:
    """Fit the scorer of preset ptr alone, then train with it; adds the row ptr_warm."""
    dataset = condition_dataset(SETTING, workspace, condition, seed)
    truth, folder = load_truth(dataset).kinds(), workspace / "runs" / f"ptr_warm_{condition}_{seed}"
    set_seed(seed)
    still = _arguments(SETTING, folder.with_name(f"{folder.name}_scorer"), SETTING.steps, seed) | {"learning_rate": 0.0}
    args = PTRTrainingArguments(**still, preset="ptr", head_learning_rate=SETTING.learning_rate, segment_length=1)
    first = PTRTrainer(load_pretrained(SETTING, workspace), args, dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        first.train()
    early = judged(scored(first, seed), truth)
    first.policy.config.head_learning_rate = None
    set_seed(seed)
    args = PTRTrainingArguments(**_arguments(SETTING, folder, SETTING.steps, seed), preset="ptr", segment_length=1)
    trainer = PTRTrainer(first.policy, args, dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    row = {"preset": "ptr_warm", "condition": condition, "seed": seed} | outcome(SETTING, trainer, seed)
    row |= judged(scored(trainer, seed), truth)
    # where the others have a quarter of the run: before the policy moves
    row |= {f"{name}_25": early[name] for name in ("auc_chunk", "auc_episode")}
    command = f"python recipes/benchmarks/corruption/soft_maps.py warm {condition} {seed}"
    append(results, [row | {"commit": commit(), "command": command}], COLUMNS)


def main() -> None:
    """One of the three measurements on one dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("maps", "loss", "warm"), help="see above")
    parser.add_argument("condition", help="of recipes/benchmarks/corruption/benchmark.py")
    parser.add_argument("seed", type=int, help="of data, order, noise and test starts")
    parser.add_argument(
        "--workspace", type=Path, default=Path("outputs/corruption"), help="of the corruption benchmark"
    )
    parser.add_argument("--results", type=Path, default=Path("results/soft_maps.csv"), help="CSV file, for warm")
    options = parser.parse_args()
    _be_quiet()
    workspace = options.workspace / "state"
    prepare(SETTING, workspace)
    if options.what == "maps":
        maps(workspace, options.condition, options.seed)
    elif options.what == "loss":
        loss(workspace, options.condition, options.seed)
    else:
        warm(workspace, options.condition, options.seed, options.results)


if __name__ == "__main__":
    main()
