"""What is particular to Diffusion Policy."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_diffusion import SteppedFamily, build_diffusion
from family import CHUNK, ENV, STATE, TOP, WRIST
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

from ptr_hf.method.target import ConsequenceEncoder
from ptr_hf.policies import make_adapter

Batch = dict[str, Any]
Make = Callable[..., tuple[DiffusionPolicy, Batch]]


@pytest.fixture
def make() -> Make:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[DiffusionPolicy, Batch]:
        family = SteppedFamily(
            "diffusion",
            build_diffusion,
            cameras=cameras,
            env_state=not cameras,
            settings=settings,
            image_size=48,
            observation_steps=settings.get("n_obs_steps", 2),
        )
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def conditioning(policy: DiffusionPolicy, batch: Batch) -> torch.Tensor:
    images = torch.stack([batch[key] for key in policy.config.image_features], dim=2)
    return policy.diffusion._prepare_global_conditioning({**batch, "observation.images": images})


def frame(batch: Batch, step: int) -> Batch:
    return {key: batch[key][:, step] for key in (STATE, TOP)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_loss_is_per_sample_and_never_counts_padding(make: Make, prediction_type: str) -> None:
    policy, batch = make(prediction_type=prediction_type)
    pad = torch.arange(CHUNK).expand(4, CHUNK) >= torch.tensor([CHUNK, 1, 3, 0]).unsqueeze(1)
    torch.manual_seed(0)
    trace = make_adapter(policy).trace({**batch, "action_is_pad": pad})
    torch.manual_seed(0)
    noise = torch.randn(batch["action"].shape)
    times = torch.randint(0, policy.config.num_train_timesteps, (4,))
    noisy = policy.diffusion.noise_scheduler.add_noise(batch["action"], noise, times)
    predicted = policy.diffusion.unet(noisy, times, global_cond=conditioning(policy, batch))
    target = noise if prediction_type == "epsilon" else batch["action"]
    error = (predicted - target).square().mean(-1) * ~pad
    torch.testing.assert_close(trace.loss, error.sum(1) / (~pad).sum(1).clamp_min(1))
    assert trace.loss[3] == 0


def test_where_the_tokens_come_from(make: Make) -> None:
    policy, batch = make(cameras=(TOP, WRIST))
    torch.manual_seed(0)
    trace = make_adapter(policy).trace(batch)
    torch.testing.assert_close(trace.context.flatten(1), conditioning(policy, batch))
    assert torch.equal(trace.context[..., : batch[STATE].shape[-1]], batch[STATE])
    projector = policy.diffusion.unet.down_modules[0][0].residual_conv
    expected = batch["action"] @ projector.weight.squeeze(-1).T + projector.bias
    torch.testing.assert_close(trace.action_tokens, expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    noise = torch.randn(batch["action"].shape)
    predicted = policy.diffusion.unet.final_conv(trace.action_hidden.transpose(1, 2)).transpose(1, 2)
    error = (predicted - noise).square().mean(-1)[:, : CHUNK - 2].mean(1)
    torch.testing.assert_close(trace.loss, error)


def test_a_padded_step_reaches_no_other_action_token(make: Make) -> None:
    policy, batch = make()
    other = {**batch, "action": batch["action"].clone()}
    other["action"][:, -1] += 10
    first, second = (make_adapter(policy).trace(each).action_tokens for each in (batch, other))
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.allclose(first[:, -1], second[:, -1])


def test_several_levels(make: Make) -> None:
    policy, batch = make(horizon=8, down_dims=(16, 32))
    batch |= {"action": torch.randn(4, 8, 14), "action_is_pad": torch.zeros(4, 8, dtype=torch.bool)}
    adapter = make_adapter(policy)
    trace, rollout = adapter.trace(batch), adapter.rollout(batch)
    assert trace.action_hidden.shape == rollout.action_hidden.shape == (4, 8, 16)
    assert trace.action_tokens.shape == rollout.action_tokens.shape == (4, 8, adapter.action_dim)


def test_belief_is_the_mean_of_the_readable_tokens(make: Make) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)
    belief = torch.randn(4, 3, adapter.context_dim)
    readable = torch.tensor([[True, False, True]] * 4)

    def loss(*args: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return adapter.trace(batch, *args).loss

    torch.testing.assert_close(loss(belief, readable), loss(belief[:, [0, 2]].mean(1, keepdim=True)))
    with pytest.raises(RuntimeError, match="one belief per row"):
        loss(belief[:1])


def test_history_is_the_policys_own(make: Make) -> None:
    policy, batch = make()
    policy.eval()
    own, adapter = copy.deepcopy(policy), make_adapter(policy)
    for step in (0, 1, 0):
        own.select_action(frame(batch, step))
        adapter.observe(frame(batch, step))
    assert not policy._queues["action"]
    for key in (STATE, "observation.images"):
        expected, found = (list(queues[key]) for queues in (own._queues, policy._queues))
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    latest = {**frame(batch, 0), "observation.images": frame(batch, 0)[TOP]}
    torch.manual_seed(0)
    expected = own.predict_action_chunk(latest)
    torch.manual_seed(0)
    assert torch.equal(adapter.rollout(frame(batch, 0)).actions, expected)
    torch.manual_seed(0)
    policy.reset()
    assert not torch.allclose(adapter.rollout(batch).actions, expected)
    assert not any(policy._queues.values()), "a rollout from a batch leaves no history"


def test_too_few_frames_are_refused(make: Make) -> None:
    policy, batch = make()
    for call in (make_adapter(policy).trace, make_adapter(policy).rollout, make_adapter(policy).encode_views):
        with pytest.raises(ValueError, match=rf"{STATE}.*1 frames.*reads 2.*observe\(\)"):
            call({**batch, **frame(batch, 0)})
    with pytest.raises(ValueError, match="holds 2 frames per row where the policy reads 1"):
        make_adapter(policy).observe(batch)


def test_random_crops_are_drawn_as_in_training_and_never_for_targets(make: Make) -> None:
    policy, batch = make(cameras=(TOP, WRIST), crop_shape=(40, 40))
    torch.manual_seed(0)
    expected = policy.forward(dict(batch, action_is_pad=torch.zeros_like(batch["action_is_pad"])))[0]
    after = torch.get_rng_state()
    torch.manual_seed(0)
    found = make_adapter(policy).trace({key: value for key, value in batch.items() if key != "action_is_pad"})
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(found.loss.mean(), expected)
    policy.diffusion.rgb_encoder.requires_grad_(False)
    adapter = make_adapter(policy)
    first, second = adapter.encode_views(batch, 2), adapter.encode_views(batch, 2)
    assert not torch.equal(first.features[TOP], second.features[TOP])
    assert torch.equal(first.tower[TOP], second.tower[TOP])
    policy.eval()
    torch.testing.assert_close(adapter.encode_views(batch, 2).tower[TOP], first.tower[TOP])


def test_batch_norm_is_never_a_frozen_tower(make: Make) -> None:
    policy, batch = make(use_group_norm=False)
    policy.requires_grad_(False)
    adapter = make_adapter(policy)
    assert not adapter.tower_is_frozen(), "its running statistics move in training"
    encoder = ConsequenceEncoder(adapter.build_tower(2), decay=0.5)
    before = adapter.encode_image(encoder.tower, TOP, batch[TOP][:, -1])
    adapter.trace(batch)
    encoder.update(adapter.tower_parameters(2))
    after = adapter.encode_image(encoder.tower, TOP, batch[TOP][:, -1])
    assert not torch.allclose(before, after)
    name = "0.1.num_batches_tracked"
    assert torch.equal(encoder.tower.state_dict()[name], dict(adapter.tower_parameters(2))[name])


def test_each_camera_has_the_tower_of_its_own_encoder(make: Make) -> None:
    policy, batch = make(cameras=(TOP, WRIST), use_separate_rgb_encoder_per_camera=True)
    adapter, image = make_adapter(policy), batch[TOP][:, -1]
    tower = adapter.build_tower(3)
    for key, encoder in zip((TOP, WRIST), policy.diffusion.rgb_encoder, strict=True):
        expected = encoder.backbone[:7](image).flatten(2).transpose(1, 2)
        torch.testing.assert_close(adapter.encode_image(tower, key, image), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapter.encode_image(tower, TOP, image), adapter.encode_image(tower, WRIST, image))


@pytest.mark.parametrize(("backbone", "widths"), [("resnet18", [64, 512]), ("resnet50", [256, 2048])])
def test_target_width_of_the_stages(make: Make, backbone: str, widths: list[int]) -> None:
    adapter = make_adapter(make(vision_backbone=backbone)[0])
    assert [adapter.target_dim(layer) for layer in (1, 4)] == widths


@pytest.mark.parametrize("steps", [1, 2])
def test_a_state_is_its_own_target(make: Make, steps: int) -> None:
    policy, batch = make(cameras=(), n_obs_steps=steps)
    adapter = make_adapter(policy)
    assert adapter.target_keys() == (ENV,)
    assert adapter.tower_is_frozen(), "there is nothing to train"
    tower = adapter.build_tower(1)
    assert not list(adapter.tower_parameters(1))
    now = batch[ENV][:, -1]
    assert torch.equal(adapter.encode_image(tower, ENV, now).squeeze(1), now)
    # a single step may lack its axis
    given = batch if steps > 1 else batch | {key: batch[key][:, 0] for key in (STATE, ENV)}
    assert torch.equal(adapter.encode_views(given, 1).tower[ENV].squeeze(1), now)


@pytest.mark.full
def test_a_compiled_unet_is_refused(make: Make) -> None:
    policy, _ = make(compile_model=True)
    with pytest.raises(ValueError, match="compile_model=False"):
        make_adapter(policy)
