"""What `ptr-train` does: train, beside plain fine-tuning where that is asked for, then measure and show."""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from transformers import set_seed

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.cli import interrupts
from ptr_hf.cli.base_policies import adapted_policy, new_policy, tiny_policy
from ptr_hf.cli.refusals import refusals
from ptr_hf.cli.train import PROGRAM
from ptr_hf.cli.train_options import OPTIONS, parse_arguments, read_mixture
from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.demonstrations import bundled_demonstrations, load_truth
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.hyperparameters import AUTO
from ptr_hf.policies.bundled import bundled_policy
from ptr_hf.presets import PRESETS
from ptr_hf.publishing.push import PushError
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.files import REPORT_FILE, beside_the_run
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER
from ptr_hf.training.checkpoint_files import SaveError, checkpoints


def sft_arguments(args: PTRTrainingArguments, folder: Path) -> PTRTrainingArguments:
    """The same run without PTR: the same segments in the same order, the same seed, schedule and optimiser."""
    method = dict.fromkeys(name for own in PRESETS.values() for name in own.fields)
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
        # card and report follow once the run was looked at
        trainer.save_model(_internal_call=True)
    except SaveError as error:
        raise SystemExit(f"{PROGRAM}: {error}") from error
    return trainer


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
    truth = None if demo is None else load_truth(dataset).kinds()
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
    from ptr_hf.cli.look_back import comparison_table, look_back, reasons_table

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
