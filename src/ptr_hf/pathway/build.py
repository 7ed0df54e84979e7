"""The side pathway as a configuration describes it: the objective with its scorer, queue and controller, and the belief."""

from dataclasses import fields

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


class BeliefModule(nn.Module):
    """The belief's two learned parts, named apart from the base policy."""

    def __init__(self, dim: int, hidden_dim: int, backbone_dim: int, num_tokens: int, temperature: float) -> None:
        super().__init__()
        self.tokenizer = BeliefTokenizer(dim, num_tokens, temperature, hidden_dim)
        self.memory = BeliefMemory(dim, num_tokens, backbone_dim)


def build_objective(config: PTRConfig, context_dim: int, action_dim: int, target_dim: int) -> PTRObjective:
    """The objective of Eq. 32 with fresh scorer, empty queue and controller, and the strategy that weighs the loss.

    Args:
        config: of the policy; its base's features are known.
        context_dim, action_dim: widths of the adapter's h and e.
        target_dim: width of a consequence embedding, 0 where no futures are read.
    """
    state = config.robot_state_feature
    state_dim = state.shape[0] if state else 0
    identifies = config.reads_posterior
    queue = CandidateQueue(config.queue_size, target_dim, state_dim) if config.queue_size and identifies else None
    chunk = config.resolved_chunk_size
    options = {item.name: vars(config)[item.name] for item in fields(ObjectiveConfig) if item.name != "discount"}
    return PTRObjective(
        TransitionScorer(context_dim, action_dim, target_dim, config.scorer_dim) if identifies else None,
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
        weigher=None if config.is_paper else _build_weigher(config, action_dim, target_dim),
    )


def _build_weigher(config: PTRConfig, action_dim: int, target_dim: int) -> ScoreWeigher:
    """Score × Aggregation × WeightMap; what depends on the training data has the size that the configuration knows."""
    names = SCORES[config.score]
    memory = None
    if config.aggregation != "sample":
        memory = SlotMemory(config.num_episodes, config.num_slots, len(names), config.slot_frames, config.score_horizon)
    return ScoreWeigher(
        {name: _build_score(name, config, action_dim, target_dim) for name in names},
        memory,
        weight_map=config.weight_map,
        floor=config.weight_min,
        ceiling=config.weight_max,
        alpha=config.alpha,
        missing_future=config.missing_future,
        self_weighting=config.self_weighting,
        refresh_interval=config.score_refresh_steps,
    )


def _build_score(name: str, config: PTRConfig, action_dim: int, target_dim: int) -> Score:
    if name in READINGS:
        return Reading(name)
    match name:
        case "action_identification":
            width = min(ACTION_STRETCHES, config.resolved_chunk_size) * action_dim
            return ActionIdentification(target_dim, width, config.head_dim, config.cross_fit)
        case "instruction_identification":
            return InstructionIdentification(target_dim, max(1, config.num_tasks), config.head_dim, config.cross_fit)
    return OfEpisode(torch.zeros(config.num_episodes))
