"""Score a dataset before training: which demonstrations are bad, and why; or through the scorer of a trained checkpoint."""

from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.inspection import inspect_dataset
from ptr_hf.scoring.trained import ScoredSource, action_loss, action_loss_by_source, score_dataset

__all__ = ["DatasetScores", "ScoredSource", "action_loss", "action_loss_by_source", "inspect_dataset", "score_dataset"]
