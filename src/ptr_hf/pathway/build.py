"""The side pathway as a configuration describes it: the objective with its scorer, queue and controller, and the belief."""

from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.method import (
    AdaptiveScaleController,
    BeliefMemory,
    BeliefTokenizer,
    CandidateQueue,
    ObjectiveConfig,
    PTRObjective,
    TransitionScorer,
)
from ptr_hf.policies.base import AdapterBase
from ptr_hf.scores import (
    READINGS,
    SCORES,
    ActionIdentification,
    InstructionIdentification,
    OfEpisode,
    Reading,
    Score,
    ScoreWeigher,
    SlotMemory,
)

ACTION_STRETCHES = 8
"""Stretches of a chunk whose action tokens are averaged for the scores: enough to see a delay, few enough to be cheap."""


class DataSizes(NamedTuple):
    """How much there is of the training data, where its verdicts are remembered.

    Attributes:
        episodes: of the data.
        slots: stretches of them that have a verdict.
        tasks: instructions.
    """

    episodes: int = 0
    slots: int = 0
    tasks: int = 1

    @classmethod
    def stored(cls, shapes: Mapping[str, tuple[int, ...]]) -> "DataSizes":
        """Those that the tensors of a side pathway have, by their names.

        Args:
            shapes: of the tensors.
        """
        own = {name: shape for name, shape in shapes.items() if name.startswith("objective.weigher.") and shape}
        return cls(**{what: shape[0] for name, shape in own.items() for end, what in _SIZED if name.endswith(end)})


_SIZED = (
    (".memory.first_slot", "episodes"),
    (".memory.weight", "slots"),
    (".values", "episodes"),
    (".instruction.bias", "tasks"),
)
"""What the first dimension of some tensors of `ScoreWeigher` counts."""


NO_DATA = DataSizes()


class BeliefModule(nn.Module):
    """The belief's two learned parts, named apart from the base policy."""

    def __init__(self, dim: int, hidden_dim: int, backbone_dim: int, num_tokens: int, temperature: float) -> None:
        super().__init__()
        self.tokenizer = BeliefTokenizer(dim, num_tokens, temperature, hidden_dim)
        self.memory = BeliefMemory(dim, num_tokens, backbone_dim)


def build_objective(config: PTRConfig, adapter: AdapterBase, target_dim: int, sizes: DataSizes) -> PTRObjective:
    """The objective of Eq. 32 with fresh scorer, empty queue and controller, and the strategy that weighs the loss.

    Args:
        config: of the policy; its base's features are known.
        adapter: of the base policy.
        target_dim: width of a consequence embedding, 0 where no futures are read.
        sizes: of the training data.
    """
    identifies = config.reads_posterior
    queue = (
        CandidateQueue(config.queue_size, target_dim, config.state_dim) if config.queue_size and identifies else None
    )
    chunk = config.resolved_chunk_size
    options = {item.name: vars(config)[item.name] for item in fields(ObjectiveConfig) if item.name != "discount"}
    return PTRObjective(
        TransitionScorer(adapter.context_dim, adapter.action_dim, target_dim, config.scorer_dim)
        if identifies
        else None,
        queue,
        AdaptiveScaleController(
            config.temperature,
            config.beta,
            config.controller_decay,
            (config.temperature_min, config.temperature_max),
            (config.beta_min, config.beta_max),
            config.hard_negative_ratio_max,
            enabled=config.controller,
        ),
        ObjectiveConfig(
            discount=config.consequence_discount ** ((config.consequence_offset or chunk) / chunk), **options
        ),
        weigher=None if config.is_paper else _build_weigher(config, adapter, target_dim, sizes),
    )


def _build_weigher(config: PTRConfig, adapter: AdapterBase, target_dim: int, sizes: DataSizes) -> ScoreWeigher:
    """Score × Aggregation × WeightMap."""
    names = SCORES[config.score]
    memory = None
    if config.aggregation != "sample":
        memory = SlotMemory(sizes.episodes, sizes.slots, len(names), config.slot_frames, config.score_horizon)
    return ScoreWeigher(
        {name: _build_score(name, config, adapter, target_dim, sizes) for name in names},
        memory,
        weight_map=config.weight_map,
        floor=config.weight_min,
        ceiling=config.weight_max,
        alpha=config.alpha,
        missing_future=config.missing_future,
        self_weighting=config.self_weighting,
        refresh_interval=config.score_refresh_steps,
    )


def _build_score(name: str, config: PTRConfig, adapter: AdapterBase, target_dim: int, sizes: DataSizes) -> Score:
    if name in READINGS:
        return Reading(name)
    match name:
        case "action_identification":
            width = min(ACTION_STRETCHES, adapter.action_steps) * adapter.action_dim
            return ActionIdentification(target_dim, width, config.head_dim, config.cross_fit)
        case "instruction_identification":
            return InstructionIdentification(target_dim, sizes.tasks, config.head_dim, config.cross_fit)
    return OfEpisode(torch.zeros(sizes.episodes))
