"""What a training run leaves to look at: its dynamics, figures, detection of known corruptions, and one HTML page."""

from ptr_hf.report.chunk_scores import SCORES_FILE, ChunkScores, read_scores, write_scores
from ptr_hf.report.dynamics import (
    DYNAMICS_COLUMNS,
    DYNAMICS_FILE,
    Dynamics,
    DynamicsLog,
    read_dynamics,
    weight_bin_edges,
    weight_histogram,
)
from ptr_hf.report.evaluation import (
    WeightShare,
    detection,
    effective_sample_share,
    episode_weights,
    summary_table,
    weight_shares,
)
from ptr_hf.report.figures import dynamics_figure, given_weights_figure, weight_histogram_figure
from ptr_hf.report.findings import findings
from ptr_hf.report.page import REPORT_FILE, write_report
from ptr_hf.report.sources import GroupShare, group_shares, sources_figure
from ptr_hf.report.style import save_figure

__all__ = [
    "DYNAMICS_COLUMNS",
    "DYNAMICS_FILE",
    "REPORT_FILE",
    "SCORES_FILE",
    "ChunkScores",
    "Dynamics",
    "DynamicsLog",
    "GroupShare",
    "WeightShare",
    "detection",
    "dynamics_figure",
    "effective_sample_share",
    "episode_weights",
    "findings",
    "given_weights_figure",
    "group_shares",
    "read_dynamics",
    "read_scores",
    "save_figure",
    "sources_figure",
    "summary_table",
    "weight_bin_edges",
    "weight_histogram",
    "weight_histogram_figure",
    "weight_shares",
    "write_report",
    "write_scores",
]
