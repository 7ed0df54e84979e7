"""Every family: a sample with NaN gets no say, in the method's loss and in the policy's own."""

import copy
from typing import Any

import pytest
import torch
from family import Family
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from small_policies import gradients, tensors_equal
from test_families_under_ptr import ptr_policy, raw_segments
from test_training_runs import FIRST_OF_EACH

from ptr_hf import PTRPolicy
from ptr_hf.data.screening import FINE, Screen, leave_out
from ptr_hf.processor_ptr import preprocess

ANCHORS, BAD = (0, 30, 41, 60), 1


def prepared(policy: PTRPolicy, raw: dict[str, Any], stats: Any, substitute: bool = False) -> dict[str, Any]:
    """As `PTRTrainer` prepares a batch."""
    layout = policy.config.layout
    screen = Screen(layout, policy.config.input_features or {}, substitute=substitute)
    preprocessor, _ = make_pre_post_processors(policy.config.base_config, dataset_stats=stats)
    batch, frames = screen.before(raw)
    rows, after = screen.after(preprocess(batch, preprocessor, layout), frames)
    assert torch.equal(after, frames)
    return rows


def learned(policy: PTRPolicy, rows: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, under the same draws whenever it is called."""
    policy = copy.deepcopy(policy).train()
    torch.manual_seed(3)
    loss = policy.base(rows)[0] if policy.objective is None else policy(rows)[0]
    loss.backward()
    return loss.detach(), gradients(policy)


def variants(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same batch with other numbers in the bad sample, both with NaN in its action."""
    first = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in raw.items()}
    first["action"][BAD, 2, 0] = torch.nan
    second = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in first.items()}
    for key in ("observation.state", "observation.image"):
        if key in second:
            second[key][BAD] = second[key][BAD] * 0.5 + 0.1
    return first, second


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        # a family that looks at `action_is_pad` and one that does not
        pytest.param(
            family,
            preset,
            id=f"{family.name}-{preset}",
            marks=pytest.mark.full if preset == "sft" and family.name not in ("smolvla", "diffusion") else (),
        )
        for family in FIRST_OF_EACH
        for preset in ("ptr", "sft")
    ],
)
def test_its_values_change_nothing(family: Family, preset: str) -> None:
    """In plain post-training a good sample takes its place: LeRobot's own losses do not all leave padding out."""
    own = {"scorer": False, "num_belief_tokens": 0} if preset == "sft" else {"num_belief_tokens": 2}
    policy, root = ptr_policy(family, preset=preset, **own)
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    raw = raw_segments(policy, root, policy.config.layout, ANCHORS)
    batches = [prepared(policy, variant, stats, substitute=preset == "sft") for variant in variants(raw)]
    (loss, gradient), (other_loss, other_gradient) = (learned(policy, batch) for batch in batches)
    assert loss.isfinite()
    assert loss > 0
    assert all(value.isfinite().all() for value in gradient.values())
    assert torch.equal(loss, other_loss)
    assert tensors_equal(gradient, other_gradient)
    clean, _ = learned(policy, prepared(policy, raw, stats, substitute=preset == "sft"))
    assert not torch.equal(loss, clean), "without the NaN it has a say"


@pytest.mark.parametrize("family", FIRST_OF_EACH, ids=lambda family: family.name)
def test_it_counts_as_one_that_is_left_out_by_a_mask(family: Family) -> None:
    policy, root = ptr_policy(family, num_belief_tokens=2)
    stats = LeRobotDatasetMetadata("tests/points", root=root).stats
    raw = raw_segments(policy, root, policy.config.layout, ANCHORS)
    mask = torch.arange(len(ANCHORS)) == BAD
    screened = learned(policy, prepared(policy, variants(raw)[0], stats))
    masked = learned(policy, prepared(policy, leave_out(raw, mask), stats))
    assert torch.equal(screened[0], masked[0])
    assert tensors_equal(screened[1], masked[1])
    assert FINE not in Screen(policy.config.layout, {}).before(variants(raw)[0])[1][mask]
