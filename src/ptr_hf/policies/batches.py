"""Masks of a batch, and checks that it is what a policy reads."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor, nn

from ptr_hf.constants import ACTION_DIM_PAD, ACTION_PAD
from ptr_hf.policies.trace import Batch, Belief, BeliefMask


def action_mask(batch: Batch, action: Float[Tensor, "batch steps _"]) -> Bool[Tensor, "batch steps"]:
    """True where a recorded action lies inside its episode; all True when the batch says nothing."""
    pad = batch.get(ACTION_PAD)
    return all_true(action) if pad is None else ~pad


def all_true(tokens: Float[Tensor, "batch tokens _"]) -> Bool[Tensor, "batch tokens"]:
    """The mask of tokens that are all real."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def unused_dims(batch: Batch, action: Float[Tensor, "batch steps dims"]) -> Bool[Tensor, "batch dims"] | None:
    """True where a row's robot lacks an action dimension; None when the batch says nothing.

    Raises:
        ValueError: the batch's mask is of another shape than its actions.
    """
    unused = batch.get(ACTION_DIM_PAD)
    if unused is not None and unused.shape != (action.shape[0], action.shape[2]):
        raise ValueError(
            f"{ACTION_DIM_PAD!r} has the shape {tuple(unused.shape)} where the actions have {action.shape[0]} rows of "
            f"{action.shape[2]} dimensions: give one entry for each."
        )
    return unused


def without_unused(
    values: Shaped[Tensor, "batch *steps width"], unused: Bool[Tensor, "batch dims"] | None
) -> Shaped[Tensor, "batch *steps width"]:
    """Actions with zeros in the unused dimensions; what a model pads beyond the mask's width is left as it is.

    Raises:
        ValueError: the mask is wider than the actions.
    """
    if unused is None:
        return values
    beyond = values.shape[-1] - unused.shape[-1]
    if beyond < 0:
        raise ValueError(
            f"{ACTION_DIM_PAD!r} marks {unused.shape[-1]} action dimensions where the policy has {values.shape[-1]}."
        )
    unused = nn.functional.pad(unused, (0, beyond))
    return values.masked_fill(unused.unflatten(0, (-1, *[1] * (values.ndim - 2))), 0)


def per_sample_mean(
    losses: Float[Tensor, "batch steps dims"],
    mask: Bool[Tensor, "batch steps"],
    unused: Bool[Tensor, "batch dims"] | None = None,
) -> Float32[Tensor, " batch"]:
    """Mean of an elementwise loss over each row's valid steps and used dimensions; 0 for a row that has none."""
    losses = losses.float() * mask.unsqueeze(-1)
    if unused is None:
        entries = mask.sum(dim=1) * losses.shape[-1]
    else:
        losses = losses * ~unused.unsqueeze(1)
        entries = mask.sum(dim=1) * (~unused).sum(dim=1)
    return losses.sum(dim=(1, 2)) / entries.clamp_min(1)


def belief_token_mask(belief: Belief, mask: BeliefMask | None) -> Bool[Tensor, "batch tokens"]:
    """Spread a belief mask over tokens; everything is readable when there is no mask."""
    if mask is None:
        return all_true(belief)
    return mask if mask.ndim == 2 else mask.unsqueeze(1).expand(belief.shape[:2])


def require_keys(batch: Batch, keys: Iterable[str], family: str) -> None:
    """Refuse a batch that lacks what the policy reads."""
    missing = [key for key in keys if key not in batch]
    if missing:
        raise ValueError(
            f"The {family} policy reads {', '.join(map(repr, missing))}, which the batch does not have (it has "
            f"{', '.join(map(repr, sorted(batch)))}): pass the batch through the policy's preprocessor, and map "
            "dataset names onto the policy's input_features with rename_map where they differ."
        )


def refuse_stacked_frames(batch: Batch, keys: Iterable[str], single_frame_ndim: int, frames: int = 1) -> None:
    """Refuse more frames under one key than the policy's `frames`: the last one it reads may be the future."""
    for key in keys:
        value = batch.get(key)
        if value is None:
            continue
        held = value.shape[1] if value.ndim > single_frame_ndim else 1
        if held > frames:
            raise ValueError(
                f"{key!r} holds {held} frames per row where the policy reads {frames}, and its last may be the future: "
                "split future frames off under keys of their own before the policy sees the batch."
            )
