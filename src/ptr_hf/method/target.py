"""Consequence targets (Section 4.2): what the world looked like Δ steps after the chunk began, as a unit vector.

    y⁺ = sg( norm( g(o_{t+Δ}) ) ),     g ← μ g + (1 - μ) v   after every optimiser step

g is an exponential moving average of the policy's own vision tower v, cut at an intermediate layer. Its tokens are
averaged, then the cameras, then the vector is L2-normalised. Where the tower is frozen g equals v, and v is used.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ptr_hf.method.numerics import NeverLowered, upcast


@torch.no_grad()
def consequence_embedding(
    features: Sequence[Float[Tensor, "batch _ dim"]],
    camera_mask: Bool[Tensor, "batch cameras"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "batch dim"]:
    """Mean over tokens, mean over the cameras present, L2 norm (Section 4.2); constant, at least float32.

    Args:
        features: one (batch, tokens, dim) tensor per camera; cameras may differ in their number of tokens.
        camera_mask: True where the sample has that camera; a sample without any gets a zero vector.
        eps: smallest norm divided by.

    Raises:
        ValueError: if there is no camera, or the mask has another number of them.
    """
    if not features:
        raise ValueError("A consequence needs the features of at least one camera; none were given.")
    if camera_mask is not None and camera_mask.shape[1] != len(features):
        raise ValueError(f"camera_mask has {camera_mask.shape[1]} columns for {len(features)} cameras; give one each.")
    pooled = torch.stack([upcast(camera).mean(dim=1) for camera in features], dim=1)
    if camera_mask is None:
        mean = pooled.mean(dim=1)
    else:
        # an absent camera's features may be anything, NaN included
        total = pooled.masked_fill(~camera_mask[..., None], 0.0).sum(dim=1)
        mean = total / camera_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return functional.normalize(mean, dim=-1, eps=eps)


class ConsequenceEncoder(NeverLowered):
    """The EMA encoder g, in float32 whatever the training precision.

    Args:
        tower: a copy of the policy's tower that this module takes over (made float32, frozen, always in eval mode),
            or None where the policy's own tower is frozen and shared.
        decay: μ, in [0, 1]; 1 keeps the first copy, the paper's ablation of a frozen encoder.
        eps: smallest norm an embedding is divided by.

    Raises:
        ValueError: if decay is outside [0, 1].
    """

    def __init__(self, tower: nn.Module | None, decay: float = 0.999, eps: float = 1e-6) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"The target encoder's decay is {decay}; choose it in [0, 1], e.g. 0.999.")
        self.tower = None if tower is None else tower.float().requires_grad_(False).eval()
        self.decay = decay
        self.eps = eps

    @property
    def shared(self) -> bool:
        """True where targets come from the policy's own frozen tower."""
        return self.tower is None

    def train(self, mode: bool = True) -> "ConsequenceEncoder":
        """The tower stays in eval mode: a target must not depend on dropout or on batch statistics."""
        super().train(mode)
        if self.tower is not None:
            self.tower.eval()
        return self

    @torch.no_grad()
    def update(self, source: Iterable[tuple[str, Tensor]]) -> None:
        """g ← μ g + (1 - μ) v by name, once per optimiser step; nothing to do for a shared tower.

        Args:
            source: the policy tower's parameters and floating-point buffers under the names of the copy's
                ``state_dict``; integer buffers may be among them and are copied.

        Raises:
            ValueError: if names or shapes differ from the copy's.
        """
        if self.tower is None:
            return
        own = self.tower.state_dict()
        given = {name: value.detach() for name, value in source}
        missing = sorted(name for name, value in own.items() if value.is_floating_point() and name not in given)
        unknown = sorted(given.keys() - own.keys())
        if missing or unknown:
            raise ValueError(
                f"The policy's tower does not match its EMA copy: missing {missing}, unknown {unknown}. "
                "Pass the tower the copy was built from, cut at the same layer."
            )
        for name, value in given.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"'{name}' has shape {tuple(value.shape)} in the policy's tower and {tuple(own[name].shape)} in "
                    "its EMA copy; rebuild the target encoder for this policy."
                )
            if not own[name].is_floating_point():
                own[name].copy_(value)
        names = [name for name, value in own.items() if value.is_floating_point()]
        averages = [own[name] for name in names]
        values = [given[name].to(own[name]) for name in names]
        if averages:
            # lerp leaves an average that has arrived exactly where it is
            torch._foreach_lerp_(_own_shards(averages), _own_shards(values), 1.0 - self.decay)

    def embed(
        self, features: Sequence[Float[Tensor, "batch _ dim"]], camera_mask: Bool[Tensor, "batch cameras"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """``consequence_embedding`` with this encoder's eps."""
        return consequence_embedding(features, camera_mask, self.eps)


def _own_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's share of tensors that FSDP has sharded, which it shards alike for equal shapes; others as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
