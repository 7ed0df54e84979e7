"""Opens what the arguments of `PTRTrainer` stand for, before any training time is spent: data, policy, weights, processors."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.random_utils import seeded_context
from peft import PeftConfig

from ptr_hf.artifacts.checkpoint import widest_vector
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.data.screening import Screen
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.publishing.card_facts import TrainingData
from ptr_hf.report.console import PlainConsole
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER, training_weights
from ptr_hf.training.arguments import PTRTrainingArguments
from ptr_hf.training.data_sources import (
    DataSource,
    Metadata,
    TrainingSet,
    described,
    episode_table,
    open_data,
    read_metadata,
)
from ptr_hf.training.global_batches import has_batch_statistics, instructions_of
from ptr_hf.training.metrics import MetricsWindow
from ptr_hf.training.policy_sources import ModelSource, resolve_policy
from ptr_hf.training.processors import checked_preprocessor, observation_renames, policy_processors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun:
    """Everything a run is made of.

    Attributes:
        policy: with its episodes and given weights.
        datasets: "train" and "eval", where they were given.
        mixtures: the metadata of those that are mixtures.
        described: the training data, for the card.
        preprocessor, postprocessor: of the policy, with the run's statistics.
        screen: finds samples that are not finite.
        window: of the metrics between two log rows.
    """

    policy: PTRPolicy
    datasets: Mapping[str, TrainingSet]
    mixtures: Mapping[str, MixtureMetadata]
    described: tuple[TrainingData, ...]
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    screen: Screen
    window: MetricsWindow


def open_run(
    model: ModelSource,
    args: PTRTrainingArguments,
    given: Mapping[str, DataSource | None],
    peft_config: PeftConfig | None = None,
    preprocessor: PolicyProcessorPipeline | None = None,
    postprocessor: PolicyProcessorPipeline | None = None,
) -> OpenedRun:
    """Open policy and data, and check that they fit each other.

    Args:
        model, peft_config, preprocessor, postprocessor: as `PTRTrainer` takes them.
        args: of the run.
        given: the datasets, "train" first.

    Raises:
        ValueError: as `PTRTrainer`.
    """
    metas: dict[str, Metadata] = {}
    for name, source in given.items():
        if source is not None:
            widest = widest_vector(model, args.model_revision) if MixtureConfig.of(source) is not None else None
            metas[name] = read_metadata(source, args, like=metas.get("train"), widest=widest)
    meta = next(iter(metas.values()), None)
    policy = _open_policy(model, args, meta, peft_config)
    renames = observation_renames(policy.config, meta, args, preprocessor)
    opened = {
        name: open_data(given[name], known, policy.config, args, name == "train", renames)
        for name, known in metas.items()
    }
    if "train" in metas:
        _give_data(policy, given["train"], metas["train"], args)
    first = next(iter(opened.values()), None)
    if preprocessor is not None:
        preprocessor = checked_preprocessor(preprocessor, policy.config, meta, renames, first)
    if preprocessor is None or postprocessor is None:
        own = policy_processors(policy, meta, args, first, renames)
        preprocessor = own[0] if preprocessor is None else preprocessor
        postprocessor = own[1] if postprocessor is None else postprocessor
    window = MetricsWindow(
        policy.config,
        sources=meta.names if isinstance(meta, MixtureMetadata) else (),
        tasks=() if meta is None else instructions_of(meta),
    )
    if policy.frame_weights is not None:
        window.weight_range = policy.frame_weights.range
    features = policy.config.input_features or {}
    return OpenedRun(
        policy,
        opened,
        {name: known for name, known in metas.items() if isinstance(known, MixtureMetadata)},
        described(given["train"], metas["train"], args) if "train" in metas else (),
        preprocessor,
        postprocessor,
        Screen(policy.config.layout, features, renames, substitute=policy.objective is None),
        window,
    )


def _open_policy(
    model: ModelSource, args: PTRTrainingArguments, meta: Metadata | None, peft_config: PeftConfig | None
) -> PTRPolicy:
    with seeded_context(args.seed):
        policy = resolve_policy(model, args, meta, peft_config)
    if isinstance(meta, MixtureMetadata):
        policy.config.robots = list(meta.names)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    if args.torch_compile:
        options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        policy.compile_base(**{name: value for name, value in options.items() if value is not None})
    return policy


def _give_data(policy: PTRPolicy, given: Any, meta: Metadata, args: PTRTrainingArguments) -> None:
    """The episodes that are trained on, and the weights that are known before training."""
    with seeded_context(args.seed):
        policy.set_episodes(episode_table(policy.config, meta, args), args.seed)
    # one process inspects, the others find what it has written
    with args.main_process_first(local=False, desc="weights"):
        policy.set_weights(
            training_weights(
                policy.config,
                given,
                meta,
                folder=Path(args.output_dir) / INSPECTION_FOLDER,
                revision=args.dataset_revision,
                seed=args.seed,
                console=PlainConsole() if args.process_index == 0 and not args.disable_tqdm else None,
            )
        )


@contextmanager
def arguments_for_transformers(args: PTRTrainingArguments, policy: PTRPolicy) -> Iterator[None]:
    """The arguments as transformers' Trainer has to find them when it is made."""
    if args.device.type == "cpu":
        # there is no accelerator to pin memory for; PyTorch would warn about it
        args.dataloader_pin_memory = False
    if args.data_seed is None:
        # otherwise the sampler's is what the global random stream was last seeded with
        args.data_seed = args.seed
    # every process reads its own rows, of a stream too
    args.accelerator_config.dispatch_batches = False
    if args.ddp_broadcast_buffers is None and not has_batch_statistics(policy):
        # queue, controller and memory are computed alike on every rank, so there is nothing to send
        args.ddp_broadcast_buffers = False
    # Accelerate would compile the whole step, which reads values out of modules; compile_base has done what can be
    compiler, args.torch_compile_backend = args.torch_compile_backend, None
    yield
    args.torch_compile_backend = compiler


def set_run_length(policy: PTRPolicy, args: PTRTrainingArguments, data: TrainingSet) -> None:
    """Tell the policy how many steps the run has.

    Raises:
        ValueError: the data have no end, and neither has the run.
    """
    steps = args.max_steps
    if steps <= 0:
        if isinstance(data, StreamingMixture):
            raise ValueError("A stream has no end, so the run needs one: set max_steps.")
        steps = math.ceil(len(data) / args.segments_per_step * args.num_train_epochs)
    policy.set_run_length(steps)
    objective = policy.objective
    if objective is not None and objective.config.alpha > 0 and objective.warmup_steps >= steps:
        logger.warning(
            "The scorer's warm-up of %d steps is not shorter than the run of %d: every weight stays 1. Lower "
            "scorer_warmup_steps, or train longer.",
            objective.warmup_steps,
            steps,
        )
