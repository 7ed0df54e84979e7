"""Precision rules shared by the method: half precision is raised to float32, float64 is left alone."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def upcast(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half precision becomes float32; float32 and float64 pass unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which autocast is off: a cosine in bfloat16 divided by a temperature of 0.03 is off by 0.1."""
    return torch.autocast(device.type, enabled=False)


class NeverLowered(nn.Module):
    """A module that follows every device move and is never cast below the precision it was built with.

    An EMA with decay 0.999 does not move in bfloat16, and a controller step of 0.5 % is lost in it, so
    ``.to(torch.bfloat16)`` or ``.half()`` on a parent leaves these tensors (and those of submodules) as they are.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NeverLowered":
        def keep(tensor: Tensor) -> Tensor:
            if tensor.is_meta or not tensor.is_floating_point():
                return fn(tensor)
            # an empty float32 probe says where fn moves tensors, also to devices without float64
            probe = fn(tensor.new_empty(0, dtype=torch.float32))
            lacks_float64 = probe.device.type == "mps"
            return tensor.to(
                probe.device, torch.float32 if lacks_float64 else torch.promote_types(tensor.dtype, probe.dtype)
            )

        return super()._apply(keep, recurse)
