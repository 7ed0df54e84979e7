"""What is particular to X-VLA."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_xvla import FLORENCE, build_xvla
from family import ACTION_DIM, CHUNK, STATE, TOP, WRIST, Family
from lerobot.policies.xvla.action_hub import BaseActionSpace
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from torch import nn

from ptr_hf.policies.hooks import captured_output
from ptr_hf.policies.xvla import XVLAAdapter

Batch = dict[str, Any]
ACTION_SPACES = {
    "auto": {},
    "joint": {},
    "ee6d": {"max_state_dim": 20},
    "agibot_ee6d": {},
    "franka_joint7": {},
    "so101_bimanual": {"max_state_dim": 20},
}


@pytest.fixture
def make() -> Callable[..., tuple[XVLAPolicy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[XVLAPolicy, Batch]:
        family = Family("xvla", build_xvla, cameras=cameras, settings=settings)
        policy = family.policy().eval()
        return policy, family.batch(policy)

    return build


def predicted(policy: XVLAPolicy, batch: Batch) -> torch.Tensor:
    """What the transformer of the traced forward predicts."""
    torch.manual_seed(1)
    with captured_output(policy.model.transformer) as output:
        policy.forward(copy.deepcopy(batch))
    return output.value


def traced(policy: XVLAPolicy, batch: Batch, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return XVLAAdapter(policy).trace(batch, **kwargs)


@pytest.mark.full
@pytest.mark.parametrize("mode", ACTION_SPACES)
def test_loss_is_each_rows_own_over_its_valid_steps(make: Callable[..., Any], mode: str) -> None:
    """Cut to a row's valid steps, the action space's own loss is that row's loss."""
    policy, batch = make(action_mode=mode, **ACTION_SPACES[mode])
    batch["action"] = batch["action"].sigmoid()  # some spaces want grippers between 0 and 1
    lengths = [CHUNK, 1, 3, 0]
    batch["action_is_pad"] = torch.arange(CHUNK).expand(4, CHUNK) >= torch.tensor(lengths).unsqueeze(1)
    output, target = predicted(policy, batch), policy._prepare_action_targets(batch)
    expected = [
        sum(policy.model.action_space.compute_loss(output[row, None, :steps], target[row, None, :steps]).values())
        if steps
        else torch.zeros(())
        for row, steps in enumerate(lengths)
    ]
    loss = traced(policy, batch).loss
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-5, atol=1e-6)
    del batch["action_is_pad"]
    torch.manual_seed(1)
    own = policy.forward(copy.deepcopy(batch))[0]
    torch.testing.assert_close(traced(policy, batch).loss.mean(), own, rtol=1e-5, atol=1e-6)


def test_loss_of_the_real_dimensions_by_hand(make: Callable[..., Any]) -> None:
    policy, batch = make()
    error = (predicted(policy, batch)[..., :ACTION_DIM] - batch["action"]).square().mean(-1)
    valid = ~batch["action_is_pad"]
    torch.testing.assert_close(traced(policy, batch).loss, (error * valid).sum(1) / valid.sum(1), rtol=1e-5, atol=1e-6)


def test_an_unknown_action_space_is_refused(make: Callable[..., Any]) -> None:
    policy, _ = make()

    class Contrastive(BaseActionSpace):
        pass

    policy.model.action_space = Contrastive()
    with pytest.raises(ValueError, match=r"Contrastive.*action_mode.*ee6d"):
        XVLAAdapter(policy)


def test_context_is_what_the_transformer_is_conditioned_on(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST), num_image_views=3)
    trace = traced(policy, batch)
    patches, tokens = (32 // 8) ** 2 + 1, batch["observation.language.tokens"].shape[1]
    assert trace.context.shape[1] == 3 * patches + tokens
    real = batch["observation.language.attention_mask"].bool()
    assert trace.context_mask[:, patches : patches + tokens].equal(real)
    assert trace.context_mask.sum(1).equal(2 * patches + real.sum(1)), "a view that is missing is no context"
    inputs = policy._build_model_inputs(batch)
    encoded = policy.model.forward_vlm(inputs["input_ids"], inputs["image_input"], inputs["image_mask"])
    expected = torch.cat([encoded["vlm_features"], encoded["aux_visual_inputs"]], dim=1)
    torch.testing.assert_close(trace.context, expected, rtol=0, atol=0)


def test_action_states_are_what_the_decoder_reads(make: Callable[..., Any]) -> None:
    policy, batch = make()
    output, trace = predicted(policy, batch), traced(policy, batch)
    domain = torch.zeros(4, dtype=torch.long)
    decoded = policy.model.transformer.action_decoder(trace.action_hidden, domain)
    torch.testing.assert_close(decoded, output, rtol=1e-5, atol=1e-6)


def test_action_tokens_speak_of_the_action_alone(make: Callable[..., Any]) -> None:
    policy, batch = make()
    tokens = traced(policy, batch).action_tokens
    moved = traced(policy, {**batch, STATE: batch[STATE] + 1})
    assert torch.equal(moved.action_tokens, tokens)
    weight = policy.model.transformer.action_encoder.fc.weight[0].view(-1, 32)[:ACTION_DIM]
    torch.testing.assert_close(tokens, batch["action"] @ weight, rtol=1e-4, atol=1e-5)


def test_domains_have_their_own_projectors(make: Callable[..., Any]) -> None:
    policy, batch = make()
    tokens = traced(policy, batch).action_tokens
    batch["domain_id"] = torch.tensor([0, 1, 2, 0])
    found = traced(policy, batch).action_tokens
    same = [torch.allclose(*rows) for rows in zip(found, tokens, strict=True)]
    assert same == [True, False, False, True]


def test_gripper_the_space_hides_is_hidden_in_the_tokens(make: Callable[..., Any]) -> None:
    policy, batch = make(action_mode="joint")
    moved = batch["action"].clone()
    moved[..., policy.model.action_space.gripper_idx] += 1
    tokens = [traced(policy, {**batch, "action": action}).action_tokens for action in (batch["action"], moved)]
    assert torch.equal(*tokens)


def test_cameras_that_the_robot_lacks(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST), empty_cameras=1, freeze_vision_encoder=True)
    adapter = XVLAAdapter(policy)
    assert adapter.target_keys() == (TOP, WRIST)
    del batch[WRIST]
    views = adapter.encode_views(batch, 2)
    assert tuple(views.features) == tuple(views.tower) == (TOP,)
    torch.testing.assert_close(traced(policy, batch, views=views).loss, traced(policy, batch).loss)
    assert torch.equal(traced(policy, batch, views=views).context_mask, traced(policy, batch).context_mask)


def test_images_are_prepared_as_the_policy_prepares_them(make: Callable[..., Any]) -> None:
    policy, batch = make(freeze_vision_encoder=True, resize_imgs_with_padding=(32, 32))
    adapter = XVLAAdapter(policy)
    wide = torch.rand(4, 3, 24, 48)
    views = adapter.encode_views({**batch, TOP: wide}, 2)
    tokens = adapter.encode_image(adapter.build_tower(2), TOP, wide)
    assert tokens.shape == (4, (32 // 8) ** 2, 32)
    torch.testing.assert_close(tokens, views.tower[TOP], rtol=0, atol=0)


def test_targets_of_a_frozen_tower_are_not_random(make: Callable[..., Any]) -> None:
    """Released checkpoints drop a tenth of the tower's paths in training mode, frozen or not."""
    vision = {**FLORENCE["vision_config"], "drop_path_rate": 0.9}
    policy, batch = make(freeze_vision_encoder=True, florence_config={**FLORENCE, "vision_config": vision})
    adapter = XVLAAdapter(policy.train())
    shared, views = adapter.build_tower(2, share=True), adapter.encode_views(batch, 2)
    torch.testing.assert_close(adapter.encode_image(shared, TOP, batch[TOP]), views.tower[TOP], rtol=0, atol=0)
    assert all(module.training for module in policy.model.vlm.vision_tower.modules())


def test_too_many_belief_tokens_are_refused(make: Callable[..., Any]) -> None:
    policy, batch = make()
    positions = FLORENCE["text_config"]["max_position_embeddings"]
    belief = torch.randn(4, positions, 32)
    with pytest.raises(ValueError, match=f"{positions} belief tokens.*{positions} positions"):
        traced(policy, batch, belief=belief)


def test_bf16_weights(make: Callable[..., Any]) -> None:
    policy, batch = make(dtype="bfloat16")
    adapter = XVLAAdapter(policy.train())
    belief = torch.randn(4, 2, adapter.context_dim, requires_grad=True)
    trace = adapter.trace(batch, belief, views=adapter.encode_views(batch))
    (trace.loss.mean() + trace.context.mean() + trace.action_tokens.mean()).backward()
    assert belief.grad is not None
    assert belief.grad.abs().sum() > 0
    assert torch.isfinite(adapter.rollout(batch, belief.detach()).actions).all()
    assert adapter.encode_image(adapter.build_tower(2), TOP, batch[TOP]).dtype == torch.float32
    del batch["action_is_pad"]
    torch.manual_seed(1)
    own = policy.eval().forward(copy.deepcopy(batch))[0]
    torch.testing.assert_close(traced(policy, batch).loss.mean(), own.float(), rtol=2e-2, atol=1e-2)


def test_gradient_checkpointing_of_the_encoder(make: Callable[..., Any]) -> None:
    policy, batch = make()
    encoder = policy.model.vlm.language_model.encoder
    policy.train()
    for module in policy.modules():  # checkpointing happens in training mode; dropout would differ with the belief
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    belief = torch.randn(4, 2, 32)

    def gradients() -> list[torch.Tensor]:
        policy.zero_grad()
        trace = traced(policy, batch, belief=belief)
        (trace.loss.mean() + trace.context.square().mean()).backward()
        return [trace.loss.detach(), encoder.layers[0].fc1.weight.grad.clone()]

    expected = gradients()
    policy.model.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    for found, reference in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def test_lerobots_own_peft_entry_point(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.config.pretrained_path = "a/checkpoint"
    expected = traced(policy, batch).loss
    wrapped = policy.wrap_with_peft(
        peft_cli_overrides={"method_type": "lora", "r": 2, "target_modules": r".*(transformer\.blocks.*qkv|fc1)"}
    )
    trace = traced(wrapped, batch)
    torch.testing.assert_close(trace.loss, expected, rtol=1e-5, atol=1e-6)
    trace.loss.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters())
