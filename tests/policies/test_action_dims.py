"""Action dimensions that a row's robot lacks: no part in the loss, the model's input or the prediction."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family import ACTION_DIM, CHUNK, Family
from lerobot.policies.pretrained import PreTrainedPolicy
from policy_families import FAMILIES
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.constants import ACTION_DIM_PAD
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.pathway.summaries import motion_of
from ptr_hf.policies import make_adapter, policies_with_action_masks
from ptr_hf.policies.batches import per_sample_mean, without_unused
from ptr_hf.policies.hooks import captured_input

Batch = dict[str, Any]
ROWS, USED = 4, 9
DRAWS = (torch.randn, torch.rand, torch.normal, torch.randn_like, torch.rand_like)

# the configurations that differ in how actions enter the loss or the model
MASKED = (
    "smolvla",
    "smolvla_state",
    "pi0-two-cameras-checkpointed",
    "pi05",
    "act-vae",
    "diffusion-state",
    "multi_task_dit-flow",
    "evo1",
)
NOT_MASKED = ("xvla", "pi0_fast", "groot", "vla_jepa")
FEW = ("smolvla", "pi05", "act-vae", "multi_task_dit-flow")
"""Those of `MASKED` that the default run examines."""
BY_NAME = {family.name: family for family in FAMILIES}

masked = pytest.mark.parametrize(
    "family",
    [pytest.param(BY_NAME[name], id=name, marks=() if name in FEW else pytest.mark.full) for name in MASKED],
)


class DrawsElsewhere(TorchFunctionMode):
    """Shifts whatever noise is drawn for the unused dimensions of a chunk."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func in DRAWS and drawn.ndim == 3 and drawn.shape[1] == CHUNK:
            drawn[..., USED:ACTION_DIM] += 3.0
        elif func in DRAWS and drawn.ndim == 2 and drawn.shape[1] % CHUNK == 0 and drawn.shape[1] > CHUNK:
            drawn.view(len(drawn), CHUNK, -1)[..., USED:ACTION_DIM] += 3.0
        return drawn


def unused(*rows: int) -> Tensor:
    """The last dimensions are unused in every row, or all are in the given ones."""
    mask = torch.zeros(ROWS, ACTION_DIM, dtype=torch.bool)
    mask[:, USED:] = True
    mask[list(rows)] = True
    return mask


def traced(policy: PreTrainedPolicy, batch: Batch, seed: int = 7) -> tuple[Any, dict[str, Tensor]]:
    """A trace, and the gradients of its summed loss."""
    policy.zero_grad()
    torch.manual_seed(seed)
    trace = make_adapter(policy).trace(batch)
    trace.loss.sum().backward()
    return trace, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Any, dict[str, Tensor]], expected: tuple[Any, dict[str, Tensor]]) -> None:
    for name, value in vars(expected[0]).items():
        assert torch.equal(vars(found[0])[name], value), name
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def rolled(policy: PreTrainedPolicy, batch: Batch, seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return make_adapter(policy).rollout(batch)


def with_mask(batch: Batch, mask: Tensor) -> Batch:
    return {**batch, ACTION_DIM_PAD: mask}


def test_the_mean_is_over_valid_steps_and_used_dimensions() -> None:
    losses = torch.arange(24.0).reshape(2, 3, 4)
    steps = torch.tensor([[True, True, False], [True, True, True]])
    mask = torch.tensor([[False, True, False, True], [True, True, True, True]])
    # (0 + 2 + 4 + 6) / 4, and no entry
    assert per_sample_mean(losses, steps, mask).tolist() == [3.0, 0.0]
    assert torch.equal(per_sample_mean(losses, steps, torch.zeros_like(mask)), per_sample_mean(losses, steps))


def test_unused_entries_are_zeros_and_what_is_padded_beyond_stays() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    chunk = torch.ones(2, 1, 3)
    chunk[0, 0, 1] = torch.nan
    assert without_unused(chunk, mask).tolist() == [[[1, 0, 1]], [[0, 0, 1]]]
    assert without_unused(torch.ones(2, 2), mask).tolist() == [[1, 0], [0, 0]]
    assert without_unused(chunk, None) is chunk
    with pytest.raises(ValueError, match="'action_dim_is_pad' marks 2 action dimensions where the policy has 1"):
        without_unused(torch.ones(2, 1, 1), mask)


def test_motion_counts_used_dimensions() -> None:
    chunks = {"action": torch.tensor([[[1.0, 3.0], [2.0, 9.0]]]), "action_is_pad": torch.tensor([[False, False]])}
    assert motion_of(chunks).item() == pytest.approx((1 + 9 + 4 + 81) / 4)
    assert motion_of({**chunks, ACTION_DIM_PAD: torch.tensor([[False, True]])}).item() == pytest.approx((1 + 4) / 2)
    assert motion_of({**chunks, ACTION_DIM_PAD: torch.tensor([[True, True]])}).item() == 0


@masked
def test_a_mask_without_padding_changes_no_bit(policy: PreTrainedPolicy, batch: Batch, family: Family) -> None:
    nothing = torch.zeros(ROWS, ACTION_DIM, dtype=torch.bool)
    assert_same(traced(policy, with_mask(batch, nothing)), traced(policy, batch))
    found, expected = rolled(policy, with_mask(batch, nothing)), rolled(policy, batch)
    for name, value in vars(expected).items():
        assert torch.equal(vars(found)[name], value), name


@masked
@pytest.mark.capability("action_dim_is_pad")
def test_what_was_recorded_or_drawn_in_unused_dimensions_changes_nothing(
    policy: PreTrainedPolicy, batch: Batch, family: Family
) -> None:
    batch = with_mask(batch, unused())
    expected = traced(policy, batch)
    other = copy.deepcopy(batch)
    other["action"][..., USED:ACTION_DIM] = torch.nan
    with DrawsElsewhere():
        assert_same(traced(policy, other), expected)
    assert torch.isfinite(expected[0].loss).all()


@masked
def test_samples_do_not_depend_on_noise_in_unused_dimensions(
    policy: PreTrainedPolicy, batch: Batch, family: Family
) -> None:
    batch = with_mask(batch, unused())
    policy.eval()
    expected = rolled(policy, batch)
    with DrawsElsewhere():
        found = rolled(policy, batch)
    for name, value in vars(expected).items():
        assert torch.equal(vars(found)[name], value), name
    assert not expected.actions[..., USED:ACTION_DIM].any()
    assert expected.actions[..., :USED].any()
    del batch[ACTION_DIM_PAD]
    whole = rolled(policy, batch)
    with DrawsElsewhere():
        shifted = rolled(policy, batch)
    assert torch.equal(shifted.actions[..., :USED], whole.actions[..., :USED]) == family.regression


@pytest.mark.full
@masked
def test_a_row_without_dimensions_has_no_loss_and_leaves_the_others_theirs(
    policy: PreTrainedPolicy, batch: Batch, family: Family
) -> None:
    found, gradients = traced(policy, with_mask(batch, unused(1)))
    expected, _ = traced(policy, with_mask(batch, unused()))
    assert found.loss[1].item() == 0
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found.loss[kept], expected.loss[kept])
    assert (found.loss[kept] > 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    none, gradients = traced(policy, with_mask(batch, torch.ones(ROWS, ACTION_DIM, dtype=torch.bool)))
    assert not none.loss.any()
    assert all(not gradient.any() for gradient in gradients.values())


def test_act_averages_the_absolute_error_of_used_dimensions() -> None:
    family = BY_NAME["act"]
    policy = family.policy().train()
    batch = with_mask(family.batch(policy), unused())
    with captured_input(policy.model.action_head) as hidden:
        torch.manual_seed(7)
        trace = make_adapter(policy).trace(batch)
    error = (policy.model.action_head(hidden.value) - batch["action"]).abs()[..., :USED]
    valid = ~batch["action_is_pad"]
    expected = torch.stack([row[steps].mean() for row, steps in zip(error, valid, strict=True)])
    torch.testing.assert_close(trace.loss, expected)
    # the transposed head's columns of used dimensions
    tokens = batch["action"][..., :USED] @ policy.model.action_head.weight[:USED]
    torch.testing.assert_close(trace.action_tokens, tokens, rtol=1e-4, atol=1e-5)


def test_a_flow_policy_averages_the_squared_error_of_used_dimensions() -> None:
    family = BY_NAME["smolvla_state"]
    policy = family.policy().eval()
    batch = with_mask(family.batch(policy), unused())
    model, width = policy.model, policy.config.max_action_dim
    torch.manual_seed(7)
    loss = make_adapter(policy).trace(batch).loss
    # the same draws, cleared by hand
    torch.manual_seed(7)
    noise = model.sample_noise((ROWS, CHUNK, width), "cpu")
    time = model.sample_time(ROWS, "cpu")
    clean = {**batch, "action": batch["action"].clone()}
    clean["action"][..., USED:], noise[..., USED:ACTION_DIM] = 0, 0
    errors = model.forward(
        [],
        [],
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        policy.prepare_state(batch),
        policy.prepare_action(clean),
        noise,
        time,
    )[..., :USED]
    valid = ~batch["action_is_pad"]
    torch.testing.assert_close(loss, torch.stack([row[steps].mean() for row, steps in zip(errors, valid, strict=True)]))


@pytest.mark.parametrize("family", [BY_NAME[name] for name in NOT_MASKED], ids=lambda family: family.name)
@pytest.mark.capability("action_dim_is_pad")
def test_families_that_cannot_refuse(
    policy: PreTrainedPolicy, batch: Batch, family: Family, record_property: Callable[[str, object], None]
) -> None:
    record_property("works", False)
    batch = with_mask(batch, unused())
    adapter = make_adapter(policy)
    sentence = (
        rf"has 'action_dim_is_pad', but the {family.name} policy cannot .* use one that can "
        r"\(ptr_hf.policies.policies_with_action_masks\(\) names them\), or"
    )
    for call in (adapter.trace, adapter.rollout):
        with pytest.raises(ValueError, match=sentence):
            call(batch)
    with pytest.raises(ValueError, match=sentence), adapter.action_scope(batch):
        pass
    assert family.name not in policies_with_action_masks()


def test_a_mask_of_another_width_is_refused() -> None:
    family = BY_NAME["act-state"]
    policy = family.policy()
    batch = family.batch(policy)
    with pytest.raises(ValueError, match=r"has the shape \(4, 3\) where the actions have 4 rows of 14 dimensions"):
        make_adapter(policy).trace(with_mask(batch, torch.zeros(ROWS, 3, dtype=torch.bool)))


@pytest.mark.parametrize("tokens", [0, 2])
def test_the_policy_under_ptr_predicts_in_used_dimensions(tokens: int) -> None:
    family = BY_NAME["smolvla_state"]
    base = family.policy()
    batch = with_mask(family.batch(base), unused())
    policy = PTRPolicy(PTRConfig(preset="ptr", num_belief_tokens=tokens), base_policy=base)

    def predicted(call: Any) -> Tensor:
        policy.reset()
        torch.manual_seed(7)
        return call(dict(batch))

    for call in (policy.predict_action_chunk, policy.select_action):
        expected = predicted(call)
        with DrawsElsewhere():
            assert torch.equal(predicted(call), expected)
        assert not expected[..., USED:].any()
        assert expected[..., :USED].any()
