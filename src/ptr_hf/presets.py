"""The presets: what each sets, whose it is and what it does, once for configuration, model card, help and reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
        fields: the options that it sets; the others have the paper's values.
        origin: "paper", "ours", "baseline", "control" (the same machinery without what is being judged) or "bound" (a control
            that knows the truth).
        summary: what weighs the data.
        named: options that the preset is named after: they cannot have another value.
    """

    fields: Mapping[str, Any]
    origin: str
    summary: str
    named: tuple[str, ...] = ("score",)


# What every preset of ours shares: an ordinary policy, no loss term of the scorer in it, weights by the mean score of an episode.
_OURS: dict[str, Any] = {
    "num_belief_tokens": 0,
    "detach_scorer_inputs": True,
    "hard_negative_key": "state",
    "aggregation": "trajectory",
    "missing_future": "episode",
    "weight_map": "exponential",
    "weight_min": 0.02,
    "scorer_warmup_steps": 0.15,
}
_BY_TASK: dict[str, Any] = {**_OURS, "standardize_by": "task"}
# the map that leaves clean data alone
_CALIBRATED: dict[str, Any] = {**_BY_TASK, "weight_map": "calibrated", "weight_min": 0.01}

PRESETS: dict[str, Preset] = {
    "ptr": Preset({}, "paper", "a chunk weighs more the better its recorded consequence is picked out of others", ()),
    "sft_belief": Preset(
        {"alpha": 0.0}, "paper", "scorer and belief tokens run, but every chunk counts the same (α = 0)", ("alpha",)
    ),
    # the base policy's own loss, bit for bit
    "sft": Preset(
        {"alpha": 0.0, "num_belief_tokens": 0, "scorer": False},
        "baseline",
        "there is no scorer, and every chunk counts the same",
        ("alpha", "num_belief_tokens", "scorer"),
    ),
    "ptr_offline": Preset(
        {"weights": "auto", "num_belief_tokens": 0, "scorer": False, "standardize_by": "task", "weight_min": 0.02},
        "ours",
        "weights that were known before training, of an inspection or a file, multiply the loss; nothing is scored in the step",
        ("num_belief_tokens", "scorer"),
    ),
    # METHOD section 13: which action, which instruction, belongs to what followed?
    "ptr_consequence": Preset(
        {"score": "consequence", **_OURS},
        "ours",
        "episodes whose actions and instruction do not fit what followed weigh less",
    ),
    "ptr_consequence_loss": Preset(
        {"score": "consequence_loss", **_BY_TASK},
        "ours",
        "as `ptr_consequence`, and a large action loss weighs an episode down too",
    ),
    "ptr_calibrated": Preset(
        {"score": "consequence_log_loss", **_CALIBRATED},
        "ours",
        "episodes far below good ones by consequence and loss are rejected, good ones count alike",
        (),
    ),
    "ptr_consequence_shuffled": Preset(
        {"score": "consequence", "shuffle_consequences": True, **_OURS},
        "control",
        "as `ptr_consequence`, with the consequences of other chunks",
        ("score", "shuffle_consequences"),
    ),
    "ptr_margin": Preset(
        {"score": "action_margin", **_OURS},
        "ours",
        "an episode weighs more the better its own actions explain what followed than others' do",
    ),
    "small_loss": Preset(
        {"score": "loss", **_BY_TASK},
        "control",
        "episodes with a small action loss weigh more; no consequence is read",
    ),
    "small_loss_rejection": Preset(
        {"score": "loss", **_BY_TASK, "weight_map": "rejection"},
        "control",
        "episodes with a large action loss are rejected; no consequence is read",
    ),
    "small_loss_calibrated": Preset(
        {"score": "log_loss", **_CALIBRATED}, "control", "episodes with an unusually large action loss are rejected"
    ),
    "random_weights": Preset({"score": "random", **_OURS}, "control", "episodes get random weights"),
    "motion": Preset({"score": "motion", **_BY_TASK}, "control", "episodes are weighed by how much the robot moves"),
    "length": Preset({"score": "length", **_BY_TASK}, "control", "episodes are weighed by their length"),
    "oracle": Preset(
        {"score": "oracle", **_OURS, "aggregation": "sample", "weight_map": "paper", "weight_min": 0.001},
        "bound",
        "the known truth about the demonstrations sets the weights",
    ),
}
