"""What is particular to GR00T."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_groot import HORIZON, GrootFamily, build_groot
from family import ACTION_DIM, CHUNK, TOP, WRIST, Family
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor

from ptr_hf.policies.groot import PIXELS, GrootAdapter
from ptr_hf.policies.hooks import captured_output

Batch = dict[str, Any]


@pytest.fixture
def make() -> Callable[..., tuple[GrootPolicy, Batch]]:
    def build(robot: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[GrootPolicy, Batch]:
        family = GrootFamily("groot", build_groot, robot=robot, settings=settings)
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def traced_loss(policy: GrootPolicy, batch: Batch) -> Tensor:
    torch.manual_seed(1)
    return GrootAdapter(policy).trace(batch).loss


def test_loss_is_the_mean_over_recorded_steps_and_robot_dimensions(make: Callable[..., Any]) -> None:
    policy, _ = make()
    family = Family("robot", build_groot)
    preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=family.stats)
    pad = torch.zeros(4, CHUNK, dtype=torch.bool)
    pad[0], pad[1, 1:], pad[2, 4:] = True, True, True
    raw = {TOP: torch.rand(4, 3, 32, 32), "observation.state": torch.randn(4, 14), "task": ["a", "bc", "d", "e"]}
    batch = preprocessor({**raw, "action": torch.randn(4, CHUNK, ACTION_DIM), "action_is_pad": pad})
    torch.manual_seed(1)
    inputs = policy._filter_groot_inputs(copy.deepcopy(batch), include_action=True)
    errors = policy._groot_model.forward(inputs)["action_loss"]
    assert errors.shape == (4, HORIZON, 16)
    expected = errors.sum(dim=(1, 2)) / ((~pad).sum(1) * ACTION_DIM).clamp_min(1)
    losses = traced_loss(policy, GrootAdapter(policy).arrange(batch))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert losses[0] == 0


def test_where_context_and_actions_come_from(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.eval()
    head = policy._groot_model.action_head
    with captured_output(head.vl_self_attention) as states:
        trace = GrootAdapter(policy).trace(batch)
    assert torch.equal(trace.context, states.value)
    assert torch.equal(trace.context_mask, batch["attention_mask"].bool())
    clean = head.action_encoder(batch["action"], torch.full((4,), 999), batch["embodiment_id"])
    # padded steps are zeros after LeRobot's preprocessor
    torch.testing.assert_close(trace.action_tokens, clean[:, :CHUNK], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("robot", [(TOP,), (TOP, WRIST)], ids=["one", "two"])
def test_an_arranged_batch_can_be_cut_by_row(make: Callable[..., Any], robot: tuple[str, ...]) -> None:
    policy, _ = make(robot)
    policy.eval()
    adapter = GrootAdapter(policy)
    packed = Family("robot", build_groot, cameras=robot).batch(policy)
    batch = adapter.arrange(packed)
    assert not {"pixel_values", "image_grid_thw"} & batch.keys()
    assert batch[PIXELS].shape[:4] == (4, len(robot), 4, 4)
    assert torch.equal(batch[PIXELS].flatten(0, 3), packed["pixel_values"])
    picked = {key: value[1:3] for key, value in batch.items() if isinstance(value, Tensor)}
    whole, part = adapter.trace(batch), adapter.trace(picked)
    torch.testing.assert_close(part.context, whole.context[1:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.action_tokens, whole.action_tokens[1:3], rtol=1e-5, atol=1e-6)
    assert adapter.rollout(picked).actions.shape == (2, CHUNK, ACTION_DIM)
    tokens = adapter.encode_image(adapter.build_tower(1), PIXELS, picked[PIXELS])
    assert tokens.shape == (2, 16 * len(robot), adapter.target_dim(1))


def test_cameras_of_two_sizes_are_refused(make: Callable[..., Any]) -> None:
    policy, batch = make((TOP, WRIST))
    batch["image_grid_thw"] = batch["image_grid_thw"].clone()
    batch["image_grid_thw"][1, 1:] = torch.tensor([2, 8])
    with pytest.raises(ValueError, match=r"\[\[1, 2, 8\], \[1, 4, 4\]\].*one resolution"):
        GrootAdapter(policy).arrange(batch)
    with pytest.raises(ValueError, match=r"'pixel_values'.*preprocessor"):
        GrootAdapter(policy).arrange({key: value for key, value in batch.items() if key != "pixel_values"})


def test_the_belief_reads_the_whole_chunk_of_a_policy_that_executes_less(make: Callable[..., Any]) -> None:
    policy, batch = make(n_action_steps=CHUNK - 2)
    rollout = GrootAdapter(policy).rollout(batch)
    assert rollout.actions.shape == (4, CHUNK - 2, ACTION_DIM)
    assert rollout.action_tokens.shape[1] == rollout.action_hidden.shape[1] == rollout.action_mask.shape[1] == CHUNK


@pytest.mark.full
def test_under_the_policys_own_autocast(make: Callable[..., Any]) -> None:
    policy, batch = make(use_bf16=True, tune_llm=True)
    torch.manual_seed(1)
    expected = policy.forward(copy.deepcopy(batch))[0]
    losses = traced_loss(policy, batch)
    torch.testing.assert_close(losses.mean(), expected.float(), rtol=1e-5, atol=1e-5)
    adapter = GrootAdapter(policy)
    assert adapter.tower_is_frozen()
    views = adapter.encode_views(batch, 2)
    assert torch.equal(views.tower[PIXELS], adapter.encode_image(adapter.build_tower(2), PIXELS, batch[PIXELS]))
    torch.manual_seed(1)
    torch.testing.assert_close(adapter.trace(batch, views=views).loss, losses, rtol=1e-3, atol=1e-3)
