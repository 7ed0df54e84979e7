"""Which LeRobot policies PTR takes, and why it does not take the others."""

from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn

from ptr_hf.policies.act import ACTAdapter
from ptr_hf.policies.base import AdapterBase, unwrap
from ptr_hf.policies.diffusion import DiffusionAdapter
from ptr_hf.policies.evo1 import Evo1Adapter
from ptr_hf.policies.groot import GrootAdapter
from ptr_hf.policies.multi_task_dit import MultiTaskDiTAdapter
from ptr_hf.policies.openpi import PI0Adapter, PI05Adapter
from ptr_hf.policies.pi0_fast import PI0FastAdapter
from ptr_hf.policies.smolvla import SmolVLAAdapter, SmolVLAStateAdapter
from ptr_hf.policies.vla_jepa import VLAJEPAAdapter
from ptr_hf.policies.xvla import XVLAAdapter

ADAPTERS: dict[str, type[AdapterBase]] = {
    adapter.family: adapter
    for adapter in (
        ACTAdapter,
        DiffusionAdapter,
        Evo1Adapter,
        GrootAdapter,
        MultiTaskDiTAdapter,
        PI0Adapter,
        PI05Adapter,
        PI0FastAdapter,
        SmolVLAAdapter,
        SmolVLAStateAdapter,
        VLAJEPAAdapter,
        XVLAAdapter,
    )
}
EXPERIMENTAL = ("groot", "vla_jepa")
"""Adapters that pass every test on tiny models but have never seen a released checkpoint."""

REASONS = {
    "eo1": "EO-1 keeps images, state and action slots in one prompt and at inference cuts its key-value cache at the action "
    "slots' position in that prompt, unlike in training, so belief tokens cannot enter both alike.",
    "fastwam": "FastWAM is a world model that trains video and action denoising together on each row's coming frames, which "
    "PTR keeps away from the policy, and it predicts through a cached path that differs from training.",
    "gaussian_actor": "The Gaussian actor predicts single actions, not chunks, and its forward returns sampled actions and "
    "log-probabilities for reinforcement learning, not an imitation loss.",
    "lingbot_va": "LingBot-VA is an autoregressive video-action world model: it trains on a row's coming frames, draws noise "
    "levels shared by the whole batch, averages its loss inside LeRobot, and at inference carries a cache from chunk to chunk.",
    "molmoact2": "MolmoAct2 trains its backbone and action expert layer by layer in a loop of its own but generates actions "
    "through other code, so belief tokens cannot be put into both alike.",
    "tdmpc": "TD-MPC learns a latent dynamics model, rewards and values from rewards and plans with them; it has no imitation "
    "loss of an action chunk that PTR could weight.",
    "vqbet": "VQ-BeT predicts discrete codes of actions plus sampled offsets, first trains the code book itself, and averages "
    "its losses over all rows and steps, so there is neither a loss per sample nor an embedding of the recorded chunk.",
    "wall_x": "WALL-X builds prompt, images and expert routing inside its forward, has separate code for training and "
    "sampling, and counts padded action steps in its loss.",
}
"""Why PTR cannot read LeRobot's other policies (lerobot 0.6.1)."""


def supported_policies() -> tuple[str, ...]:
    """Say which of LeRobot's policies can be post-trained.

    Returns:
        LeRobot's names of the policy types, in alphabetical order.

    Example:
        >>> "smolvla" in supported_policies()
        True
    """
    return tuple(sorted(ADAPTERS))


def policies_with_action_masks() -> tuple[str, ...]:
    """Say which policies leave out the action dimensions that `action_dim_is_pad` marks.

    Returns:
        LeRobot's names of the policy types, in alphabetical order.
    """
    return tuple(sorted(family for family, adapter in ADAPTERS.items() if adapter.masks_action_dims))


def refusal(policy_type: str) -> str:
    """Say that a policy type is not supported, why, and which ones are.

    Args:
        policy_type: LeRobot's name of it.

    Returns:
        The sentence.
    """
    reason = REASONS.get(policy_type)
    because = f" {reason}" if reason else ""
    return (
        f"PTR does not support the policy type {policy_type!r}.{because} Supported: {', '.join(supported_policies())}."
    )


def make_adapter(policy: nn.Module) -> AdapterBase:
    """Make the adapter through which the method reads a LeRobot policy.

    Args:
        policy: a LeRobot policy, or the `PeftModel` around one.

    Returns:
        The adapter of its family; it holds the policy and copies nothing.

    Raises:
        ValueError: the policy's type is not supported, or its configuration rules PTR out.

    Example:
        >>> make_adapter(SmolVLAPolicy.from_pretrained("lerobot/smolvla_base")).family
        'smolvla'
    """
    base = unwrap(policy)
    if not isinstance(base, PreTrainedPolicy):
        raise ValueError(
            f"{type(base).__name__} is not a LeRobot policy: pass a policy of one of the supported types "
            f"({', '.join(supported_policies())})."
        )
    if base.name not in ADAPTERS:
        raise ValueError(refusal(base.name))
    adapter: AdapterBase = ADAPTERS[base.name](policy)
    assert isinstance(adapter, AdapterBase)
    return adapter
