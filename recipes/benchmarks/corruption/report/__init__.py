"""The report of the corruption benchmark: statistics, figures and words from its CSV files."""

from benchmarks.corruption.report.page import PAGE_FILE, write_corruption_report
from benchmarks.corruption.report.runs import BIN_EDGES, Run, Runs, read_runs
from benchmarks.corruption.report.statistics import Estimate, GapShare, estimate, gap_share, paired

__all__ = [
    "BIN_EDGES",
    "PAGE_FILE",
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
