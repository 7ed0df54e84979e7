"""What finished runs are measured by, and the tables and files that show it."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ptr_hf import PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.cli.train_options import RecipeArguments
from ptr_hf.hyperparameters import AUTO
from ptr_hf.report.chunk_scores import SCORES_FILE, write_scores
from ptr_hf.report.dynamics import DYNAMICS_FILE, Dynamics, read_dynamics
from ptr_hf.report.evaluation import corruption_kinds, detection, episode_weights
from ptr_hf.report.figures import dynamics_figure, given_weights_figure
from ptr_hf.report.files import FIGURES_FOLDER, REPORT_FILE, beside_the_run
from ptr_hf.report.page import has_curves, write_report
from ptr_hf.report.style import save_figure
from ptr_hf.scoring import action_loss
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER
from ptr_hf.scoring.inspected import (
    INSPECTION_CAPTION,
    SUCCESS,
    SUCCESS_OF_TASK,
    inspection_by_truth,
    inspection_figure,
)
from ptr_hf.training.evaluation import TaskResult, evaluation_row, write_evaluations

RESULTS_FILE = "results.json"


FIRST_START = 100_000
"""Of the held-out starts: demonstrations begin at those below it."""


def look_back(
    recipe: RecipeArguments,
    args: PTRTrainingArguments,
    trainers: dict[str, PTRTrainer],
    dataset: Any,
    heldout: Any,
    truth: dict[int, str] | None,
    output: Path,
) -> dict[str, dict[str, float]]:
    """What the finished runs are measured by, written into `output`; a part that fails is reported and costs itself alone."""
    # a PTR checkpoint keeps its own preset, and its rows are logged under that name
    trainers = {trainer.policy.config.preset: trainer for trainer in trainers.values()}
    name, main_trainer = list(trainers.items())[-1]
    folder = Path(main_trainer.args.output_dir)
    results: dict[str, dict[str, float]] = {run: {} for run in trainers}
    if heldout is not None:
        layout = main_trainer.policy.config.layout
        for run, trainer in trainers.items():
            with beside_the_run(f"The action loss of {run} on held-out episodes is missing"):
                loss = action_loss(trainer.policy, heldout, trainer.preprocessor, layout=layout, seed=args.seed)
                results[run]["action loss, held-out clean episodes"] = loss
    if truth is not None and recipe.bundled == "states" and recipe.evaluation_starts:
        for run, trainer in trainers.items():
            with beside_the_run(f"The success of {run} on held-out starts is missing"):
                results[run] |= success(trainer, recipe.evaluation_starts, args.seed)
    inspection = None
    if truth is not None and main_trainer.policy.config.weights == AUTO:
        with beside_the_run("The inspection is missing beside the truth"):
            inspection = DatasetScores.load(folder / INSPECTION_FOLDER)
            results[name] |= inspection_by_truth(inspection, truth)
    scores = dynamics = chance = None
    with beside_the_run("The report is missing"):
        dynamics = Dynamics.join(*(read_dynamics(Path(t.args.output_dir) / DYNAMICS_FILE) for t in trainers.values()))
        chance = dynamics.chance(name)
    if recipe.score_after and main_trainer.policy.objective is not None:
        with beside_the_run("The scores of the dataset are missing"):
            scores = score_dataset(main_trainer.policy, dataset, preprocessor=main_trainer.preprocessor, seed=args.seed)
            for place in {output, folder}:
                write_scores(scores, place / SCORES_FILE)
        if dynamics is not None and chance is not None:
            results[name]["identification accuracy, end of training"] = dynamics.tail("accuracy", name)
            results[name]["chance accuracy, 1 / |Y|"] = chance
        if truth is not None and scores is not None:
            results[name] |= weights_by_truth(scores, truth)
    if dynamics is not None:
        beside = None
        if inspection is not None and truth is not None:
            beside = partial(inspection_figure, inspection, truth, dynamics, results)
        with beside_the_run("The report is missing"):
            report = write_report(
                output,
                dynamics=dynamics,
                scores=scores,
                truth=truth if scores is not None else None,
                hyperparameters=main_trainer.policy.config.hyperparameters(),
                results=results,
                chance=chance,
                weights=main_trainer.policy.config.weights_record or None,
                more=[("ptr_inspection", beside, INSPECTION_CAPTION)] if beside is not None else (),
            )
            if folder != output:
                # it is published from there
                shutil.copyfile(report, folder / REPORT_FILE)
                shutil.copytree(output / FIGURES_FOLDER, folder / FIGURES_FOLDER, dirs_exist_ok=True)
        if has_curves(dynamics):
            with beside_the_run("The picture of the run is missing"):
                record = main_trainer.policy.config.weights_record
                if beside is not None:
                    picture = beside()
                else:
                    online = dynamics_figure(dynamics.identified, chance)
                    picture = given_weights_figure(dynamics, record) if record else online
                save_figure(picture, output / "summary.png")
    with beside_the_run(f"{RESULTS_FILE} is missing"):
        (output / RESULTS_FILE).write_text(json.dumps({"seed": args.seed, **results}, indent=2) + "\n")
    return results


def comparison_table(results: dict[str, dict[str, float]]) -> Table:
    """Runs side by side, one row a figure."""
    table = Table(title="SFT beside PTR" if len(results) > 1 else "Result")
    table.add_column("")
    for run in results:
        table.add_column(run.upper(), justify="right")
    for name in dict.fromkeys(name for values in results.values() for name in values):
        table.add_row(name, *(f"{values[name]:.3f}" if name in values else "–" for values in results.values()))
    return table


def reasons_table(scores: DatasetScores, truth: dict[int, str]) -> Table:
    """Why episodes of the bundled demonstrations weigh less, and how many of them are really bad."""
    table = Table(title="What the inspection found, beside what was done to the episodes")
    for name, justify in (("reason", "left"), ("episodes", "right"), ("of them bad", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for reason, rows in sorted(scores.flagged.groupby("reason"), key=lambda group: -len(group[1])):
        bad = sum(truth[episode] != "clean" for episode in rows["episode_index"])
        table.add_row(str(reason), str(len(rows)), str(bad))
    kept = scores.episodes[scores.episodes["weight"] >= 1]
    bad = sum(truth[episode] != "clean" for episode in kept["episode_index"])
    table.add_row("nothing found: full weight", str(len(kept)), str(bad))
    return table


def success(trainer: PTRTrainer, starts: int, seed: int) -> dict[str, float]:
    """How often a policy solves the benchmark's tasks in simulation, each from the same held-out starts."""
    # the extra `metaworld`, which only this needs
    from ptr_hf.envs.metaworld_tasks import STATE_TASKS
    from ptr_hf.training.rollouts import evaluate_success

    first = FIRST_START + 1000 * seed
    rollouts = evaluate_success(
        trainer.policy,
        trainer.preprocessor,
        trainer.postprocessor,
        tasks=STATE_TASKS,
        track="state",
        seeds=range(first, first + starts),
        seed=seed,
        progress=not trainer.args.disable_tqdm,
    )
    outcomes = zip(rollouts.tasks, rollouts.success.tolist(), strict=True)
    results = [TaskResult(task, rollouts.seeds, tuple(solved)) for task, solved in outcomes]
    rows = [evaluation_row(result, trainer.state.global_step, "metaworld (states)") for result in results]
    write_evaluations(trainer.args.output_dir, rows)
    return {SUCCESS: rollouts.mean, **{SUCCESS_OF_TASK + task: value for task, value in rollouts.by_task.items()}}


def weights_by_truth(scores: Any, truth: dict[int, str]) -> dict[str, float]:
    """Mean weight of clean and of corrupted episodes, and the AUC of telling them apart, whole and per kind."""
    means: dict[bool, list[float]] = {True: [], False: []}
    for (_, episode), weight in episode_weights(scores).items():
        means[truth[episode] == "clean"].append(weight)
    small_loss = replace(scores, weight=-scores.loss)
    rows = {
        "weight, clean episodes": float(torch.tensor(means[True]).nanmean()),
        "weight, corrupted episodes": float(torch.tensor(means[False]).nanmean()),
        "AUC, corrupted episodes weigh less (chance 0.5)": detection(scores, truth).auc,
        "AUC of the action loss instead (baseline)": detection(small_loss, truth).auc,
    }
    for kind in corruption_kinds(truth):
        rows[f"AUC, {kind.replace('_', ' ')}"] = detection(scores, truth, kind=kind).auc
        rows[f"AUC of the action loss, {kind.replace('_', ' ')}"] = detection(small_loss, truth, kind=kind).auc
    return rows
