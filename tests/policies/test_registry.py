"""Which policies PTR takes, and what it says about the others."""

import re

import pytest
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy
from policy_families import FAMILIES
from torch import nn

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.policies import EXPERIMENTAL, make_adapter, refusal, supported_policies
from ptr_hf.policies.registry import REASONS

SUPPORTED = (
    "act",
    "diffusion",
    "evo1",
    "groot",
    "multi_task_dit",
    "pi0",
    "pi05",
    "pi0_fast",
    "smolvla",
    "smolvla_state",
    "vla_jepa",
    "xvla",
)


def test_supported_policies_are_named_and_tested() -> None:
    assert supported_policies() == SUPPORTED
    tested = {family.name.partition("-")[0] for family in FAMILIES}
    assert tested == set(SUPPORTED)
    assert set(EXPERIMENTAL) < set(SUPPORTED)


def test_every_policy_of_lerobot_is_either_supported_or_refused_with_a_reason() -> None:
    policies = set(PreTrainedConfig.get_known_choices()) - {"ptr"}
    assert policies - set(SUPPORTED) == REASONS.keys()


def test_an_unsupported_policy_is_told_why_and_what_is_supported() -> None:
    config = VQBeTConfig(
        input_features={
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        pretrained_backbone_weights=None,
        device="cpu",
    )
    told = re.escape(refusal("vqbet"))
    assert "discrete codes" in refusal("vqbet")
    assert refusal("vqbet").endswith(f"Supported: {', '.join(SUPPORTED)}.")
    with pytest.raises(ValueError, match=told):
        make_adapter(VQBeTPolicy(config))
    with pytest.raises(ValueError, match=told):
        PTRPolicy(PTRConfig(base={"type": "vqbet"}, device="cpu"))
    with pytest.raises(ValueError, match=r"Linear is not a LeRobot policy.*act, diffusion"):
        make_adapter(nn.Linear(2, 2))
