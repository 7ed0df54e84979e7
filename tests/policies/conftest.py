"""One policy per family and test, copied from one that is built once."""

import copy
from typing import Any

import pytest
from family import Family
from lerobot.policies.pretrained import PreTrainedPolicy
from policy_families import FAMILIES

_BUILT: dict[str, PreTrainedPolicy] = {}

ON_EVERY_FAMILY = {
    "test_trace_without_belief_is_the_base_loss_and_gradient",
    "test_belief_changes_the_trace_and_gets_gradients_row_by_row",
    "test_masked_belief_is_no_belief",
    "test_views_equal_no_views_with_the_tower_run_once",
    "test_future_frames_cannot_reach_the_policy",
    "test_padded_steps_do_not_count",
}
"""Conformance checks that the default run makes on the first policy of every family; the others it makes on `NEAREST` alone."""
ON_EVERY_POLICY = "test_trace_without_belief_is_the_base_loss_and_gradient"
"""The one that it makes on a family's other policies too: frozen, with two cameras, with a history, without images."""
NEAREST = ("act", "smolvla")
"""Policies that the default run examines whole."""
FILES = ("test_conformance.py", "test_bad_samples.py", "test_families_under_ptr.py")
"""Tests of every family, of which the default run makes a part."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the dearer checks of the other families to `-m full`."""
    for item in items:
        if item.path.name not in FILES or not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        family = item.callspec.params.get("family")
        name = item.callspec.params["name"] if family is None else family.name
        here = {
            # 3 to 30 seconds each
            "test_compiled_regions": False,
            # ten times as long in ACT's convolutions, on a CPU that does not compute with it
            "test_bf16_autocast": name == "smolvla",
            "test_its_values_change_nothing": name == "smolvla",
            "test_it_counts_as_one_that_is_left_out_by_a_mask": name == "smolvla",
        }.get(item.originalname, name in NEAREST)
        # the others of a family are named after it and a hyphen
        here |= item.originalname in ON_EVERY_FAMILY and "-" not in name and not item.callspec.params.get("per_token")
        if not here and item.originalname != ON_EVERY_POLICY:
            item.add_marker(pytest.mark.full)


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
