"""What PTR reads from a LeRobot policy, one adapter per policy family behind one protocol."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped
from torch import Tensor, nn

Batch = dict[str, Any]
"""A LeRobot policy batch as the preprocessor returns it: tensors with a leading row axis, and strings beside them."""

BeliefMask = Bool[Tensor, " batch"] | Bool[Tensor, "batch tokens"]
"""Which rows (or single tokens) of a belief the policy may read."""

ACTION_PAD = "action_is_pad"
ACTION_DIM_PAD = "action_dim_is_pad"
"""(batch, dims), True where a row's robot lacks an action dimension; absent where every dimension counts."""


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

    def rows(self, index: slice | Int[Tensor, " selected"]) -> "Views":
        """The same views for some of the rows (differentiable)."""
        return Views(
            features={key: value[index] for key, value in self.features.items()},
            masks={key: value[index] for key, value in self.masks.items()},
            tower={key: value[index] for key, value in self.tower.items()},
        )


@runtime_checkable
class PolicyAdapter(Protocol):
    """One policy family, seen by the method.

    An adapter holds the policy (or the `PeftModel` around it) and nothing derived from it: modules are looked up at
    each call, hooks and patches live only while a call or a `belief_scope` runs, and the batch is never changed.

    Attributes:
        policy: the LeRobot policy or the `PeftModel` around one.
        family: LeRobot's name of the policy type.
        preprocesses_rows: whether the policy's preprocessor needs rows of single chunks (it writes a row's state into its
            prompt, say), so that whole segments must not pass through it.
        masks_action_dims: whether batches may mark action dimensions as unused (`action_dim_is_pad`). Then those entries enter
            neither the model nor the loss, whatever was recorded or drawn in them.
    """

    policy: nn.Module
    family: str
    preprocesses_rows: bool
    masks_action_dims: bool

    @property
    def context_dim(self) -> int:
        """Width of H_t, and of a belief token."""
        ...

    @property
    def action_dim(self) -> int:
        """Width of A_t."""
        ...

    @property
    def hidden_dim(self) -> int:
        """Width of C_t."""
        ...

    @property
    def chunk_size(self) -> int:
        """Steps in one action chunk."""
        ...

    def trace(
        self,
        batch: Batch,
        belief: Float[Tensor, "batch tokens context_dim"] | None = None,
        belief_mask: BeliefMask | None = None,
        views: Views | None = None,
    ) -> PolicyTrace:
        """Exactly one forward of the base policy; with `views` the vision tower does not run again.

        Raises:
            ValueError: the batch lacks a key the policy reads, stacks frames, has other rows than `views`, or marks unused action
                dimensions where the family cannot leave them out.
        """
        ...

    def losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The loss of `trace` at the cost of the policy's own, where nothing else of the trace is read."""
        ...

    def rollout(
        self, batch: Batch, belief: Float[Tensor, "batch tokens context_dim"] | None = None, **kwargs: Any
    ) -> RolloutTrace:
        """`predict_action_chunk(batch, **kwargs)` under the belief; module modes are as before afterwards."""
        ...

    def gradient_checkpointing_enable(self) -> None:
        """Turn on the policy's own gradient checkpointing.

        Raises:
            ValueError: LeRobot's policy has none.
        """
        ...

    def compilable(self) -> Iterable[nn.Module]:
        """Modules that can be compiled in place (`nn.Module.compile`): nothing inside them is hooked or patched."""
        ...

    def arrange(self, batch: Batch) -> Batch:
        """What the policy's preprocessor returned, in the form that the other methods take: every tensor by row."""
        ...

    def observe(self, batch: Batch) -> None:
        """Take in one environment step's observation, for a policy that reads several; called before each action."""
        ...

    def belief_scope(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None = None
    ) -> AbstractContextManager[None]:
        """While open, the policy reads the belief tokens in training and in sampling; `None` changes nothing."""
        ...

    def action_scope(self, batch: Batch) -> AbstractContextManager[None]:
        """While open, action dimensions that `batch` marks as unused enter the model as zeros, in training and in sampling.

        `trace` and `rollout` open it themselves; it is for calls of the policy's own methods. Without `action_dim_is_pad` in
        the batch it changes nothing.

        Raises:
            ValueError: the batch marks unused dimensions and the family cannot leave them out.
        """
        ...

    def encode_views(self, batch: Batch, layer: int | None = None) -> Views:
        """The policy's own vision tower on all rows, one call per camera, with gradients where it trains.

        With `layer` the hidden states after that many tower layers are captured too: the consequence target of a
        frozen tower for free (METHOD.md, section 3).

        Raises:
            ValueError: `layer` is given while the tower trains, or is out of range.
        """
        ...

    def target_keys(self) -> tuple[str, ...]:
        """The cameras the consequence target is made of, or the state feature of a policy that sees no images."""
        ...

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the vision tower trains, so that the consequence encoder can share it."""
        ...

    def num_tower_layers(self) -> int:
        """How many layers `build_tower` can keep."""
        ...

    def target_dim(self, layer: int) -> int:
        """Width of the tower's hidden states after `layer` layers."""
        ...

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The tower truncated after `layer` layers, without the final norm.

        A float32 copy in eval mode that requires no gradient; with `share` the policy's own layer modules instead.

        Raises:
            ValueError: `layer` is not in 1..num_tower_layers().
        """
        ...

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """Parameters and buffers of the live tower, under exactly the names of `build_tower(layer).state_dict()`."""
        ...

    def encode_image(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Tower tokens of one camera's images (batch, channels, height, width) as they leave the preprocessor.

        A policy that sees no images takes its state feature (batch, state_dim) instead. No gradient is kept.
        """
        ...


def action_mask(batch: Batch, steps: int, rows: int, device: torch.device) -> Bool[Tensor, "rows steps"]:
    """True where a recorded action lies inside its episode; all True when the batch says nothing."""
    pad = batch.get(ACTION_PAD)
    if pad is None:
        return torch.ones(rows, steps, dtype=torch.bool, device=device)
    return ~pad


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


def belief_token_mask(
    belief: Float[Tensor, "batch tokens dim"], mask: BeliefMask | None
) -> Bool[Tensor, "batch tokens"]:
    """Spread a belief mask over tokens; everything is readable when there is no mask."""
    if mask is None:
        return torch.ones(belief.shape[:2], dtype=torch.bool, device=belief.device)
    return mask if mask.ndim == 2 else mask.unsqueeze(1).expand(belief.shape[:2])


def check_layer(layer: int, layers: int) -> None:
    """Refuse a consequence layer that the tower does not have."""
    if not 1 <= layer <= layers:
        raise ValueError(
            f"The vision tower has {layers} layers, so target_layer must be between 1 and {layers}, not {layer}."
        )


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
