"""The side pathway as a configuration describes it: the objective with its scorer, queue and controller, and the belief."""

from torch import nn

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.method import (
    AdaptiveScaleController,
    BeliefMemory,
    BeliefTokenizer,
    CandidateQueue,
    PTRObjective,
    TransitionScorer,
)


class BeliefModule(nn.Module):
    """The belief's two learned parts, named apart from the base policy."""

    def __init__(self, dim: int, backbone_dim: int, num_tokens: int, temperature: float) -> None:
        super().__init__()
        self.tokenizer = BeliefTokenizer(dim, num_tokens, temperature)
        self.memory = BeliefMemory(dim, num_tokens, backbone_dim)


def build_objective(config: PTRConfig, context_dim: int, action_dim: int, target_dim: int) -> PTRObjective:
    """The objective of Eq. 32 with fresh scorer, empty queue and controller.

    Args:
        config: of the policy; its base's features are known.
        context_dim, action_dim: widths of the adapter's h and e.
        target_dim: width of a consequence embedding.
    """
    state = config.robot_state_feature
    state_dim = state.shape[0] if state else 0
    queue = CandidateQueue(config.queue_size, target_dim, state_dim) if config.queue_size else None
    chunk = config.resolved_chunk_size
    return PTRObjective(
        TransitionScorer(context_dim, action_dim, target_dim, config.scorer_dim),
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
        alpha=config.alpha,
        weight_min=config.weight_min,
        weight_max=config.weight_max,
        identification_coef=config.identification_coef,
        ranking_coef=config.ranking_coef,
        entropy_coef=config.entropy_coef,
        diversity_coef=config.diversity_coef,
        logit_clamp=config.logit_clamp,
        queue_negatives=config.queue_negatives,
        cross_rank=config.cross_rank_negatives,
        hard_negative_key=config.hard_negative_key,
        detach_scorer_inputs=config.detach_scorer_inputs,
        discount=config.consequence_discount ** ((config.consequence_offset or chunk) / chunk),
    )
