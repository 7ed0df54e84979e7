"""What PTR reads from LeRobot policies: one adapter per policy family behind one protocol."""

from ptr_hf.policies.protocol import Batch, BeliefMask, PolicyAdapter, PolicyTrace, RolloutTrace, Views
from ptr_hf.policies.registry import EXPERIMENTAL, make_adapter, policies_with_action_masks, refusal, supported_policies

__all__ = [
    "EXPERIMENTAL",
    "Batch",
    "BeliefMask",
    "PolicyAdapter",
    "PolicyTrace",
    "RolloutTrace",
    "Views",
    "make_adapter",
    "policies_with_action_masks",
    "refusal",
    "supported_policies",
]
