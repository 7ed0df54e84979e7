"""Will PTR help on a dataset? A frozen policy, a pass over the data, small cross-fitted heads, and plain advice."""

from ptr_hf.diagnosis.collect import Recorder, collect, frozen_policy, rows_of
from ptr_hf.diagnosis.diagnose import Diagnosis, Effect, EpisodeRow, Identifiability, Interval, diagnose
from ptr_hf.diagnosis.identify import Verdicts, cross_fitted, identify_actions, identify_instructions, two_folds
from ptr_hf.diagnosis.rules import RULES, Advice, advise

__all__ = [
    "RULES",
    "Advice",
    "Diagnosis",
    "Effect",
    "EpisodeRow",
    "Identifiability",
    "Interval",
    "Recorder",
    "Verdicts",
    "advise",
    "collect",
    "cross_fitted",
    "diagnose",
    "frozen_policy",
    "identify_actions",
    "identify_instructions",
    "rows_of",
    "two_folds",
]
