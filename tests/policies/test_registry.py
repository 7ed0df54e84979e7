"""Which policies PTR takes, and what it says about the others."""

import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy
from policy_families import FAMILIES
from torch import nn

from ptr_hf.policies import make_adapter, supported_policies


def test_supported_policies_are_named() -> None:
    assert set(supported_policies()) >= {"act", "smolvla", "smolvla_state", "pi0", "pi05", "pi0_fast"}
    assert {make_adapter(family.policy()).family for family in FAMILIES} == set(supported_policies())


def test_an_unsupported_policy_is_told_what_is_supported() -> None:
    config = VQBeTConfig(
        input_features={
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        pretrained_backbone_weights=None,
        device="cpu",
    )
    with pytest.raises(ValueError, match=r"'vqbet' \(VQBeTPolicy\); supported: act, .*smolvla, smolvla_state"):
        make_adapter(VQBeTPolicy(config))
    with pytest.raises(ValueError, match=r"Linear is not a LeRobot policy.*act, smolvla, smolvla_state"):
        make_adapter(nn.Linear(2, 2))
