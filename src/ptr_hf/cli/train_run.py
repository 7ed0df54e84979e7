"""Post-train a LeRobot policy with Posterior-Transition Reweighting.

Without arguments: the bundled Meta-World demonstrations, more than half of which are corrupted, are inspected; a small pretrained
SmolVLA is fine-tuned on them, SFT beside PTR; and both act in simulation, from starts that no demonstration begins at.

    accelerate launch recipes/train_ptr.py          # or, without a clone: accelerate launch -m ptr_hf.cli.train, or ptr-train

The real thing:

    accelerate launch recipes/train_ptr.py --policy_path lerobot/smolvla_base --dataset me/my_demos --output_dir out

A policy from scratch, here ACT: `--policy_type act` in the place of --policy_path.

Several datasets, also of different robots (docs/mixtures.md; without --policy_path a tiny SmolVLA, to try a mixture out):

    accelerate launch recipes/train_ptr.py --policy_path lerobot/smolvla_base --mixture mixture.yaml --output_dir out

A run that was killed goes on with `--resume_from_checkpoint last` and otherwise the same options; where both SFT and PTR are
trained, the one that had ended is not trained again. Checkpoints are written with `--save_strategy steps --save_steps N`.

The data are inspected first, and bad demonstrations weigh less (preset `ptr_offline`, docs/weights.md); `--preset sft` is plain
fine-tuning, `--preset ptr` the paper's method.
`--config file.yaml` reads any of the options from a file. Of several files (`--config base.yaml variant.yaml`) the later ones
override the earlier ones, and options on the command line override them all. `recipes/experiments/` has ready ones.
"""

import copy
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import draccus
import torch
from huggingface_hub.constants import REPOCARD_NAME
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class
from lerobot.utils.feature_utils import dataset_to_policy_features
from rich.table import Table
from torch import nn
from transformers import set_seed

from ptr_hf import PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.artifacts.base_source import check_base
from ptr_hf.artifacts.checkpoint import is_ptr_source
from ptr_hf.cli import interrupts
from ptr_hf.cli.first_look import first_look
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import refusals
from ptr_hf.cli.train import PROGRAM
from ptr_hf.configuration_ptr import chunk_settings
from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.demonstrations import bundled_demonstrations, load_truth
from ptr_hf.data.fit import renamed_features
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.segments import CAMERA_MASK_SUFFIX, SegmentLayout
from ptr_hf.hyperparameters import AUTO, PRESETS
from ptr_hf.policies import supported_policies
from ptr_hf.policies.bundled import bundled_policy
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.publishing.push import PushError
from ptr_hf.report import (
    DYNAMICS_FILE,
    REPORT_FILE,
    SCORES_FILE,
    Dynamics,
    detection,
    episode_weights,
    given_weights_figure,
    read_dynamics,
    save_figure,
    summary_figure,
    write_report,
    write_scores,
)
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.evaluation import corruption_kinds
from ptr_hf.report.files import beside_the_run
from ptr_hf.report.inspected import (
    INSPECTION_CAPTION,
    SUCCESS,
    SUCCESS_OF_TASK,
    inspection_by_truth,
    inspection_figure,
)
from ptr_hf.report.page import has_curves
from ptr_hf.scoring import action_loss
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.training.checkpoints import SaveError, checkpoints
from ptr_hf.training.data_sources import DataSource, read_metadata
from ptr_hf.training.given_weights import INSPECTION_FOLDER
from ptr_hf.training.policy_sources import widest_vector

RESULTS_FILE = "results.json"
PLAIN = SegmentLayout(None, (0,), 1, 1, None)
FIRST_START = 100_000
"""Of the held-out starts: demonstrations begin at those below it."""


@dataclass
class RecipeArguments:
    """What to train on what."""

    config: list[str] | None = field(
        default=None,
        metadata={
            "help": "YAML files with any of these options; later files override earlier ones.",
            "action": "extend",
        },
    )
    policy_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a LeRobot policy or a PTR checkpoint. None: the small demo policy."},
    )
    policy_type: str | None = field(
        default=None,
        metadata={"help": "Train a new policy of this LeRobot type, e.g. act or diffusion, from scratch."},
    )
    policy_overrides: list[str] | None = field(
        default=None,
        metadata={
            "help": "Settings of the base policy to change before it is loaded or made, as name=value: "
            "freeze_vision_encoder=false."
        },
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the LeRobotDataset. None: the bundled demonstrations."}
    )
    mixture: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of several datasets, also of different robots, in the place of --dataset (docs/mixtures.md)."
        },
    )
    only: str | None = field(
        default=None,
        metadata={"help": "Train on this source of the mixture alone: a specialist in the same action space."},
    )
    bundled: Literal["states", "images"] = field(
        default="states",
        metadata={"help": "Which bundled demonstrations, where no dataset is named: without or with a camera."},
    )
    evaluation_starts: int = field(
        default=15,
        metadata={
            "help": "After training on the bundled states: held-out starts of each of the eight tasks in simulation; 0 for none."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out demonstrations for the action loss; for a mixture, a YAML file of the same robots. None: the "
            "bundled ones in the demo."
        },
    )
    compare_sft: bool = field(
        default=False,
        metadata={"help": "Also train plain SFT on the same seed, data and number of chunks, and compare."},
    )
    score_after: bool = field(
        default=False, metadata={"help": "After training, score every chunk of the dataset (one more pass over it)."}
    )


OPTIONS = tuple(item.name for kind in (RecipeArguments, PTRTrainingArguments) for item in fields(kind))


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, PTRTrainingArguments]:
    """Command line over YAML files, the last file first, over defaults; without policy, dataset and YAML, the demo."""
    with refusals(PROGRAM):
        files = first_look(argv)
    parser = OptionParser((RecipeArguments, PTRTrainingArguments), prog=PROGRAM, description=__doc__)
    recipe, args = parser.parse(argv, files)
    return recipe, args


def read_mixture(recipe: RecipeArguments) -> MixtureConfig | None:
    """The mixture that the arguments name, or the one source of it that they ask for."""
    if recipe.mixture is None:
        return None
    with refusals(PROGRAM, OPTIONS):
        mixture = MixtureConfig.from_yaml(recipe.mixture)
        return mixture if recipe.only is None else mixture.only(recipe.only)


def adapted_policy(path: str, overrides: list[str], data: DataSource, args: PTRTrainingArguments) -> nn.Module:
    """A pretrained LeRobot policy loaded with some of its settings changed, at this robot's action and state sizes."""
    if is_ptr_source(path, args.model_revision):
        raise ValueError(
            f"{path} is a PTR checkpoint, whose settings are fixed: leave policy_overrides out, or give a LeRobot policy."
        )
    check_base(path, args.model_revision, trusted=[setting.partition("=")[2] for setting in overrides])
    saved = PreTrainedConfig.from_pretrained(path, revision=args.model_revision)
    check_overrides(overrides, vars(saved), f"the policy {path}")
    # on the CPU first, so that the processes of a node do not all load onto its first GPU
    settings = [*overrides, "device=cpu"]
    if args.chunk_size is not None:
        settings += [
            f"{name}={value}" for name, value in chunk_settings(type(saved), args.chunk_size, vars(saved)).items()
        ]
    try:
        config = PreTrainedConfig.from_pretrained(
            path, revision=args.model_revision, cli_overrides=[f"--{setting}" for setting in settings]
        )
    except draccus.ParsingError as error:
        raise ValueError(f"policy_overrides={overrides} do not fit the policy {path}: {error}.") from error
    described = read_metadata(data, args, widest=widest_vector(saved)).features
    robot = dataset_to_policy_features(renamed_features(described, args.observation_renames))
    config.output_features = {key: feature for key, feature in robot.items() if feature.type is FeatureType.ACTION}
    config.input_features = {
        key: robot.get(key, feature) if feature.type is FeatureType.STATE else feature
        for key, feature in (config.input_features or {}).items()
    }
    # a record of where it came from
    config.pretrained_path, config.pretrained_revision = Path(path), args.model_revision
    return get_policy_class(config.type).from_pretrained(path, config=config, revision=args.model_revision)


def check_overrides(overrides: list[str], known: Iterable[str], of: str) -> None:
    """Refuse what is not name=value, or names no setting of the policy."""
    names = [setting.partition("=")[0] for setting in overrides if "=" in setting]
    if len(names) < len(overrides) or not set(names) <= set(known):
        raise ValueError(
            f"policy_overrides={overrides} do not fit {of}: each is name=value, the name one of {', '.join(sorted(known))}."
        )


def new_policy(kind: str, overrides: list[str], args: PTRTrainingArguments) -> PreTrainedConfig:
    """The configuration of a policy that is trained from scratch; its sizes are taken from the data."""
    if kind not in supported_policies():
        raise ValueError(
            f"policy_type={kind} is none that can be trained here: choose one of {', '.join(supported_policies())}."
        )
    config_class = PreTrainedConfig.get_choice_class(kind)
    check_overrides(overrides, [item.name for item in fields(config_class) if item.init], f"a policy of type {kind}")
    settings = [*overrides, "device=cpu", "push_to_hub=false"]
    if args.chunk_size is not None:
        settings += [f"{name}={value}" for name, value in chunk_settings(config_class, args.chunk_size, {}).items()]
    try:
        return draccus.parse(config_class, args=[f"--{setting}" for setting in settings])
    except draccus.ParsingError as error:
        raise ValueError(f"policy_overrides={overrides} do not fit a policy of type {kind}: {error}.") from error


def tiny_policy(folder: Path, data: DataSource, args: PTRTrainingArguments) -> nn.Module:
    """A tiny SmolVLA with random weights, its vision features centred on a few frames of the data."""
    meta = read_metadata(data, args)
    vlm = write_tiny_vlm(folder / "tiny_vlm", texts=list(meta.tasks.index))
    widths: dict[str, Any] = {}
    if isinstance(meta, MixtureMetadata):
        frames: Any = Mixture(meta, PLAIN)
        widths = {"max_action_dim": len(meta.space), "max_state_dim": len(meta.state_space)}
    else:
        frames = LeRobotDataset(meta.repo_id, root=meta.root, video_backend="pyav")
    shown = [frames[i] for i in torch.linspace(0, len(frames) - 1, 32).long().tolist()]
    images = {}
    for key in meta.camera_keys:
        # a robot of a mixture may lack the camera
        seen = [frame[key] for frame in shown if frame.get(key + CAMERA_MASK_SUFFIX, True)]
        images[key] = torch.stack([image / 255 if image.dtype == torch.uint8 else image for image in seen])
    return tiny_smolvla(
        meta.features, vlm.resolve(), chunk_size=args.chunk_size or 8, seed=args.seed, frames=images, **widths
    )


def sft_arguments(args: PTRTrainingArguments, folder: Path) -> PTRTrainingArguments:
    """The same run without PTR: the same segments in the same order, the same seed, schedule and optimiser."""
    method = dict.fromkeys(name for own in PRESETS.values() for name in own)
    own = method | {"preset": "sft", "segment_length": args.segment_length}
    return args.with_options(output_dir=str(folder), push_to_hub=False, **own)


def train(model: Any, args: PTRTrainingArguments, dataset: Any) -> PTRTrainer:
    """One run, its checkpoint in `args.output_dir`."""
    set_seed(args.seed)
    with refusals(PROGRAM, OPTIONS):
        trainer = PTRTrainer(model, args, dataset)
        checkpoint = trainer.choose_checkpoint(args.resume_from_checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    try:
        trainer.save_model()
    except SaveError as error:
        raise SystemExit(f"{PROGRAM}: {error}") from error
    return trainer


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


def main(argv: list[str]) -> None:
    """Parse, train, compare, report."""
    recipe, args = parse_arguments(argv)
    console = PlainConsole()
    output = Path(args.output_dir)
    interrupts.writes_to(output)
    mixture = read_mixture(recipe)
    demo = recipe.bundled if recipe.dataset is None and mixture is None else None
    dataset: Any = mixture or recipe.dataset
    heldout: Any = recipe.eval_dataset
    if demo is not None:
        dataset = bundled_demonstrations("states" if demo == "states" else "train")
    if demo == "images" and heldout is None:
        heldout = bundled_demonstrations("heldout")
    truth = None if demo is None else kinds(dataset)
    model: Any = recipe.policy_path
    with refusals(PROGRAM, OPTIONS):
        if recipe.eval_dataset is not None:
            # read after training; whether it is there shows now
            several = MixtureConfig.of(recipe.eval_dataset)
            if several is None:
                dataset_metadata(recipe.eval_dataset)
            else:
                MixtureMetadata.read(several)
        if recipe.policy_type is not None:
            model = new_policy(recipe.policy_type, recipe.policy_overrides or [], args)
        elif recipe.policy_path is None:
            model = bundled_policy(output) if demo == "states" else tiny_policy(output, dataset, args)
        elif recipe.policy_overrides:
            model = adapted_policy(recipe.policy_path, recipe.policy_overrides, dataset, args)

    name = args.preset
    data = "the bundled demonstrations" if demo is not None else recipe.mixture or recipe.dataset
    tiny = "a small pretrained SmolVLA" if demo == "states" else "a tiny SmolVLA"
    heading = {
        "sft": "SFT: the base policy alone",
        name: f"{name.upper()}: {recipe.policy_path or recipe.policy_type or tiny} on {data}",
    }
    compares = recipe.compare_sft and name != "sft"
    folder = output / name if compares else output
    runs = {name: args.with_options(output_dir=str(folder)) if compares else args}
    if compares:
        runs = {"sft": sft_arguments(args, output / "sft"), **runs}
    # an inspection is shown before anything is trained
    order = list(runs) if args.weights != AUTO else list(runs)[::-1]
    trained: dict[str, PTRTrainer] = {}
    for run in order:
        console.rule(heading[run])
        if trained and not checkpoints(Path(runs[run].output_dir)):
            # killed while the first was in training
            runs[run] = runs[run].with_options(resume_from_checkpoint=None)
        trained[run] = train(model if run == order[-1] else copy.deepcopy(model), runs[run], dataset)
    args, trainers = runs[name], {run: trained[run] for run in runs}
    main_trainer = trainers[name]
    if not main_trainer.is_world_process_zero():
        return

    if demo == "states" and recipe.evaluation_starts:
        console.rule("Success in simulation")
    results = look_back(recipe, args, trainers, dataset, heldout, truth, output)
    if truth is not None and args.weights == AUTO:
        with beside_the_run("The table of reasons is missing"):
            console.print(reasons_table(DatasetScores.load(folder / INSPECTION_FOLDER), truth))
    if any(results.values()):
        console.print(comparison_table(results))
    for trainer in trainers.values():
        trainer.create_model_card()
    if args.push_to_hub:
        try:
            console.print(f"{'published':28}{main_trainer.push_to_hub()}", soft_wrap=True)
        except (PushError, SaveError) as error:
            console.print(str(error), soft_wrap=True)
    for label, path in (
        ("checkpoint", folder),
        ("model card", folder / REPOCARD_NAME),
        ("report (open in a browser)", output / REPORT_FILE),
        ("figures", output / "figures"),
        ("picture", output / "summary.png"),
    ):
        if path.exists():
            console.print(f"{label:28}{path}", soft_wrap=True)
    console.print(f"{'TensorBoard':28}tensorboard --logdir {output}", soft_wrap=True)


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
        if has_curves(dynamics):
            with beside_the_run("The picture of the run is missing"):
                record = main_trainer.policy.config.weights_record
                picture = beside() if beside is not None else None
                if picture is None and record:
                    picture = given_weights_figure(dynamics, record)
                picture = picture or summary_figure(dynamics.identified, scores, truth, chance)
                save_figure(picture, output / "summary.png")
    with beside_the_run(f"{RESULTS_FILE} is missing"):
        (output / RESULTS_FILE).write_text(json.dumps({"seed": args.seed, **results}, indent=2) + "\n")
    return results


def kinds(dataset: Path) -> dict[int, str]:
    """What was done to every bundled episode, several things joined by +."""
    found: dict[int, list[str]] = {}
    for record in load_truth(dataset).records:
        found.setdefault(record.episode_index, []).append(record.kind)
    return {episode: "+".join(done) for episode, done in found.items()}


def success(trainer: PTRTrainer, starts: int, seed: int) -> dict[str, float]:
    """How often a policy solves the benchmark's tasks in simulation, each from the same held-out starts."""
    # the extra `metaworld`, which only this needs
    from ptr_hf.data.benchmark_tasks import STATE_TASKS
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
