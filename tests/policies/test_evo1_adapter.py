"""What is particular to EVO1."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_evo1 import IMAGE_TOKENS, build_evo1
from family import ACTION_DIM, CHUNK, STATE, TOP, WRIST, Family
from lerobot.policies.evo1.modeling_evo1 import Evo1Policy

from ptr_hf.policies.evo1 import Evo1Adapter
from ptr_hf.policies.hooks import captured_input

Batch = dict[str, Any]


@pytest.fixture
def make() -> Callable[..., tuple[Evo1Policy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[Evo1Policy, Batch]:
        family = Family("evo1", build_evo1, cameras=cameras, settings=settings)
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def base_losses(policy: Evo1Policy, batch: Batch) -> torch.Tensor:
    torch.manual_seed(1)
    return policy.forward(copy.deepcopy(batch), reduction="none")[0]


def traced(policy: Evo1Policy, batch: Batch, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return Evo1Adapter(policy).trace(batch, **kwargs)


def uneven(batch: Batch) -> Batch:
    lengths = torch.tensor([CHUNK, 1, 3, 0])
    return {**batch, "action_is_pad": torch.arange(CHUNK).expand(4, CHUNK) >= lengths.unsqueeze(1)}


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_action_dim": ACTION_DIM + 3},
        {"max_views": 3, "empty_cameras": 1},
        {"return_cls_only": True},
        {"num_categories": 3},
        {"training_stage": "stage1"},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_loss_is_the_policys_own_per_sample_loss(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    policy, batch = make(**settings)
    batch = uneven(batch) | {"embodiment_id": torch.tensor([0, 0, 2, 1])}
    trace = traced(policy, batch)
    torch.testing.assert_close(trace.loss, base_losses(policy, batch), rtol=0, atol=0)
    views = Evo1Adapter(policy).encode_views(batch)
    torch.testing.assert_close(traced(policy, batch, views=views).loss, trace.loss, rtol=1e-5, atol=1e-6)


def test_loss_by_hand(make: Callable[..., Any]) -> None:
    """The squared velocity error over a row's valid steps and the robot's own action dimensions."""
    policy, batch = make(max_action_dim=ACTION_DIM + 3)
    batch = uneven(batch)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = policy.model.register_forward_hook(lambda _module, _args, output: seen.append(output))
    loss = traced(policy, batch).loss
    handle.remove()
    velocity, noise = seen[0]
    error = (velocity.view_as(noise) - (batch["action"] - noise)).square()[..., :ACTION_DIM].mean(-1)
    valid = ~batch["action_is_pad"]
    torch.testing.assert_close(loss, (error * valid).sum(1) / valid.sum(1).clamp_min(1), rtol=1e-5, atol=1e-6)
    assert loss[3] == 0


def test_context_is_what_the_head_attends_to(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST), max_views=3, empty_cameras=1)
    trace = traced(policy, batch)
    images, masks = policy._collect_image_batches(batch)
    fused, real = policy._compute_fused_tokens(batch["task"], images, masks)
    torch.testing.assert_close(trace.context[:, :-1], fused, rtol=0, atol=0)
    assert torch.equal(trace.context_mask[:, :-1], real)
    assert trace.context_mask[:, -1].all(), "the last context token is the state's"
    assert ((~trace.context_mask).sum(1) >= IMAGE_TOKENS).all(), "an absent view is no context"
    moved = traced(policy, {**batch, STATE: batch[STATE] + 1})
    assert torch.equal(moved.context[:, :-1], trace.context[:, :-1])
    assert not torch.allclose(moved.context[:, -1], trace.context[:, -1])


def test_action_tokens_and_states(make: Callable[..., Any]) -> None:
    policy, batch = make()
    head = policy.model.action_head
    with captured_input(head.seq_pool_proj) as pooled:
        trace = traced(policy, batch)
    assert torch.equal(trace.action_hidden.flatten(1), pooled.value)
    expected = head._project_actions(batch["action"], torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(trace.action_tokens, expected, rtol=0, atol=0)


def test_hidden_states_are_those_of_the_last_denoising_step(make: Callable[..., Any]) -> None:
    policy, batch = make()
    seen: list[torch.Tensor] = []
    handle = policy.model.action_head.norm_out.register_forward_hook(lambda _module, _args, output: seen.append(output))
    hidden = Evo1Adapter(policy).rollout(batch).action_hidden
    handle.remove()
    assert len(seen) == policy.config.num_inference_timesteps
    assert torch.equal(hidden, seen[-1])
    assert not torch.equal(hidden, seen[0])


def test_belief_reaches_a_frozen_backbone_and_trains_nothing_there(make: Callable[..., Any]) -> None:
    policy, batch = make(training_stage="stage1")
    adapter = Evo1Adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim, requires_grad=True)
    adapter.trace(batch, belief).context[:, :-1].square().sum().backward()
    assert belief.grad is not None
    assert (belief.grad.abs().sum(-1) > 0).all()
    assert all(parameter.grad is None for parameter in policy.model.embedder.parameters())
    assert policy.config.finetune_vlm is False
    with pytest.raises(RuntimeError), adapter.belief_scope(belief[:1]):
        policy.forward(copy.deepcopy(batch))
    assert policy.config.finetune_vlm is False


def test_a_pooled_context_has_no_place_for_a_belief(make: Callable[..., Any]) -> None:
    policy, batch = make(return_cls_only=True)
    assert traced(policy, batch).context.shape == (4, 2, 32)
    with pytest.raises(ValueError, match="return_cls_only=False"):
        traced(policy, batch, belief=torch.randn(4, 2, 32))


def test_cameras_that_the_robot_lacks(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST), max_views=3, empty_cameras=1, training_stage="stage1")
    adapter = Evo1Adapter(policy)
    assert adapter.target_keys() == (TOP, WRIST)
    with pytest.raises(ValueError, match="rename_map"):
        adapter.trace({key: value for key, value in batch.items() if key != WRIST})
    views = adapter.encode_views(batch, 1)
    assert tuple(views.tower) == (TOP, WRIST)
    expected, found = traced(policy, batch), traced(policy, batch, views=views)
    assert torch.equal(found.context_mask, expected.context_mask)
    mask = expected.context_mask.unsqueeze(-1)
    torch.testing.assert_close(found.context * mask, expected.context * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_a_policy_that_names_no_camera_is_refused(make: Callable[..., Any]) -> None:
    policy, _ = make()
    del policy.config.input_features[TOP]
    with pytest.raises(ValueError, match="input_features"):
        Evo1Adapter(policy)


def test_images_are_prepared_as_the_policy_prepares_them(make: Callable[..., Any]) -> None:
    policy, batch = make(training_stage="stage1")
    adapter = Evo1Adapter(policy)
    wide = torch.rand(4, 3, 24, 48)
    views = adapter.encode_views({**batch, TOP: wide}, 2)
    torch.testing.assert_close(
        adapter.encode_image(adapter.build_tower(2), TOP, wide), views.tower[TOP], rtol=0, atol=0
    )


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_bf16_backbone_with_float32_head(make: Callable[..., Any], stage: str) -> None:
    """The default of released checkpoints."""
    policy, batch = make(vlm_dtype="bfloat16", training_stage=stage)
    torch.testing.assert_close(traced(policy, batch).loss, base_losses(policy, batch), rtol=0, atol=0)
    adapter = Evo1Adapter(policy)
    belief = torch.randn(4, 2, 32, requires_grad=True)
    trace = adapter.trace(batch, belief, views=adapter.encode_views(batch))
    assert trace.context.dtype == torch.float32
    trace.loss.mean().backward()
    assert belief.grad is not None
    assert belief.grad.abs().sum() > 0
    assert adapter.encode_image(adapter.build_tower(2), TOP, batch[TOP]).dtype == torch.float32
    adapter.rollout(batch, belief.detach())


def test_gradient_checkpointing(make: Callable[..., Any]) -> None:
    found = []
    for enabled in (False, True):
        policy, batch = make(enable_gradient_checkpointing=enabled)
        assert policy.model.embedder.model.language_model.is_gradient_checkpointing is enabled
        belief = torch.ones(4, 2, 32, requires_grad=True)
        adapter = Evo1Adapter(policy)
        trace = traced(policy, batch, belief=belief, views=adapter.encode_views(batch))
        (trace.loss.mean() + trace.context.square().mean()).backward()
        vlm = policy.model.embedder.model
        weights = (vlm.language_model.layers[0].mlp.up_proj, vlm.vision_tower.encoder.layer[0].mlp.fc1)
        found.append([trace.loss, belief.grad, *(weight.weight.grad for weight in weights)])
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-4, atol=1e-6)


def test_lerobots_own_peft_entry_point(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.config.pretrained_path = "a/checkpoint"
    expected = traced(policy, batch).loss
    wrapped = policy.wrap_with_peft(
        peft_cli_overrides={"method_type": "lora", "r": 2, "target_modules": r".*(language_model.*[qv]_proj|ff\.0)"}
    )
    trace = traced(wrapped, batch)
    torch.testing.assert_close(trace.loss, expected, rtol=1e-5, atol=1e-6)
    trace.loss.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters())
