"""ptr_hf: post-train LeRobot policies on uneven demonstrations with Posterior-Transition Reweighting."""

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.scoring import score_dataset
from ptr_hf.trainer import PTRTrainer
from ptr_hf.training_args import PTRTrainingArguments

__all__ = ["PTRConfig", "PTRPolicy", "PTRTrainer", "PTRTrainingArguments", "score_dataset"]
