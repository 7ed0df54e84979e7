"""One policy per family and test, copied from one that is built once."""

import copy
from typing import Any

import pytest
from family import Family
from lerobot.policies.pretrained import PreTrainedPolicy
from policy_families import FAMILIES

_BUILT: dict[str, PreTrainedPolicy] = {}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def policy(family: Family) -> PreTrainedPolicy:
    """The family's policy in training mode."""
    if family.name not in _BUILT:
        _BUILT[family.name] = family.policy()
    return copy.deepcopy(_BUILT[family.name]).train()


@pytest.fixture
def batch(family: Family, policy: PreTrainedPolicy) -> dict[str, Any]:
    return family.batch(policy)
