"""Which processors a run takes, and whose statistics they normalise by."""

import logging

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.data.fit import renamed_features
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.processor import EmbodimentStep, check_robots, embodiment_steps
from ptr_hf.data.mixture.statistics import mixture_statistics
from ptr_hf.data.normalization import READS, normalized_features, policy_statistics, with_statistics
from ptr_hf.data.normalizers import check_normalizers, harmless, renames_in, statistics_in, warn_if_far
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.processor_ptr import make_ptr_pre_post_processors, saved_processors, saved_renames
from ptr_hf.training.arguments import PTRTrainingArguments
from ptr_hf.training.data_sources import Metadata, TrainingSet

logger = logging.getLogger(__name__)


def observation_renames(
    config: PTRConfig,
    meta: Metadata | None,
    args: PTRTrainingArguments,
    preprocessor: PolicyProcessorPipeline | None = None,
) -> dict[str, str]:
    """Dataset key -> policy key: as the arguments say, else as the preprocessor or the checkpoint does, where the data have it.

    Args:
        config: of the policy.
        meta: of the data; a mixture's sources have renames of their own.
        args: of the run.
        preprocessor: that the user gave.

    Raises:
        ValueError: arguments and preprocessor say different things.
    """
    if isinstance(meta, MixtureMetadata):
        return {}
    asked, brought = args.observation_renames, {}
    if preprocessor is not None:
        brought = renames_in(preprocessor)
        if asked and asked != brought:
            raise ValueError(
                f"rename_map={asked} was given beside a preprocessor, which renames by itself ({brought or 'nothing'}): give "
                "the preprocessor these names, and leave rename_map out."
            )
    elif not asked and config.pretrained_path is not None:
        brought = saved_renames(config.pretrained_path, config.pretrained_revision)
    features = brought if meta is None else meta.features
    return asked or {key: name for key, name in brought.items() if key in features and name not in features}


def checked_preprocessor(
    preprocessor: PolicyProcessorPipeline,
    config: PTRConfig,
    meta: Metadata | None,
    renames: dict[str, str],
    data: TrainingSet | None = None,
) -> PolicyProcessorPipeline:
    """A preprocessor that somebody gave or saved, once it is known to have the statistics that it reads.

    Args:
        preprocessor: see there.
        config: of the policy.
        meta: of the data.
        renames: dataset key -> policy key.
        data: a warning says so where they lie far from the statistics.

    Raises:
        ValueError: they are missing or of another size; or the data's robots are others.
    """
    if meta is None:
        return preprocessor
    if isinstance(meta, MixtureMetadata):
        check_robots(preprocessor, meta)
        return preprocessor
    features = renamed_features(meta.features, renames)
    check_normalizers(preprocessor, features, padded=config.base_config.type == "evo1")
    opened = _frames(data)
    if opened is not None:
        warn_if_far(preprocessor, opened, renames)
    return harmless(preprocessor, features)


def policy_processors(
    policy: PTRPolicy,
    meta: Metadata | None,
    args: PTRTrainingArguments,
    data: TrainingSet | None = None,
    renames: dict[str, str] | None = None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The policy's own processors, with the statistics that `args.statistics` asks for.

    Args:
        policy: it runs before.
        meta: of the training data; None keeps a pretrained policy's statistics.
        args: of the run.
        data: the data, from which statistics are computed that `meta/stats.json` has not, or has wrong.
        renames: dataset key -> policy key; by default those of the arguments.

    Raises:
        ValueError: statistics are missing or wrong and cannot be computed, or a checkpoint knows other robots than the mixture's.
    """
    config = policy.config
    renames = args.observation_renames if renames is None else renames
    if config.pretrained_path is not None:
        return _of_checkpoint(config, meta, args, data, renames)
    if meta is not None and args.statistics == "policy":
        if config.base_path is None or isinstance(meta, MixtureMetadata):
            raise ValueError(
                "statistics='policy' keeps the statistics saved with a policy: name its folder or Hub id, and train it on one "
                "dataset, since every source of a mixture is normalised by its own; or leave statistics at 'data'."
            )
        preprocessor, postprocessor = make_ptr_pre_post_processors(config, dataset_meta=meta, rename_map=renames)
        return checked_preprocessor(preprocessor, config, meta, renames, data), postprocessor
    if isinstance(meta, MixtureMetadata):
        statistics = mixture_statistics(meta, config.normalization_mapping, _opened(data))
        return make_ptr_pre_post_processors(config, embodiments=embodiment_steps(meta, statistics))
    if meta is None:
        return make_ptr_pre_post_processors(config, rename_map=renames)
    found = policy_statistics(config.base_config, meta, _frames(data), renames)
    return make_ptr_pre_post_processors(config, found, with_statistics(meta, found), rename_map=renames)


def _of_checkpoint(
    config: PTRConfig,
    meta: Metadata | None,
    args: PTRTrainingArguments,
    data: TrainingSet | None,
    renames: dict[str, str],
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """A PTR checkpoint's processors; on other data than it was trained on, with the statistics of these, as in LeRobot."""
    source, revision = config.pretrained_path, config.pretrained_revision
    assert source is not None
    preprocessor, postprocessor = saved_processors(config, source, revision, renames)
    if meta is None:
        return preprocessor, postprocessor
    if args.statistics == "policy":
        return checked_preprocessor(preprocessor, config, meta, renames, data), postprocessor
    if isinstance(meta, MixtureMetadata):
        check_robots(preprocessor, meta)
        tensors = mixture_statistics(meta, config.normalization_mapping, _opened(data))
        changed = sorted(
            {
                name.rpartition(".")[0]
                for step in preprocessor.steps
                if isinstance(step, EmbodimentStep)
                for name, value in tensors.items()
                if name not in step.statistics or not torch.allclose(value, step.statistics[name].cpu(), rtol=1e-4)
            }
        )
        for step in (*preprocessor.steps, *postprocessor.steps):
            if isinstance(step, EmbodimentStep) and changed:
                step.statistics = {name: value for name, value in tensors.items() if name in step.statistics}
    else:
        found = policy_statistics(config.base_config, meta, _frames(data), renames)
        adapted = saved_processors(config, source, revision, renames, found)
        before, after = statistics_in(preprocessor), statistics_in(adapted[0])
        changed = [
            key
            for key, mode in normalized_features(config.base_config).items()
            for name in READS[mode]
            if key in after and not np.allclose(before.get(key, {}).get(name, np.nan), after[key][name], rtol=1e-4)
        ]
        changed = sorted(set(changed))
        if changed:
            preprocessor, postprocessor = adapted
    if changed:
        logger.warning(
            "%s was trained with other statistics of %s than those of %s: it goes on with the data's, as in lerobot-train. "
            "statistics='policy' keeps the policy's.",
            source,
            ", ".join(changed),
            meta.repo_id,
        )
    return checked_preprocessor(preprocessor, config, meta, renames), postprocessor


def _frames(data: TrainingSet | None) -> LeRobotDataset | None:
    data = data.dataset if isinstance(data, InMemorySegments) else data
    return data if isinstance(data, LeRobotDataset) else None


def _opened(data: TrainingSet | None) -> list[LeRobotDataset] | None:
    return data.datasets if isinstance(data, Mixture) else None
