"""The report of the corruption benchmark: statistics, figures and words from its CSV files."""

from ptr_hf.report.corruption.page import PAGE_FILE, write_corruption_report
from ptr_hf.report.corruption.presets import PRESET_LINES
from ptr_hf.report.corruption.runs import BIN_EDGES, Run, Runs, read_runs
from ptr_hf.report.corruption.statistics import Estimate, GapShare, estimate, gap_share, paired

__all__ = [
    "BIN_EDGES",
    "PAGE_FILE",
    "PRESET_LINES",
    "Estimate",
    "GapShare",
    "Run",
    "Runs",
    "estimate",
    "gap_share",
    "paired",
    "read_runs",
    "write_corruption_report",
]
