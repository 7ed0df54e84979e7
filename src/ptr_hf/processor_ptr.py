"""PTR's pre- and post-processors are the base policy's own: its normalisation, tokenizer and devices, unchanged.

They run on the whole segment at once, futures included, so that consequences are normalised exactly like observations.
"""

from typing import Any

from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, RenameObservationsProcessorStep

from ptr_hf.configuration_ptr import PTRConfig


def make_ptr_pre_post_processors(
    config: PTRConfig,
    dataset_stats: dict[str, dict[str, Any]] | None = None,
    dataset_meta: Any = None,
    rename_map: dict[str, str] | None = None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Processors of the base policy, with the statistics of the dataset at hand.

    Args:
        config: of the PTR policy.
        dataset_stats: LeRobot's statistics; None keeps the ones saved with `config.base_path`.
        dataset_meta: handed on to base policies whose processors read it.
        rename_map: dataset key -> policy key, for observations named differently.
    """
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
    normalizer = {"features": features, "norm_map": config.normalization_mapping}
    unnormalizer = {"features": base.output_features, "norm_map": config.normalization_mapping}
    if dataset_stats is not None:
        normalizer["stats"] = unnormalizer["stats"] = dataset_stats
    return make_pre_post_processors(
        base,
        pretrained_path=config.base_path,
        pretrained_revision=config.base_revision,
        dataset_stats=dataset_stats,
        preprocessor_overrides={
            "device_processor": {"device": base.device},
            "normalizer_processor": normalizer,
            "rename_observations_processor": {"rename_map": rename_map or {}},
        },
        postprocessor_overrides={"unnormalizer_processor": unnormalizer},
    )
