"""What is particular to ACT."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_act import build_act
from family import CHUNK, ENV, TOP, Family
from lerobot.policies.act.modeling_act import ACTPolicy

from ptr_hf.policies import make_adapter

Batch = dict[str, Any]


@pytest.fixture
def make() -> Callable[..., tuple[ACTPolicy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[ACTPolicy, Batch]:
        family = Family("act", build_act, cameras=cameras, env_state=not cameras, settings=settings)
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def uneven(batch: Batch) -> Batch:
    pad = torch.arange(CHUNK).expand(4, CHUNK) >= torch.tensor([CHUNK, 1, 3, 5]).unsqueeze(1)
    return {**batch, "action_is_pad": pad}


def test_loss_is_per_sample(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.eval()
    batch = uneven(batch)
    rows = [{key: value[row : row + 1] for key, value in batch.items() if torch.is_tensor(value)} for row in range(4)]
    expected = torch.stack([policy.forward(row)[0] for row in rows])
    torch.testing.assert_close(make_adapter(policy).trace(batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_divergence_counts_once_per_sample(make: Callable[..., Any]) -> None:
    policy, batch = make(use_vae=True, dropout=0.0, kl_weight=3.0)
    traced = copy.deepcopy(policy)
    batch = uneven(batch)
    torch.manual_seed(0)
    loss = make_adapter(traced).trace(batch).loss
    torch.manual_seed(0)
    predicted, (mean, log_variance) = policy.model({**batch, "observation.images": [batch[TOP]]})
    valid = ~batch["action_is_pad"]
    error = ((batch["action"] - predicted).abs().mean(-1) * valid).sum(1) / valid.sum(1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(-1)
    torch.testing.assert_close(loss, error + 3.0 * divergence, rtol=1e-4, atol=1e-5)


def test_context_never_sees_the_action_through_the_latent(make: Callable[..., Any]) -> None:
    policy, batch = make(use_vae=True, dropout=0.1)
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim)
    other = {**batch, "action": batch["action"] + 1}
    for tokens in (None, belief):
        first, second = adapter.trace(batch, tokens), adapter.trace(other, tokens)
        assert torch.equal(first.context, second.context)
        assert not torch.allclose(first.action_hidden, second.action_hidden)
        policy.eval()
        at_inference = adapter.trace(batch, tokens).context
        policy.train()
        torch.testing.assert_close(first.context, at_inference, rtol=1e-5, atol=1e-6)


def test_prior_context_trains_the_encoder_and_keeps_modes(make: Callable[..., Any]) -> None:
    policy, batch = make(use_vae=True)
    policy.model.encoder.layers[0].dropout1.eval()
    modes = [module.training for module in policy.modules()]
    make_adapter(policy).trace(batch).context.square().mean().backward()
    assert [module.training for module in policy.modules()] == modes
    assert policy.model.encoder.layers[0].linear1.weight.grad.abs().sum() > 0
    assert policy.model.backbone.conv1.weight.grad.abs().sum() > 0
    assert not policy.model.vae_encoder_action_input_proj.weight.grad.any()


def test_action_tokens_come_from_the_heads_own_embedding(make: Callable[..., Any]) -> None:
    policy, batch = make()
    tokens = make_adapter(policy).trace(batch).action_tokens
    torch.testing.assert_close(tokens, batch["action"] @ policy.model.action_head.weight, rtol=1e-4, atol=1e-5)
    policy, batch = make(use_vae=True)
    tokens = make_adapter(policy).trace(batch).action_tokens
    torch.testing.assert_close(tokens, policy.model.vae_encoder_action_input_proj(batch["action"]))


@pytest.mark.parametrize(("backbone", "widths"), [("resnet18", [64, 128]), ("resnet50", [256, 512])])
def test_target_width_of_the_stages(make: Callable[..., Any], backbone: str, widths: list[int]) -> None:
    policy, batch = make(vision_backbone=backbone)
    adapter = make_adapter(policy)
    assert not adapter.tower_is_frozen(), "ACT's backbone trains, so its consequence encoder is an EMA"
    for layer, width in zip((1, 2), widths, strict=True):
        tokens = adapter.encode_image(adapter.build_tower(layer), TOP, batch[TOP])
        assert adapter.target_dim(layer) == width
        assert tokens.shape == (4, (32 // 2 ** (layer + 1)) ** 2, width)


def test_policy_without_cameras_uses_its_state_projector(make: Callable[..., Any]) -> None:
    policy, batch = make(cameras=())
    adapter = make_adapter(policy)
    assert adapter.target_keys() == (ENV,)
    assert adapter.num_tower_layers() == 1
    tokens = adapter.encode_image(adapter.build_tower(1), ENV, batch[ENV])
    torch.testing.assert_close(tokens.squeeze(1), policy.model.encoder_env_state_input_proj(batch[ENV]))


def test_belief_mask_reaches_every_decoder_layer(make: Callable[..., Any]) -> None:
    policy, batch = make(n_decoder_layers=3, dropout=0.0)
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim, requires_grad=True)
    mask = torch.tensor([[True, False]] * 4)
    adapter.trace(batch, belief, mask).loss.sum().backward()
    assert belief.grad is not None
    assert (belief.grad[:, 0].abs().sum(-1) > 0).all()
    assert not belief.grad[:, 1].any()
