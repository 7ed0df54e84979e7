"""Will reweighting help on your demonstrations? A few minutes with a frozen policy, before any training time is spent.

    python recipes/diagnose.py --dataset me/demos --policy_path lerobot/smolvla_base --output_dir out

Without `--policy_path` a tiny policy with random weights looks at the data: quick, but its features are untrained. Without
`--dataset` it looks at the bundled demonstrations, a third of which are corrupted.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from torch import nn

from ptr_hf import PTRTrainingArguments
from ptr_hf.artifacts.checkpoint import is_ptr_source
from ptr_hf.cli import interrupts
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import refusals
from ptr_hf.data.datasets import dataset_metadata, open_dataset, video_backend
from ptr_hf.data.demonstrations import bundled_demonstrations, load_truth
from ptr_hf.data.fit import renamed_features
from ptr_hf.data.normalization import policy_statistics, with_statistics
from ptr_hf.diagnosis import advise, collect, diagnose, frozen_policy
from ptr_hf.hyperparameters import require
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.processor_ptr import make_ptr_pre_post_processors
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.diagnosis import DIAGNOSIS_FILE, show, write_diagnosis
from ptr_hf.training.policy_sources import resolve_policy
from ptr_hf.training.ranges import check_renames, check_structures

TINY_CHUNK = 8


@dataclass
class DiagnosisArguments:
    """What to look at, and with what."""

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the LeRobotDataset. None: the bundled demonstrations."}
    )
    policy_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a LeRobot policy or a PTR checkpoint whose features look at the data. None: a tiny "
            "policy with random weights."
        },
    )
    output_dir: str = field(
        default="outputs/diagnosis", metadata={"help": "Folder for diagnosis.html, diagnosis.json and the figures."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the policy on the Hub."})
    rename_map: str | None = field(
        default=None, metadata={"help": "Dataset key -> policy key, as JSON, for cameras and states named differently."}
    )
    truth: str | None = field(
        default=None, metadata={"help": "Truth sidecar, to see whether the scores find what is known to be corrupted."}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": f"Actions per chunk. None: the policy's own; {TINY_CHUNK} for the tiny one."}
    )
    segment_length: int = field(default=4, metadata={"help": "Chunks that are read together."})
    max_segments: int = field(
        default=2000, metadata={"help": "Most segments to read; of a larger dataset they are spread evenly over it."}
    )
    batch_size: int = field(default=8, metadata={"help": "Segments per forward pass of the policy."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read the dataset."})
    steps: int = field(default=400, metadata={"help": "Training steps of each head, at most."})
    seed: int = field(default=0, metadata={"help": "Of the heads, the folds and the policy's noise."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})


PROGRAM = "diagnose.py"
OPTIONS = tuple(item.name for item in fields(DiagnosisArguments))


def checked(given: DiagnosisArguments) -> dict[str, str]:
    """The renames, where every option is in its range."""
    for name in ("segment_length", "max_segments", "batch_size", "steps", "chunk_size"):
        value = vars(given)[name]
        require(value is None or value >= 1, name, value, "1 or more")
    require(given.num_workers >= 0, "num_workers", given.num_workers, "0 or more")
    check_structures(given, ["rename_map"])
    renames = json.loads(given.rename_map) if (given.rename_map or "").lstrip().startswith("{") else given.rename_map
    check_renames(renames)
    return renames or {}


def tiny_policy(
    folder: str, meta: LeRobotDatasetMetadata, renames: dict[str, str], chunk_size: int, seed: int, device: str
) -> nn.Module:
    """A tiny SmolVLA with random weights that fits the dataset, its vision features centred on a few frames."""
    vlm = write_tiny_vlm(folder, texts=list(meta.tasks.index))
    frames = LeRobotDataset(meta.repo_id, root=meta.root, video_backend=video_backend())
    shown = torch.linspace(0, len(frames) - 1, 32).long().tolist() if meta.camera_keys else []
    items = [frames[index] for index in shown]
    images = {renames.get(key, key): torch.stack([item[key] for item in items]) for key in meta.camera_keys}
    features = renamed_features(meta.features, renames)
    return tiny_smolvla(features, vlm, chunk_size=chunk_size, seed=seed, frames=images or None, device=device)


def pretrained_policy(
    path: str, meta: LeRobotDatasetMetadata, renames: dict[str, str], given: DiagnosisArguments
) -> nn.Module:
    """The base policy in a LeRobot checkpoint, at this robot's sizes, or in a PTR checkpoint."""
    settings: dict[str, Any] = {"preset": "sft", "chunk_size": given.chunk_size}
    if is_ptr_source(path, given.model_revision):
        settings = {"chunk_size": given.chunk_size}
    args = PTRTrainingArguments(
        output_dir=given.output_dir,
        use_cpu=given.use_cpu,
        model_revision=given.model_revision,
        rename_map=renames,
        **settings,
    )
    return resolve_policy(path, args, meta).base


def prepared(
    given: DiagnosisArguments, meta: LeRobotDatasetMetadata, renames: dict[str, str], folder: str
) -> tuple[PTRPolicy, PolicyProcessorPipeline]:
    """The frozen policy, and its preprocessor with the dataset's statistics, computed where the dataset has none."""
    if given.policy_path is None:
        device = "cuda" if torch.cuda.is_available() and not given.use_cpu else "cpu"
        base = tiny_policy(folder, meta, renames, given.chunk_size or TINY_CHUNK, given.seed, device)
    else:
        base = pretrained_policy(given.policy_path, meta, renames, given)
    policy = frozen_policy(base, segment_length=given.segment_length)
    dataset = open_dataset(given.dataset or meta.root, policy.config.layout, revision=given.dataset_revision)
    statistics = policy_statistics(policy.config.base_config, meta, dataset, renames)
    meta = with_statistics(meta, statistics)
    return policy, make_ptr_pre_post_processors(policy.config, statistics, meta, renames)[0]


def main(argv: list[str]) -> None:
    """Parse, read, judge, report."""
    (given,) = OptionParser(DiagnosisArguments, prog=PROGRAM, description=__doc__).parse(argv)
    console = PlainConsole()
    bundled = given.dataset is None
    dataset = bundled_demonstrations("train") if bundled else given.dataset
    truth = given.truth or (dataset if bundled else None)
    with refusals(PROGRAM, OPTIONS), tempfile.TemporaryDirectory() as folder:
        renames = checked(given)
        meta = dataset_metadata(dataset, given.dataset_revision)
        kinds = {record.episode_index: record.kind for record in load_truth(Path(truth)).records} if truth else None
        unknown = sorted(set(range(meta.total_episodes)) - kinds.keys()) if kinds is not None else []
        if unknown:
            raise ValueError(
                f"The truth of {truth} says nothing about {len(unknown)} episodes of {dataset} (the first is {unknown[0]}): "
                "give the one that belongs to this dataset."
            )
        policy, preprocessor = prepared(given, meta, renames, folder)
        evidence = collect(
            policy,
            dataset,
            preprocessor,
            revision=given.dataset_revision,
            renames=renames,
            max_segments=given.max_segments,
            batch_size=given.batch_size,
            workers=given.num_workers,
            seed=given.seed,
        )
    with console.status("training the heads"):
        found = diagnose(
            evidence,
            meta,
            policy=given.policy_path or "a tiny SmolVLA with random weights",
            trained=given.policy_path is not None,
            steps=given.steps,
            seed=given.seed,
            truth=kinds,
        )
    advice = advise(found)
    show(found, advice, console)
    try:
        page = write_diagnosis(found, advice, given.output_dir)
    except OSError as error:
        raise SystemExit(f"diagnose.py: the page could not be written to {given.output_dir}: {error}") from error
    console.print(f"page (open in a browser)    {page}", soft_wrap=True)
    console.print(f"figures and numbers         {page.with_name(DIAGNOSIS_FILE)}", soft_wrap=True)


if __name__ == "__main__":
    interrupts.end_quietly(PROGRAM)
    main(sys.argv[1:])
