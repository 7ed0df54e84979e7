"""What is particular to SmolVLA."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_smolvla import build_smolvla
from family import CHUNK, STATE, STATE_DIM, TOP, WRIST, Family
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from peft import LoraConfig, get_peft_model

from ptr_hf.policies import make_adapter
from ptr_hf.policies.hooks import captured_output

Batch = dict[str, Any]


@pytest.fixture
def make() -> Callable[..., tuple[SmolVLAPolicy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[SmolVLAPolicy, Batch]:
        family = Family("smolvla", build_smolvla, cameras=cameras, settings=settings)
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def base_losses(policy: SmolVLAPolicy, batch: Batch) -> torch.Tensor:
    torch.manual_seed(1)
    return policy.forward(copy.deepcopy(batch), reduction="none")[0]


def traced_losses(policy: SmolVLAPolicy, batch: Batch, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return make_adapter(policy).trace(batch, **kwargs).loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_image_special_tokens": True, "prefix_length": 40},
        {"attention_mode": "self_attn"},
        {"num_expert_layers": 1},
        {"adapt_to_pi_aloha": True},
        {"resize_imgs_with_padding": None},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_loss_is_the_policys_own_per_sample_loss(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    policy, batch = make(**settings)
    batch["action_is_pad"] = torch.tensor([[True] * CHUNK, [False] * CHUNK, *batch["action_is_pad"][2:].tolist()])
    batch["action"] = batch["action"].clamp(-0.3, 0.3)
    before = copy.deepcopy(batch)
    torch.testing.assert_close(traced_losses(policy, batch), base_losses(policy, batch), rtol=0, atol=0)
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim)
    hidden = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(
        traced_losses(policy, batch, belief=belief, belief_mask=hidden),
        base_losses(policy, batch),
        rtol=1e-4,
        atol=1e-5,
    )
    rollout = adapter.rollout(batch)
    trace = adapter.trace({**batch, "action": rollout.actions})
    torch.testing.assert_close(rollout.action_tokens, trace.action_tokens, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(batch[key], before[key]) for key in ("action", STATE, TOP))


def test_belief_does_not_open_the_state_to_image_tokens(make: Callable[..., Any]) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim)
    moved = {**batch, STATE: batch[STATE] + 1}
    first, second = (adapter.trace(b, belief) for b in (batch, moved))
    readable = first.context_mask[:, :-1]  # padded instruction tokens hold nothing anyone reads
    torch.testing.assert_close(first.context[:, :-1][readable], second.context[:, :-1][readable], rtol=0, atol=0)
    assert not torch.allclose(first.context[:, -1], second.context[:, -1])


def test_belief_tokens_read_the_image_block(make: Callable[..., Any]) -> None:
    """Ordinary context tokens: they attend to images, instruction and each other, but not to the state."""
    policy, batch = make()
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim)
    norm = policy.model.vlm_with_expert.get_vlm_model().text_model.norm

    def first_belief_state(batch: Batch, belief: torch.Tensor) -> torch.Tensor:
        with captured_output(norm) as states:
            adapter.trace(batch, belief)
        return states.value[:, 0]

    expected = first_belief_state(batch, belief)
    assert not torch.allclose(first_belief_state({**batch, TOP: batch[TOP].flip(-1)}, belief), expected)
    assert not torch.allclose(first_belief_state(batch, torch.cat([belief[:, :1], -belief[:, 1:]], 1)), expected)
    assert torch.equal(first_belief_state({**batch, STATE: batch[STATE] + 1}, belief), expected)


def test_context_covers_images_instruction_and_state(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST))
    batch[f"{WRIST}_padding_mask"] = torch.tensor([True, False, True, True])
    trace = make_adapter(policy).trace(batch)
    tokens = batch["observation.language.tokens"].shape[1]
    patches = (32 // 8 // 2) ** 2
    assert trace.context.shape[1] == 2 * patches + tokens + 1
    expected = 2 * patches + batch["observation.language.attention_mask"].sum(1) + 1
    expected[1] -= patches
    assert trace.context_mask.sum(1).tolist() == expected.tolist()
    views = make_adapter(policy).encode_views(batch)
    assert torch.equal(make_adapter(policy).trace(batch, views=views).context_mask, trace.context_mask)


def test_gradient_checkpointing_of_the_vision_tower(make: Callable[..., Any]) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)

    def gradient() -> torch.Tensor:
        policy.zero_grad()
        torch.manual_seed(1)
        trace = adapter.trace(batch, views=adapter.encode_views(batch))
        (trace.loss.mean() + trace.context.mean()).backward()
        return policy.model.vlm_with_expert.get_vlm_model().vision_model.embeddings.patch_embedding.weight.grad.clone()

    expected = gradient()
    vision = policy.model.vlm_with_expert.get_vlm_model().vision_model
    vision.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-6)
    adapter.encode_image(adapter.build_tower(2), TOP, batch[TOP])
    vision.requires_grad_(False)
    torch.testing.assert_close(
        adapter.encode_views(batch, 2).tower[TOP], adapter.encode_image(adapter.build_tower(2), TOP, batch[TOP])
    )


def test_bf16_backbone_with_float32_heads(make: Callable[..., Any]) -> None:
    policy, batch = make(freeze_vision_encoder=True, train_expert_only=True)
    policy.model.vlm_with_expert.vlm.to(torch.bfloat16)
    adapter = make_adapter(policy)
    torch.testing.assert_close(traced_losses(policy, batch), base_losses(policy, batch), rtol=0, atol=0)
    belief = torch.randn(4, 2, adapter.context_dim, requires_grad=True)
    views = adapter.encode_views(batch, 2)
    adapter.trace(batch, belief, views=views).loss.mean().backward()
    assert belief.grad is not None
    assert belief.grad.abs().sum() > 0
    copied, shared = adapter.build_tower(2), adapter.build_tower(2, share=True)
    assert adapter.encode_image(copied, TOP, batch[TOP]).dtype == torch.float32
    torch.testing.assert_close(adapter.encode_image(shared, TOP, batch[TOP]), views.tower[TOP], rtol=0, atol=0)
    adapter.rollout(batch, belief.detach())


def test_an_adapted_tower_is_followed_by_name(make: Callable[..., Any]) -> None:
    policy, batch = make()
    wrapped = get_peft_model(policy, LoraConfig(r=2, target_modules=r".*vision_model.*[qv]_proj"))
    adapter = make_adapter(wrapped)
    assert not adapter.tower_is_frozen()
    tower = adapter.build_tower(2)
    live = dict(adapter.tower_parameters(2))
    assert live.keys() == tower.state_dict().keys()
    assert any("lora_A" in name for name in live)
    before = adapter.encode_image(tower, TOP, batch[TOP])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    torch.testing.assert_close(adapter.encode_image(tower, TOP, batch[TOP]), before, rtol=0, atol=0)
    tower.load_state_dict(dict(adapter.tower_parameters(2)))
    assert not torch.allclose(adapter.encode_image(tower, TOP, batch[TOP]), before)


def test_lerobots_own_peft_entry_point(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.config.pretrained_path = "a/checkpoint"
    expected = traced_losses(policy, batch)
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"method_type": "lora", "r": 2})
    torch.testing.assert_close(traced_losses(wrapped, batch), expected, rtol=1e-5, atol=1e-6)
    assert make_adapter(wrapped).family == "smolvla"


def test_images_are_prepared_as_the_policy_prepares_them(make: Callable[..., Any]) -> None:
    policy, batch = make(freeze_vision_encoder=True)
    adapter = make_adapter(policy)
    wide = torch.rand(4, 3, 24, 48)
    views = adapter.encode_views({**batch, TOP: wide}, 2)
    torch.testing.assert_close(
        adapter.encode_image(adapter.build_tower(2), TOP, wide), views.tower[TOP], rtol=0, atol=0
    )


def test_cameras_that_the_robot_lacks(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST), empty_cameras=1, freeze_vision_encoder=True)
    adapter = make_adapter(policy)
    assert adapter.target_keys() == (TOP, WRIST)
    views = adapter.encode_views(batch, 1)
    assert tuple(views.tower) == (TOP, WRIST)
    assert len(views.features) == 3
    assert [bool(mask.all()) for mask in views.masks.values()] == [True, True, False]
    del batch[WRIST]
    torch.testing.assert_close(traced_losses(policy, batch), base_losses(policy, batch), rtol=0, atol=0)
    views = adapter.encode_views(batch, 1)
    assert tuple(views.tower) == (TOP,)
    torch.testing.assert_close(traced_losses(policy, batch, views=views), base_losses(policy, batch))


def test_sampling_options_reach_the_policy(make: Callable[..., Any]) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)
    noise = torch.randn(4, CHUNK, policy.config.max_action_dim)
    first, second = (adapter.rollout(batch, noise=noise) for _ in range(2))
    assert torch.equal(first.actions, second.actions)
    assert not torch.equal(first.actions, adapter.rollout(batch).actions)


def test_hidden_states_are_those_of_the_last_denoising_step(make: Callable[..., Any]) -> None:
    policy, batch = make()
    noise = torch.randn(4, CHUNK, policy.config.max_action_dim)
    seen: list[torch.Tensor] = []
    handle = policy.model.action_out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    hidden = make_adapter(policy).rollout(batch, noise=noise).action_hidden
    handle.remove()
    assert len(seen) == policy.config.num_steps
    assert torch.equal(hidden, seen[-1])
    assert not torch.equal(hidden, seen[0])


def test_a_compiled_forward_is_refused(make: Callable[..., Any]) -> None:
    policy, _ = make()
    policy.config.compile_model = True
    with pytest.raises(ValueError, match="compile_model=False"):
        make_adapter(policy)


def test_state_of_one_stacked_frame_is_accepted(make: Callable[..., Any]) -> None:
    """LeRobot's observation_delta_indices=[0] gives SmolVLA a time axis of one."""
    policy, batch = make()
    stacked = {**batch, STATE: batch[STATE].unsqueeze(1), TOP: batch[TOP].unsqueeze(1)}
    assert stacked[STATE].shape == (4, 1, STATE_DIM)
    torch.testing.assert_close(traced_losses(policy, stacked), traced_losses(policy, batch), rtol=0, atol=0)
