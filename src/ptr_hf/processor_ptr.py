"""PTR's pre- and post-processors are the base policy's own: its normalisation, tokenizer and devices, unchanged.

Segments are laid out as plain rows before them, futures included: each chunk gets its own prompt, and consequences are
normalised exactly like observations.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import NormalizationMode
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import (
    EnvTransition,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from safetensors.torch import load_file
from torch import Tensor

from ptr_hf.artifacts.checkpoint import resolve_processors
from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.data.fit import renamed_features
from ptr_hf.data.normalizers import harmless
from ptr_hf.data.segments import SegmentLayout, segment_rows
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.files.reading import read_json
from ptr_hf.files.regular import inside

RENAMING_STEP = "rename_observations_processor"
NORMALIZING_STEPS = (
    "normalizer_processor",
    "unnormalizer_processor",
    "ptr_embodiment_observation",
    "ptr_embodiment_action",
)
"""Steps of saved processors that hold statistics."""


def make_ptr_pre_post_processors(
    config: PTRConfig,
    dataset_stats: dict[str, dict[str, Any]] | None = None,
    dataset_meta: Any = None,
    rename_map: dict[str, str] | None = None,
    embodiments: tuple[ProcessorStep, ProcessorStep] | None = None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Processors of the base policy, with the statistics of the dataset at hand; the first takes segments too.

    What they save is the base policy's own: how they read a batch is no part of it.

    Args:
        config: of the PTR policy.
        dataset_stats: LeRobot's statistics, by the policy's names; None keeps the ones saved with `config.base_path`.
        dataset_meta: handed on to base policies whose processors read it.
        rename_map: dataset key -> policy key, for observations named differently.
        embodiments: of a mixture (`ptr_hf.data.mixture.processor`); they normalise in the place of the base policy's steps.
    """
    modes = config.normalization_mapping
    if embodiments is not None:
        modes = dict.fromkeys(modes, NormalizationMode.IDENTITY)
    preprocessor, postprocessor = _base_processors(config, modes, dataset_stats, dataset_meta, rename_map)
    if embodiments is not None:
        preprocessor.steps = [embodiments[0], *preprocessor.steps]
        postprocessor.steps = [*postprocessor.steps, embodiments[1]]
    preprocessor = harmless(
        preprocessor, None if dataset_meta is None else renamed_features(dataset_meta.features, rename_map or {})
    )
    preprocessor.to_transition = partial(_of_rows, preprocessor.to_transition, layout=config.layout)
    return preprocessor, postprocessor


@no_foreign_code()
def saved_processors(
    config: PTRConfig,
    source: str | Path,
    revision: str | None = None,
    rename_map: dict[str, str] | None = None,
    dataset_stats: dict[str, dict[str, Any]] | None = None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The processors of a checkpoint, as saved, on the policy's device.

    Args:
        config: of the checkpoint's policy.
        source: folder or Hub id.
        revision: on the Hub.
        rename_map: dataset key -> policy key; None keeps the one that was saved.
        dataset_stats: LeRobot's statistics, by the policy's names; None keeps the ones that were saved.
    """
    folder = resolve_processors(source, revision)
    overrides: dict[str, Any] = {"device_processor": {"device": config.device}}
    if rename_map is not None:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    of_actions: dict[str, Any] = {}
    if dataset_stats is not None:
        names = {step.get("registry_name") for file in PROCESSOR_FILES for step in saved_steps(folder, file)}
        for part, name in ((overrides, "normalizer_processor"), (of_actions, "unnormalizer_processor")):
            if name in names:
                part[name] = {"stats": dataset_stats}
    preprocessor, postprocessor = make_pre_post_processors(
        config.base_config,
        pretrained_path=str(folder),
        preprocessor_overrides=overrides,
        postprocessor_overrides=of_actions,
    )
    return harmless(preprocessor), postprocessor


def saved_steps(folder: Path, file: str) -> list[dict[str, Any]]:
    """The steps of a saved pre- or postprocessor as its file names them; none where there is no such file."""
    path = folder / file
    return read_json(path)["steps"] if path.is_file() else []


def saved_renames(source: str | Path, revision: str | None = None) -> dict[str, str]:
    """Dataset key -> policy key, as a checkpoint's preprocessor was saved with; empty without one."""
    steps = saved_steps(resolve_processors(source, revision), PROCESSOR_FILES[0])
    maps = [step["config"].get("rename_map") for step in steps if step.get("registry_name") == RENAMING_STEP]
    return {key: name for renames in maps if renames for key, name in renames.items()}


def keep_statistics(pipeline: PolicyProcessorPipeline, folder: Path, file: str) -> bool:
    """Give the steps of a run's pre- or postprocessor the statistics of one of its checkpoints; whether they had others.

    Args:
        pipeline: of the run that goes on; its steps change.
        folder: of the checkpoint.
        file: of the pipeline there.
    """
    changed = False
    for step, saved in zip(pipeline.steps, saved_steps(folder, file), strict=False):
        name = saved.get("registry_name")
        if name not in NORMALIZING_STEPS or "state_file" not in saved:
            continue
        if type(step) is not ProcessorStepRegistry.get(name):
            continue
        before, kept = step.state_dict(), load_file(inside(folder, saved["state_file"]))
        if before.keys() == kept.keys() and all(torch.equal(before[key], kept[key]) for key in kept):
            continue
        changed = True
        if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
            # what was given explicitly stays, by LeRobot's rule
            step._stats_explicitly_provided = False
        step.load_state_dict(kept)
    return changed


def preprocess(batch: dict[str, Any], preprocessor: PolicyProcessorPipeline, layout: SegmentLayout) -> dict[str, Any]:
    """Scale 8-bit frames to [0, 1] on the batch's device, lay segments out as rows, and run a LeRobot preprocessor."""
    scaled = {key: value.to(torch.float32) / 255.0 if _is_8_bit_frame(value) else value for key, value in batch.items()}
    return preprocessor(segment_rows(scaled, layout))


def _is_8_bit_frame(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim >= 4


def _of_rows(
    to_transition: Callable[[dict[str, Any]], EnvTransition], batch: dict[str, Any], layout: SegmentLayout
) -> EnvTransition:
    return to_transition(segment_rows(batch, layout))


@no_foreign_code()
def _base_processors(
    config: PTRConfig,
    modes: dict[str, NormalizationMode],
    dataset_stats: dict[str, dict[str, Any]] | None,
    dataset_meta: Any,
    rename_map: dict[str, str] | None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    base = config.base_config
    if config.base_path is None:
        preprocessor, postprocessor = make_pre_post_processors(
            base, dataset_stats=dataset_stats, dataset_meta=dataset_meta
        )
        for step in preprocessor.steps:
            if isinstance(step, RenameObservationsProcessorStep):
                step.rename_map = rename_map or {}
        return preprocessor, postprocessor
    features = {**(base.input_features or {}), **(base.output_features or {})}
    normalizer = {"features": features, "norm_map": modes}
    unnormalizer = {"features": base.output_features, "norm_map": modes}
    if dataset_stats is not None:
        normalizer["stats"] = unnormalizer["stats"] = dataset_stats
    return make_pre_post_processors(
        base,
        pretrained_path=str(resolve_processors(config.base_path, config.base_revision)),
        dataset_stats=dataset_stats,
        preprocessor_overrides={
            "device_processor": {"device": base.device},
            "normalizer_processor": normalizer,
            "rename_observations_processor": {"rename_map": rename_map or {}},
        },
        postprocessor_overrides={"unnormalizer_processor": unnormalizer},
    )
