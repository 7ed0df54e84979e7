"""What weighs the loss beyond the paper's T: Score × Aggregation × WeightMap, controls included.

Every score reads what the step's forward has already computed; only ``action_identification`` and
``instruction_identification`` train small heads of their own, on constants.
"""

from ptr_hf.scores.aggregation import WHOLE_EPISODE, EpisodeTable, SlotMemory
from ptr_hf.scores.given import FrameWeights, weighed_chunks, weighed_loss, weight_metrics
from ptr_hf.scores.identification import ActionIdentification, InstructionIdentification
from ptr_hf.scores.readings import READINGS, READS_POSTERIOR, OfEpisode, Reading, known_beforehand
from ptr_hf.scores.score import Score
from ptr_hf.scores.weigher import AGGREGATIONS, MISSING_FUTURE, ScoreWeigher
from ptr_hf.scores.weight_map import WEIGHT_MAPS, map_range

SCORES: dict[str, tuple[str, ...]] = {
    # the paper's T
    "posterior": ("posterior",),
    # ours, one question each
    "action_margin": ("action_margin",),
    "action_identification": ("action_identification",),
    "instruction_identification": ("instruction_identification",),
    # ours, together
    "consequence": ("action_identification", "instruction_identification"),
    "consequence_loss": ("action_identification", "instruction_identification", "loss"),
    "consequence_log_loss": ("action_identification", "instruction_identification", "log_loss"),
    # controls
    "uniform": ("uniform",),
    "random": ("random",),
    "loss": ("loss",),
    "log_loss": ("log_loss",),
    "motion": ("motion",),
    "length": ("length",),
    "oracle": ("oracle",),
}
READS_FUTURES = (*READS_POSTERIOR, "action_identification", "instruction_identification")

__all__ = [
    "AGGREGATIONS",
    "MISSING_FUTURE",
    "READINGS",
    "READS_FUTURES",
    "READS_POSTERIOR",
    "SCORES",
    "WEIGHT_MAPS",
    "WHOLE_EPISODE",
    "ActionIdentification",
    "EpisodeTable",
    "FrameWeights",
    "InstructionIdentification",
    "OfEpisode",
    "Reading",
    "Score",
    "ScoreWeigher",
    "SlotMemory",
    "known_beforehand",
    "map_range",
    "weighed_chunks",
    "weighed_loss",
    "weight_metrics",
]
