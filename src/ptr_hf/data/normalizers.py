"""LeRobot's normalising steps: whether they have the statistics that they read, and what they do where nothing varies."""

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from lerobot.configs import NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import (
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    RenameObservationsProcessorStep,
)
from lerobot.utils.constants import ACTION

from ptr_hf.data.normalization import READS, column_of, constant, fault_of, foreign, named_dimensions

logger = logging.getLogger(__name__)


def statistics_in(preprocessor: PolicyProcessorPipeline) -> dict[str, dict[str, np.ndarray]]:
    """The statistics in a preprocessor's normalising steps, by feature."""
    steps = [step for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep)]
    return {key: known for step in steps for key, known in _statistics_of(step).items()}


def renames_in(pipeline: PolicyProcessorPipeline) -> dict[str, str]:
    """Dataset key -> policy key, by a preprocessor's step that renames observations; empty without one."""
    maps = [step.rename_map for step in pipeline.steps if isinstance(step, RenameObservationsProcessorStep)]
    return {key: name for renames in maps for key, name in renames.items()}


def with_renames(preprocessor: PolicyProcessorPipeline, renames: Mapping[str, str]) -> PolicyProcessorPipeline:
    """The same preprocessor with other renames.

    Raises:
        ValueError: it renames nothing, so it has no step for that.
    """
    steps = [
        replace(step, rename_map=dict(renames)) if isinstance(step, RenameObservationsProcessorStep) else step
        for step in preprocessor.steps
    ]
    if not any(isinstance(step, RenameObservationsProcessorStep) for step in steps):
        raise ValueError("rename_map was given, and the policy's preprocessor has no step that renames observations.")
    return _with_steps(preprocessor, steps)


def warn_if_far(preprocessor: PolicyProcessorPipeline, dataset: LeRobotDataset, renames: Mapping[str, str]) -> None:
    """Name the states and actions that lie far outside the statistics by which they will be normalised.

    Args:
        preprocessor: of the policy.
        dataset: open.
        renames: dataset key -> policy key.
    """
    known = statistics_in(preprocessor)
    for key, feature in dataset.meta.features.items():
        recorded = known.get(renames.get(key, key), {})
        if key in dataset.meta.camera_keys or not recorded or fault_of(recorded, NormalizationMode.IDENTITY, feature):
            continue
        column = column_of(dataset, key)
        found = foreign(recorded, column[np.isfinite(column).all(axis=1)], feature, whole=False)
        if found:
            logger.warning(
                "%s of %s lies far outside of what the policy was trained on (%s): what it says of these data may mean little.",
                key,
                dataset.meta.repo_id,
                found,
            )


def check_normalizers(
    pipeline: PolicyProcessorPipeline, features: Mapping[str, Mapping[str, Any]], padded: bool = False
) -> None:
    """Refuse a preprocessor that has not the statistics to normalise what it will be given.

    Args:
        pipeline: a preprocessor.
        features: of the data, as the dataset describes them, by the policy's names.
        padded: states and actions are padded to the policy's own width before they are normalised.

    Raises:
        ValueError: naming the feature and what is wrong with its statistics.
    """
    for step in pipeline.steps:
        if not isinstance(step, NormalizerProcessorStep):
            continue
        known = _statistics_of(step)
        for key, declared in step.features.items():
            mode = step.norm_map.get(declared.type, NormalizationMode.IDENTITY)
            chosen = step.normalize_observation_keys
            if mode is NormalizationMode.IDENTITY or key not in features or (chosen and key not in {*chosen, ACTION}):
                continue
            vector = features[key]["dtype"] not in ("image", "video")
            feature = {**features[key], "shape": declared.shape} if padded and vector else features[key]
            fault = fault_of(known.get(key, {}), mode, feature)
            if fault is not None:
                raise ValueError(
                    f"The policy's preprocessor normalises {key!r} by {mode.value}, and its statistics of it {fault}: make "
                    "the preprocessor with this dataset's statistics, or leave `preprocessor` out, and PTRTrainer does."
                )


def harmless(
    pipeline: PolicyProcessorPipeline, features: Mapping[str, Mapping[str, Any]] | None = None
) -> PolicyProcessorPipeline:
    """The same preprocessor, but a dimension that does not vary by its statistics keeps its scale.

    The value that was recorded becomes what it is by LeRobot (0 by mean and deviation, else -1); LeRobot would divide the
    distance of any other value from it by 1e-8. The postprocessor gives the recorded value, whatever the policy says.

    Args:
        pipeline: a preprocessor; it is not changed.
        features: of the dataset by the policy's names, whose dimensions may have names.
    """
    steps, told = list(pipeline.steps), []
    for place, step in enumerate(steps):
        if not isinstance(step, NormalizerProcessorStep):
            continue
        known = _statistics_of(step)
        changed = dict(known)
        for key, declared in step.features.items():
            mode = step.norm_map.get(declared.type, NormalizationMode.IDENTITY)
            if not READS[mode] or not set(READS[mode]) <= known.get(key, {}).keys():
                continue
            first, second = READS[mode]
            still = constant(known[key], mode)
            unit = np.maximum(1.0, 1e-6 * np.abs(known[key][first]))
            kept = unit if mode is NormalizationMode.MEAN_STD else known[key][first] + 2 * unit
            spread = np.where(still, kept, known[key][second]).astype(np.float32)
            if (spread != known[key][second].astype(np.float32)).any():
                changed[key] = {**known[key], second: spread}
                told.append(f"{key} in {named_dimensions(still.reshape(-1), (features or {}).get(key))}")
        if any(changed[key] is not known[key] for key in known):
            steps[place] = copy(step)
            steps[place].stats = changed
            steps[place].to(device=step.device, dtype=step.dtype)
    if not told:
        return pipeline
    logger.warning("Constant by their statistics, and so left at their own scale: %s.", "; ".join(told))
    return _with_steps(pipeline, steps)


def _with_steps(pipeline: PolicyProcessorPipeline, steps: Sequence[ProcessorStep]) -> PolicyProcessorPipeline:
    changed = copy(pipeline)
    changed.steps = steps
    return changed


def _statistics_of(step: NormalizerProcessorStep) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in step.state_dict().items():
        key, _, statistic = name.rpartition(".")
        found.setdefault(key, {})[statistic] = value.double().numpy()
    return found
