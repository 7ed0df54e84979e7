"""What is particular to Multi-Task DiT."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families_diffusion import SteppedFamily
from families_multi_task_dit import IMAGE_SIZE, build_multi_task_dit
from family import CHUNK, STATE, TOP, WRIST
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

from ptr_hf.policies import make_adapter

Batch = dict[str, Any]
Make = Callable[..., tuple[MultiTaskDiTPolicy, Batch]]
TOKENS = "observation.language.tokens"


@pytest.fixture
def make() -> Make:
    def build(cameras: tuple[str, ...] = (TOP,), **settings: Any) -> tuple[MultiTaskDiTPolicy, Batch]:
        family = SteppedFamily(
            "multi_task_dit",
            build_multi_task_dit,
            cameras=cameras,
            settings={"dropout": 0.0, **settings},
            image_size=IMAGE_SIZE,
            observation_steps=2,
        )
        policy = family.policy().train()
        return policy, family.batch(policy)

    return build


def conditioning(policy: MultiTaskDiTPolicy, batch: Batch) -> torch.Tensor:
    return policy.observation_encoder.encode(policy._prepare_batch(batch))


def frame(batch: Batch, step: int) -> Batch:
    language = {key: value for key, value in batch.items() if "language" in key}
    return {STATE: batch[STATE][:, step], TOP: batch[TOP][:, step], **language}


def uneven() -> torch.Tensor:
    return torch.arange(CHUNK).expand(4, CHUNK) >= torch.tensor([CHUNK, 1, 3, 0]).unsqueeze(1)


@pytest.mark.parametrize("strategy", ["beta", "uniform"])
def test_flow_loss_is_per_sample_and_never_counts_padding(make: Make, strategy: str) -> None:
    policy, batch = make(objective="flow_matching", timestep_sampling_strategy=strategy, sigma_min=0.1)
    pad, action = uneven(), batch["action"]
    torch.manual_seed(0)
    trace = make_adapter(policy).trace({**batch, "action_is_pad": pad})
    torch.manual_seed(0)
    noise = torch.randn_like(action)
    times = policy.objective._sample_timesteps(4, action.device)
    share = times.view(-1, 1, 1)
    noised = share * action + (1 - 0.9 * share) * noise
    predicted = policy.noise_predictor(noised, times, conditioning_vec=conditioning(policy, batch))
    error = (predicted - (action - 0.9 * noise)).square().mean(-1) * ~pad
    torch.testing.assert_close(trace.loss, error.sum(1) / (~pad).sum(1).clamp_min(1))
    assert trace.loss[3] == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_diffusion_loss_is_per_sample_and_never_counts_padding(make: Make, prediction_type: str) -> None:
    policy, batch = make(prediction_type=prediction_type, noise_scheduler_type="DDIM")
    pad, action = uneven(), batch["action"]
    torch.manual_seed(0)
    trace = make_adapter(policy).trace({**batch, "action_is_pad": pad})
    torch.manual_seed(0)
    noise = torch.randn_like(action)
    times = torch.randint(0, policy.config.num_train_timesteps, (4,))
    noised = policy.objective.noise_scheduler.add_noise(action, noise, times)
    predicted = policy.noise_predictor(noised, times, conditioning_vec=conditioning(policy, batch))
    error = (predicted - (noise if prediction_type == "epsilon" else action)).square().mean(-1) * ~pad
    torch.testing.assert_close(trace.loss, error.sum(1) / (~pad).sum(1).clamp_min(1))


def test_where_the_tokens_come_from(make: Make) -> None:
    policy, batch = make(cameras=(TOP, WRIST))
    torch.manual_seed(0)
    trace = make_adapter(policy).trace(batch)
    torch.testing.assert_close(trace.context.flatten(1), conditioning(policy, batch))
    torch.testing.assert_close(trace.action_tokens, policy.noise_predictor.input_proj(batch["action"]))
    torch.manual_seed(0)
    noise = torch.randn_like(batch["action"])
    error = (policy.noise_predictor.output_proj(trace.action_hidden) - noise).square().mean(-1)
    torch.testing.assert_close(trace.loss, error[:, : CHUNK - 2].mean(1))


def test_the_instruction_is_part_of_the_context(make: Make) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)
    first = adapter.trace(batch).context
    second = adapter.trace({**batch, TOKENS: batch[TOKENS].flip(0)}).context
    text = policy.config.hidden_dim
    assert torch.equal(first[..., :-text], second[..., :-text])
    assert not torch.allclose(first[..., -text:], second[..., -text:])
    with pytest.raises(ValueError, match=rf"'{TOKENS}'.*preprocessor"):
        adapter.trace({key: value for key, value in batch.items() if key != TOKENS})


def test_history_is_the_policys_own(make: Make) -> None:
    policy, batch = make()
    policy.eval()
    own, adapter = copy.deepcopy(policy), make_adapter(policy)
    for step in (0, 1, 0):
        own.select_action(frame(batch, step))
        adapter.observe(frame(batch, step))
    assert not policy._queues["action"]
    torch.manual_seed(0)
    expected = own.predict_action_chunk(own._prepare_batch(frame(batch, 0)))
    torch.manual_seed(0)
    assert torch.equal(adapter.rollout(frame(batch, 0)).actions, expected)
    assert len(policy._queues[STATE]) == 2
    policy.reset()
    torch.manual_seed(0)
    assert not torch.allclose(adapter.rollout(batch).actions, expected)
    assert not any(policy._queues.values()), "a rollout from a batch leaves no history"


def test_an_untrained_policy_ignores_the_belief_until_its_modulation_has_a_weight(make: Make) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)
    belief = torch.randn(4, 2, adapter.context_dim)

    def effect() -> torch.Tensor:
        losses = []
        for tokens in (None, belief):
            torch.manual_seed(0)
            losses.append(adapter.trace(batch, tokens).loss)
        return (losses[1] - losses[0]).abs().max()

    assert effect() > 1e-4
    policy.noise_predictor._initialize_weights()
    assert effect() == 0


def test_random_crops_are_drawn_as_in_training_and_never_for_targets(make: Make) -> None:
    policy, batch = make(cameras=(TOP, WRIST), image_resize_shape=(40, 40), image_crop_shape=(IMAGE_SIZE, IMAGE_SIZE))
    torch.manual_seed(0)
    expected = policy.forward(dict(batch))[0]
    after = torch.get_rng_state()
    torch.manual_seed(0)
    found = make_adapter(policy).trace({key: value for key, value in batch.items() if key != "action_is_pad"})
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(found.loss.mean(), expected)
    policy.observation_encoder.vision_encoder.requires_grad_(False)
    adapter = make_adapter(policy)
    first, second = adapter.encode_views(batch, 1), adapter.encode_views(batch, 1)
    assert not torch.equal(first.features[TOP], second.features[TOP])
    assert torch.equal(first.tower[TOP], second.tower[TOP])
    policy.eval()
    torch.testing.assert_close(adapter.encode_views(batch, 1).tower[TOP], first.tower[TOP])


def test_target_tokens_are_the_patches_and_the_class(make: Make) -> None:
    policy, batch = make()
    adapter = make_adapter(policy)
    tokens = adapter.encode_image(adapter.build_tower(2), TOP, batch[TOP][:, -1])
    assert tokens.shape == (4, (IMAGE_SIZE // 8) ** 2 + 1, 32)
    own = policy.observation_encoder.vision_encoder(batch[TOP][:, -1]).flatten(1)
    torch.testing.assert_close(tokens[:, 0], own, rtol=1e-4, atol=1e-5)
