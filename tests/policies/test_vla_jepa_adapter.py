"""What is particular to VLA-JEPA."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_vla_jepa import build_vla_jepa
from family import CHUNK, STATE, TOP, WRIST, Family
from lerobot.policies.vla_jepa import modeling_vla_jepa
from lerobot.policies.vla_jepa.modeling_vla_jepa import VLAJEPAPolicy
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

from ptr_hf.policies.hooks import captured_output
from ptr_hf.policies.vla_jepa import VLAJEPAAdapter

Batch = dict[str, Any]


@pytest.fixture
def make() -> Callable[..., tuple[VLAJEPAPolicy, Batch]]:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[VLAJEPAPolicy, Batch]:
        family = Family("vla_jepa", build_vla_jepa, cameras=cameras, settings=settings)
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


@pytest.fixture(scope="module")
def video_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vjepa")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    VJEPA2Model(
        VJEPA2Config(
            patch_size=16,
            crop_size=32,
            image_size=32,
            frames_per_clip=4,
            pred_hidden_size=32,
            pred_num_hidden_layers=1,
            pred_num_attention_heads=2,
            pred_num_mask_tokens=1,
            **size,
        )
    ).save_pretrained(folder)
    VJEPA2VideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def action_loss(policy: VLAJEPAPolicy, batch: Batch, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return policy.model.forward(**policy._prepare_model_inputs(copy.deepcopy(batch)))["action_loss"]


def traced_loss(policy: VLAJEPAPolicy, batch: Batch, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return VLAJEPAAdapter(policy).trace(batch).loss


def test_a_rows_loss_is_the_mean_over_its_draws_and_steps(make: Callable[..., Any]) -> None:
    policy, batch = make(repeated_diffusion_steps=3)
    pad = torch.zeros(4, CHUNK, dtype=torch.bool)
    pad[0], pad[1, 1:], pad[2, 4:] = True, True, True
    batch["action_is_pad"] = pad
    losses = traced_loss(policy, batch)
    valid = (~pad).sum(1)
    pooled = (losses * valid).sum() / valid.sum()
    torch.testing.assert_close(pooled, action_loss(policy, batch), rtol=1e-5, atol=1e-6)
    for row in range(4):  # only this row counts, among the same random numbers
        alone = {**batch, "action_is_pad": pad | (torch.arange(4) != row).unsqueeze(1)}
        torch.testing.assert_close(losses[row], action_loss(policy, alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cameras", [(TOP,), (TOP, WRIST)], ids=["one", "two"])
def test_the_world_model_is_left_out(make: Callable[..., Any], video_encoder: str, cameras: tuple[str, ...]) -> None:
    policy, batch = make(cameras, enable_world_model=True, jepa_encoder_name=video_encoder, predictor_depth=1)
    policy.eval()
    videos = {key: torch.cat([batch[key].unsqueeze(1), torch.rand(4, 3, 3, 32, 32)], dim=1) for key in cameras}
    _, logs = policy.forward(copy.deepcopy({**batch, **videos}))
    assert logs["wm_loss"] > 0
    expected = action_loss(policy, {**batch, **videos})
    losses = traced_loss(policy, batch)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-6)
    losses.mean().backward()
    assert all(p.grad is None for p in policy.model.video_predictor.parameters())
    torch.testing.assert_close(traced_loss(policy, {**batch, **videos}), losses, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"{cameras[0]}.*3 frames"):
        VLAJEPAAdapter(policy).trace({**batch, **{key: value[:, 1:] for key, value in videos.items()}})


def test_where_context_and_actions_come_from(make: Callable[..., Any]) -> None:
    policy, batch = make()
    policy.eval()
    adapter = VLAJEPAAdapter(policy)
    head = policy.model.action_model
    qwen = policy.model.qwen.model.model
    with (
        captured_output(qwen.language_model.norm) as states,
        captured_output(head.model) as hidden,
    ):
        trace = adapter.trace(batch)
    assert torch.equal(trace.context, states.value)
    assert torch.equal(trace.action_hidden, hidden.value[:4, -CHUNK:])
    assert trace.context.shape[1] == trace.context_mask.sum(1).max()
    assert (~trace.context_mask[:, 0]).any(), "shorter instructions are padded on the left"
    clean = head.action_encoder(batch["action"], torch.full((4,), 1000))
    assert torch.equal(trace.action_tokens, clean)


def test_the_belief_comes_before_the_prompt(make: Callable[..., Any]) -> None:
    """The model is causal: every prompt token reads the belief, and the belief reads nothing of the prompt."""
    policy, batch = make()
    policy.eval()
    adapter = VLAJEPAAdapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim)
    with captured_output(policy.model.qwen.model.model.language_model.norm) as first:
        plain = adapter.trace(batch, belief)
    with captured_output(policy.model.qwen.model.model.language_model.norm) as second:
        adapter.trace({**batch, TOP: batch[TOP].flip(-1)}, belief)
    torch.testing.assert_close(first.value[:, :2], second.value[:, :2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first.value[:, 2:], second.value[:, 2:])
    assert torch.equal(plain.context, first.value[:, 2:])


def test_a_policy_without_state(make: Callable[..., Any]) -> None:
    policy, batch = make()
    del policy.config.input_features[STATE], batch[STATE]
    adapter = VLAJEPAAdapter(policy)
    assert torch.isfinite(adapter.trace(batch).loss).all()
    assert torch.isfinite(adapter.rollout(batch).actions).all()


def test_under_the_backbones_own_autocast(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere but on Apple's devices LeRobot runs the backbone in bfloat16."""
    policy, batch = make()
    exact = traced_loss(policy, batch)
    monkeypatch.setattr(modeling_vla_jepa, "is_amp_available", lambda _device: True)
    losses = traced_loss(policy, batch)
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses.mean(), action_loss(policy, batch), rtol=1e-6, atol=1e-6)
    policy.requires_grad_(False)
    adapter = VLAJEPAAdapter(policy)
    views = adapter.encode_views(batch, 2)
    assert torch.equal(views.tower[TOP], adapter.encode_image(adapter.build_tower(2), TOP, batch[TOP]))
    torch.manual_seed(1)
    torch.testing.assert_close(adapter.trace(batch, views=views).loss, losses, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 48), (20, 70)], ids=str)
def test_views_of_images_that_are_not_square(make: Callable[..., Any], size: tuple[int, int]) -> None:
    policy, batch = make((TOP, WRIST))
    policy.eval()
    batch[WRIST] = torch.rand(4, 3, *size)
    adapter = VLAJEPAAdapter(policy)
    views = adapter.encode_views(batch)
    torch.manual_seed(1)
    found = adapter.trace({key: value for key, value in batch.items() if key != WRIST}, views=views)
    torch.testing.assert_close(found.loss, traced_loss(policy, batch), rtol=1e-5, atol=1e-6)


def test_the_tiny_checkpoint_round_trip(make: Callable[..., Any], tmp_path: Path) -> None:
    policy, batch = make()
    policy.save_pretrained(tmp_path)
    loaded = VLAJEPAPolicy.from_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = VLAJEPAAdapter(policy).rollout(batch).actions
    torch.manual_seed(0)
    assert torch.equal(VLAJEPAAdapter(loaded).rollout(batch).actions, expected)
