"""Posterior-Transition Reweighting, in the order of the paper (arXiv 2603.16542).

belief (4.1) → target, candidates, scorer (4.2) → weight (4.4) → controller (4.5) → objective (4.6, Eq. 32).
This package imports torch and nothing else of ours.
"""

from ptr_hf.method.belief import BeliefMemory, BeliefTokenizer, belief_diversity, belief_entropy
from ptr_hf.method.candidate_queue import CandidateQueue
from ptr_hf.method.candidates import Candidates, Samples, build_candidates, gather_samples
from ptr_hf.method.chunks import ChunkBatch, ObjectiveOutput
from ptr_hf.method.controller import AdaptiveScaleController
from ptr_hf.method.distributed import GlobalRows
from ptr_hf.method.draws import Draws, uniform
from ptr_hf.method.numerics import NeverLowered, full_precision
from ptr_hf.method.objective import ObjectiveConfig, PTRObjective
from ptr_hf.method.scorer import (
    TransitionScorer,
    identification_logits,
    identification_loss,
    identification_metrics,
    masked_derangement,
    masked_mean,
    ptr_score,
    ranking_loss,
)
from ptr_hf.method.shares import GROUP_STATISTICS, group_statistics, share_bound
from ptr_hf.method.target import ConsequenceEncoder, consequence_embedding
from ptr_hf.method.weight import (
    conservative_weight,
    effective_sample_size,
    global_self_normalized_loss,
    kl_bound,
    self_normalized_loss,
    weight_bounds,
)

__all__ = [
    "GROUP_STATISTICS",
    "AdaptiveScaleController",
    "BeliefMemory",
    "BeliefTokenizer",
    "CandidateQueue",
    "Candidates",
    "ChunkBatch",
    "ConsequenceEncoder",
    "Draws",
    "GlobalRows",
    "NeverLowered",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "PTRObjective",
    "Samples",
    "TransitionScorer",
    "belief_diversity",
    "belief_entropy",
    "build_candidates",
    "consequence_embedding",
    "conservative_weight",
    "effective_sample_size",
    "full_precision",
    "gather_samples",
    "global_self_normalized_loss",
    "group_statistics",
    "identification_logits",
    "identification_loss",
    "identification_metrics",
    "kl_bound",
    "masked_derangement",
    "masked_mean",
    "ptr_score",
    "ranking_loss",
    "self_normalized_loss",
    "share_bound",
    "uniform",
    "weight_bounds",
]
