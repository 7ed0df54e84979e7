"""ptr_hf: post-train LeRobot policies on uneven demonstrations with Posterior-Transition Reweighting."""

import importlib
from typing import TYPE_CHECKING, Any

from ptr_hf.log_filters import shorten_decoder_warnings

if TYPE_CHECKING:
    from ptr_hf.configuration_ptr import PTRConfig
    from ptr_hf.modeling_ptr import PTRPolicy
    from ptr_hf.scoring import score_dataset
    from ptr_hf.training.arguments import PTRTrainingArguments
    from ptr_hf.training.trainer import PTRTrainer

__all__ = ["PTRConfig", "PTRPolicy", "PTRTrainer", "PTRTrainingArguments", "score_dataset"]

# Imported at first use: `ptr_hf.method` alone needs torch and nothing else.
_HOMES = {
    "PTRConfig": "configuration_ptr",
    "PTRPolicy": "modeling_ptr",
    "PTRTrainer": "training.trainer",
    "PTRTrainingArguments": "training.arguments",
    "score_dataset": "scoring",
}

shorten_decoder_warnings()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
