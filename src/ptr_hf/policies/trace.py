"""What passes between a policy's adapter and the method."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

Batch = dict[str, Any]
"""A LeRobot policy batch as the preprocessor returns it: tensors with a leading row axis, and strings beside them."""

Belief = Float[Tensor, "batch tokens context_dim"]
BeliefMask = Bool[Tensor, " batch"] | Bool[Tensor, "batch tokens"]
"""Which rows (or single tokens) of a belief the policy may read."""


@dataclass
class PolicyTrace:
    """What one training forward of the base policy gives the method (METHOD.md, section 2).

    Attributes:
        loss: per-sample action loss, the mean over the valid entries of `action_is_pad` and `action_dim_is_pad`; float32.
        context: H_t, backbone hidden states over the context tokens, without belief positions; float32.
        context_mask: True where a context token is real.
        action_tokens: A_t, the clean recorded chunk through the action head's own projector; float32.
        action_hidden: C_t, hidden states at the action-token positions; float32.
        action_mask: True where an action step lies inside its episode.

    A policy that writes its chunk as text has action tokens in the places of steps.
    """

    loss: Float32[Tensor, " batch"]
    context: Float32[Tensor, "batch context context_dim"]
    context_mask: Bool[Tensor, "batch context"]
    action_tokens: Float32[Tensor, "batch steps action_dim"]
    action_hidden: Float32[Tensor, "batch steps hidden_dim"]
    action_mask: Bool[Tensor, "batch steps"]


@dataclass
class RolloutTrace:
    """What one predicted chunk gives the belief at inference.

    Attributes:
        actions: the predicted chunk in the policy's normalised action space, as `predict_action_chunk` returns it, with zeros
            in the dimensions of `action_dim_is_pad`; a policy with an observation history leaves out the steps before now.
        action_tokens: A_t of the whole predicted chunk.
        action_hidden: C_t of the last denoising step (of the only pass, for a regression head).
        action_mask: all True, since a predicted chunk has no padding; for a policy that writes tokens, up to each row's end.
    """

    actions: Float[Tensor, "batch executed robot_action_dim"]
    action_tokens: Float32[Tensor, "batch steps action_dim"]
    action_hidden: Float32[Tensor, "batch steps hidden_dim"]
    action_mask: Bool[Tensor, "batch steps"]


@dataclass
class Views:
    """Vision features of N observations, computed once and read by every chunk of a segment.

    Attributes:
        features: what the adapter injects instead of running the vision tower, one entry per view; the graph is kept.
        masks: True where a row's view is a real image, one entry per view.
        tower: hidden states at the consequence layer per camera (N, patches, d_v), detached; empty unless asked for.
    """

    features: dict[str, Float[Tensor, "rows ..."]]
    masks: dict[str, Bool[Tensor, " rows"]]
    tower: dict[str, Float[Tensor, "rows patches _"]] = field(default_factory=dict)

    def check_rows(self, rows: int) -> None:
        """Refuse a batch of another number of rows.

        Raises:
            ValueError: it has.
        """
        for value in self.features.values():
            if value.shape[0] != rows:
                raise ValueError(f"views has {value.shape[0]} rows and the batch {rows}.")

    def rows(self, index: slice | Int[Tensor, " selected"]) -> "Views":
        """The same views for some of the rows (differentiable)."""
        parts = (self.features, self.masks, self.tower)
        return Views(*({key: value[index] for key, value in part.items()} for part in parts))
