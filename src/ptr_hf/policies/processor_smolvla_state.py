"""`smolvla_state`: SmolVLA's own pre- and post-processors. LeRobot finds this module by its name."""

from typing import Any

from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline

from ptr_hf.policies.configuration_smolvla_state import SmolVLAStateConfig


def make_smolvla_state_pre_post_processors(
    config: SmolVLAStateConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Renaming, instruction tokens and normalisation, as for SmolVLA."""
    return make_smolvla_pre_post_processors(config, dataset_stats)
