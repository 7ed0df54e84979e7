"""What PTR reads from LeRobot policies: one adapter per policy family behind one protocol."""

from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn

from ptr_hf.policies.act import ACTAdapter
from ptr_hf.policies.flow_vla import FlowVLAAdapter
from ptr_hf.policies.hooks import unwrap
from ptr_hf.policies.openpi import PI0Adapter, PI05Adapter
from ptr_hf.policies.pi0_fast import PI0FastAdapter
from ptr_hf.policies.protocol import Batch, BeliefMask, PolicyAdapter, PolicyTrace, RolloutTrace, Views
from ptr_hf.policies.smolvla import SmolVLAAdapter, SmolVLAStateAdapter

__all__ = [
    "ACTAdapter",
    "Batch",
    "BeliefMask",
    "PolicyAdapter",
    "PolicyTrace",
    "RolloutTrace",
    "SmolVLAAdapter",
    "SmolVLAStateAdapter",
    "Views",
    "make_adapter",
    "supported_policies",
]

_ADAPTERS: dict[str, type[ACTAdapter] | type[FlowVLAAdapter]] = {
    adapter.family: adapter
    for adapter in (ACTAdapter, SmolVLAAdapter, SmolVLAStateAdapter, PI0Adapter, PI05Adapter, PI0FastAdapter)
}


def supported_policies() -> tuple[str, ...]:
    """LeRobot names of the policy types that PTR can post-train."""
    return tuple(sorted(_ADAPTERS))


def make_adapter(policy: nn.Module) -> PolicyAdapter:
    """The adapter of a LeRobot policy, or of the `PeftModel` around one.

    Raises:
        ValueError: the policy's type is not supported, or its configuration rules PTR out.
    """
    base = unwrap(policy)
    supported = ", ".join(supported_policies())
    if not isinstance(base, PreTrainedPolicy):
        raise ValueError(
            f"{type(base).__name__} is not a LeRobot policy: pass a policy of one of the supported types ({supported})."
        )
    if base.name not in _ADAPTERS:
        raise ValueError(
            f"PTR does not support the policy type {base.name!r} ({type(base).__name__}); supported: {supported}."
        )
    return _ADAPTERS[base.name](policy)
