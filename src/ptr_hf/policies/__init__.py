"""What PTR reads from LeRobot policies: one adapter a policy family, all of one base class."""

from ptr_hf.policies.base import AdapterBase
from ptr_hf.policies.registry import EXPERIMENTAL, make_adapter, policies_with_action_masks, refusal, supported_policies
from ptr_hf.policies.trace import Batch, BeliefMask, PolicyTrace, RolloutTrace, Views

__all__ = [
    "EXPERIMENTAL",
    "AdapterBase",
    "Batch",
    "BeliefMask",
    "PolicyTrace",
    "RolloutTrace",
    "Views",
    "make_adapter",
    "policies_with_action_masks",
    "refusal",
    "supported_policies",
]
