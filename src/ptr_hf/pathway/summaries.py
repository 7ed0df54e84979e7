"""What the method keeps of a chunk's forward: h, e, its stretches of actions, and how much it moves."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ptr_hf.constants import ACTION_DIM_PAD
from ptr_hf.data.segments import ACTION, PAD_SUFFIX
from ptr_hf.method import masked_mean
from ptr_hf.pathway.build import ACTION_STRETCHES
from ptr_hf.policies import PolicyTrace
from ptr_hf.policies.batches import without_unused


def summaries(trace: PolicyTrace) -> dict[str, Tensor]:
    """Loss, context h (masked mean of H), action e (masked mean of A), and A by consecutive stretches of time."""
    return {
        "loss": trace.loss,
        "context": masked_mean(trace.context, trace.context_mask),
        "action": masked_mean(trace.action_tokens, trace.action_mask),
        "stretches": stretches_of(trace.action_tokens.detach(), trace.action_mask),
    }


def stretches_of(
    tokens: Float[Tensor, "rows steps dim"], mask: Bool[Tensor, "rows steps"]
) -> Float[Tensor, "rows stretches dim"]:
    """Mean token of each of the chunk's consecutive stretches over its valid steps, zeros where it has none."""
    steps = tokens.shape[1]
    count = min(ACTION_STRETCHES, steps)
    # stretch of step i, as even as the numbers allow
    place = torch.div(torch.arange(steps, device=tokens.device) * count, steps, rounding_mode="floor")
    member = torch.nn.functional.one_hot(place, count).to(tokens)
    weight = mask.to(tokens)[:, :, None] * member
    return torch.einsum("bsk,bsd->bkd", weight, tokens) / weight.sum(dim=1).clamp(min=1)[..., None]


def motion_of(chunks: dict[str, Any]) -> Float[Tensor, " rows"]:
    """Mean square of a chunk's normalised actions over its valid steps and used dimensions."""
    pad, unused = chunks[ACTION + PAD_SUFFIX], chunks.get(ACTION_DIM_PAD)
    # a preprocessor may have lengthened the chunk to the model's own horizon
    squares = chunks[ACTION][:, : pad.shape[1]].square()
    if unused is None:
        return masked_mean(squares.mean(dim=-1, keepdim=True), ~pad)[:, 0]
    # or widened it beyond the robot's dimensions
    squares = without_unused(squares[..., : unused.shape[-1]], unused)
    used = (~unused).sum(dim=1).clamp_min(1)
    return masked_mean(squares.sum(dim=-1, keepdim=True), ~pad)[:, 0] / used
