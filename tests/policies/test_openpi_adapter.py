"""What is particular to pi0 and pi0.5."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_openpi import build_openpi
from family import ACTION_DIM, CHUNK, STATE, TOP, WRIST, Family
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from ptr_hf.policies import PolicyTrace, make_adapter
from ptr_hf.policies.hooks import captured_input, captured_output

Batch = dict[str, Any]
PATCHES = (32 // 8) ** 2
MASK = "observation.language.attention_mask"


@pytest.fixture(params=["pi0", "pi05"])
def make(request: pytest.FixtureRequest) -> Callable[..., tuple[PreTrainedPolicy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[PreTrainedPolicy, Batch]:
        family = Family(request.param, build_openpi, cameras, settings={"version": request.param, **settings})
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def trace(policy: PreTrainedPolicy, batch: Batch, **kwargs: Any) -> PolicyTrace:
    torch.manual_seed(1)
    return make_adapter(policy).trace(batch, **kwargs)


def gradients(policy: PreTrainedPolicy, traced: PolicyTrace) -> dict[str, Tensor]:
    policy.zero_grad()
    terms = (traced.loss, traced.context, traced.action_hidden, traced.action_tokens)
    sum(term.mean() for term in terms).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_loss_counts_valid_steps_of_the_robots_own_dimensions(make: Callable[..., Any]) -> None:
    policy, batch = make()
    valid = torch.tensor([0, CHUNK, 1, 4])
    batch["action_is_pad"] = torch.arange(CHUNK) >= valid[:, None]
    with captured_output(policy.model.action_out_proj) as velocity:
        found = trace(policy, batch)
    torch.manual_seed(1)
    padded = torch.nn.functional.pad(batch["action"], (0, policy.config.max_action_dim - ACTION_DIM))
    noise = policy.model.sample_noise(padded.shape, "cpu")
    errors = (noise - padded - velocity.value)[:, :, :ACTION_DIM].square()
    expected = [errors[row, :steps].mean() if steps else torch.zeros(()) for row, steps in enumerate(valid.tolist())]
    torch.testing.assert_close(found.loss, torch.stack(expected), rtol=1e-5, atol=1e-6)
    whole = {key: value for key, value in batch.items() if key != "action_is_pad"}
    torch.manual_seed(1)
    own = policy.forward(copy.deepcopy(whole), reduction="none")[0]
    torch.testing.assert_close(trace(policy, whole).loss, own, rtol=1e-6, atol=1e-6)


def test_captures_are_the_models_own_states(make: Callable[..., Any]) -> None:
    policy, batch = make()
    model = policy.model
    norms: list[Tensor] = []
    handle = model.paligemma_with_expert.paligemma.model.language_model.norm.register_forward_hook(
        lambda _module, _args, output: norms.append(output[0])
    )
    with captured_input(model.action_out_proj) as hidden:
        found = trace(policy, batch, belief=torch.randn(4, 2, 32))
    handle.remove()
    assert torch.equal(found.context, norms[0][:, 2:])
    assert torch.equal(found.action_hidden, hidden.value)
    padded = torch.nn.functional.pad(batch["action"], (0, policy.config.max_action_dim - ACTION_DIM))
    assert torch.equal(found.action_tokens, model.action_in_proj(padded))


def test_context_is_the_bidirectional_block_of_images_instruction_and_belief(make: Callable[..., Any]) -> None:
    policy, batch = make()
    assert trace(policy, batch).context.shape[1] == PATCHES + batch[MASK].shape[1]
    belief = torch.randn(4, 2, 32)
    norm = policy.model.paligemma_with_expert.paligemma.model.language_model.norm
    firsts: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _module, _args, output: firsts.append(output[0][:, 0]))
    trace(policy, batch, belief=belief)
    trace(policy, {**batch, TOP: batch[TOP].flip(-1)}, belief=belief)
    trace(policy, batch, belief=torch.cat([belief[:, :1], -belief[:, 1:]], dim=1))
    trace(policy, {**batch, STATE: batch[STATE] + 1}, belief=belief)
    handle.remove()
    assert not torch.allclose(firsts[1], firsts[0]), "a belief token reads the images"
    assert not torch.allclose(firsts[2], firsts[0]), "and the other belief tokens"
    assert torch.equal(firsts[3], firsts[0]), "but not the state, which is no part of the prefix"


def test_a_camera_that_a_row_lacks_is_hidden(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST))
    policy.eval()
    batch[f"{WRIST}_padding_mask"] = torch.tensor([True, False, True, True])
    other = {**batch, WRIST: batch[WRIST].clone()}
    other[WRIST][:2] = 1 - other[WRIST][:2]
    first, second = trace(policy, batch), trace(policy, other)
    expected = 2 * PATCHES + batch[MASK].sum(1)
    expected[1] -= PATCHES
    assert first.context_mask.sum(1).tolist() == expected.tolist()
    assert not torch.allclose(second.loss[0], first.loss[0])
    torch.testing.assert_close(second.loss[1:], first.loss[1:], rtol=0, atol=0)
    adapter = make_adapter(policy)
    views = adapter.encode_views(batch)
    torch.testing.assert_close(trace(policy, batch, views=views).loss, first.loss)
    noise = torch.randn(4, CHUNK, policy.config.max_action_dim)
    shown, changed = (adapter.rollout(b, noise=noise).actions for b in (batch, other))
    torch.testing.assert_close(changed[1:], shown[1:], rtol=0, atol=0)
    assert not torch.allclose(changed[0], shown[0])


def test_cameras_that_the_robot_lacks(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=(TOP, WRIST), empty_cameras=1, freeze_vision_encoder=True)
    del batch[WRIST]
    adapter = make_adapter(policy)
    assert adapter.target_keys() == (TOP, WRIST)
    views = adapter.encode_views(batch, 1)
    assert tuple(views.tower) == (TOP,)
    assert [bool(mask.all()) for mask in views.masks.values()] == [True, False, False]
    torch.testing.assert_close(trace(policy, batch, views=views).loss, trace(policy, batch).loss)


def test_images_are_prepared_as_the_policy_prepares_them(make: Callable[..., Any]) -> None:
    policy, batch = make(freeze_vision_encoder=True)
    adapter = make_adapter(policy)
    wide = torch.rand(4, 3, 24, 48)
    views = adapter.encode_views({**batch, TOP: wide}, 2)
    found = adapter.encode_image(adapter.build_tower(2), TOP, wide)
    torch.testing.assert_close(found, views.tower[TOP], rtol=0, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("with_views", [False, True])
def test_gradient_checkpointing_changes_nothing(make: Callable[..., Any], with_views: bool) -> None:
    policy, batch = make()
    belief = torch.randn(4, 2, 32)

    def run() -> tuple[PolicyTrace, dict[str, Tensor]]:
        views = make_adapter(policy).encode_views(batch) if with_views else None
        traced = trace(policy, batch, belief=belief, views=views)
        return traced, gradients(policy, traced)

    plain, expected = run()
    policy.model.gradient_checkpointing_enable()
    layer = policy.model.paligemma_with_expert.gemma_expert.model.layers[0].mlp
    calls: list[bool] = []
    handle = layer.register_forward_hook(lambda *_: calls.append(True))
    found, recomputed = run()
    handle.remove()
    assert len(calls) > 1, "backward runs the layers again"
    for name, value in vars(plain).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0)
    assert recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_weights(make: Callable[..., Any], checkpointing: bool) -> None:
    policy, batch = make(dtype="bfloat16", freeze_vision_encoder=True, gradient_checkpointing=checkpointing)
    experts = policy.model.paligemma_with_expert
    assert experts.paligemma.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim, requires_grad=True)
    views = adapter.encode_views(batch, 1)
    found = trace(policy, batch, belief=belief, views=views)
    assert {value.dtype for value in vars(found).values()} == {torch.float32, torch.bool}
    grown = gradients(policy, found)
    assert all(torch.isfinite(gradient).all() for gradient in grown.values())
    assert any(gradient.dtype == torch.bfloat16 and gradient.any() for gradient in grown.values())
    assert belief.grad is not None
    assert belief.grad.abs().sum() > 0
    batch["action_is_pad"][:] = False
    torch.manual_seed(1)
    own = policy.forward(copy.deepcopy(batch), reduction="none")[0]
    torch.testing.assert_close(trace(policy, batch).loss, own, rtol=1e-5, atol=1e-5)
    steered, plain = adapter.rollout(batch, belief.detach()), adapter.rollout(batch)
    assert torch.isfinite(steered.actions).all()
    assert steered.action_hidden.dtype == plain.action_tokens.dtype == torch.float32


def test_lerobots_own_peft_entry_point(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.config.pretrained_path = "a/checkpoint"
    expected = trace(policy, batch).loss.detach()
    wrapped = policy.wrap_with_peft(peft_cli_overrides={"method_type": "lora", "r": 2})
    found = trace(wrapped, batch)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    found.loss.mean().backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.full
def test_compiled_layers_are_still_read(make: Callable[..., Any]) -> None:
    """`compile_model` hides the hooks; the tower and the layers' feed-forward blocks can be compiled in place."""
    policy, batch = make()
    plain = trace(policy, batch, belief=torch.ones(4, 2, 32))
    expected = gradients(policy, plain)
    experts = policy.model.paligemma_with_expert
    experts.paligemma.model.vision_tower.compile(backend="aot_eager")
    for layer in (*experts.paligemma.model.language_model.layers, *experts.gemma_expert.model.layers):
        layer.mlp.compile(backend="aot_eager")
    found = trace(policy, batch, belief=torch.ones(4, 2, 32))
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.context, plain.context, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(policy, found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_compiled_forward_is_refused(make: Callable[..., Any]) -> None:
    policy, _ = make()
    policy.config.compile_model = True
    with pytest.raises(ValueError, match=f"compiled {policy.name} forward: set compile_model=False"):
        make_adapter(policy)


def test_a_stacked_state_is_refused_even_where_only_the_prompt_holds_it(make: Callable[..., Any]) -> None:
    policy, batch = make()
    stacked = {**batch, STATE: batch[STATE].unsqueeze(1).repeat(1, 2, 1)}
    with pytest.raises(ValueError, match=r"observation\.state.*2 frames"):
        trace(policy, stacked)


def test_hidden_states_are_those_of_the_last_denoising_step(make: Callable[..., Any]) -> None:
    policy, batch = make()
    noise = torch.randn(4, CHUNK, policy.config.max_action_dim)
    seen: list[Tensor] = []
    handle = policy.model.action_out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    hidden = make_adapter(policy).rollout(batch, noise=noise, num_steps=3).action_hidden
    handle.remove()
    assert len(seen) == 3
    assert torch.equal(hidden, seen[-1])
    assert not torch.equal(hidden, seen[0])
