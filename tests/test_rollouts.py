"""Evaluation in this process gives what LeRobot's own loop gives, repeatably, and keeps the rows a belief needs."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.factory import make_env, make_env_config, make_env_pre_post_processors
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy
from lerobot.utils.import_utils import register_third_party_plugins
from torch import Tensor

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.envs import metaworld_tasks
from ptr_hf.envs.metaworld_tasks import BenchmarkScene, Track, task_instruction
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.training.rollouts import Rollouts, evaluate_success, shared_scene

CHUNK = 6
TASKS = ("reach-left", "reach-right")
register_third_party_plugins()  # as lerobot-eval does before it reads its arguments
Pipelines = tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]


class ReachRight(PreTrainedPolicy):
    """Moves the hand towards the goal in the state, which is the right one, a constant chunk at a time."""

    config_class = ACTConfig
    name = "reach_right"

    def __init__(self) -> None:
        super().__init__(ACTConfig(chunk_size=CHUNK, n_action_steps=CHUNK, device="cpu"))
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.batches: list[int] = []
        self.reset()

    def reset(self) -> None:
        self.queue: deque[Tensor] = deque()

    def get_optim_params(self) -> dict[str, Any]:
        return {"params": self.parameters()}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return self.weight.sum(), None

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        state = batch["observation.state"]
        self.batches.append(len(state))
        move = (10.0 * (state[:, 36:] - state[:, :3])).clamp(-1.0, 1.0)
        action = torch.cat([move, torch.zeros(len(state), 1)], 1) * self.weight
        return action[:, None].expand(-1, CHUNK, -1)

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        if not self.queue:
            self.queue.extend(self.predict_action_chunk(batch).transpose(0, 1))
        return self.queue.popleft()


def untouched() -> Pipelines:
    return PolicyProcessorPipeline(steps=[]), PolicyProcessorPipeline(steps=[], to_transition=_as_is, to_output=_as_is)


def _as_is(value: Any) -> Any:
    return value


def features(track: Track) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (39 if track == "state" else 4,))}
    if track == "pixels":
        inputs["observation.image"] = PolicyFeature(FeatureType.VISUAL, (3, 84, 84))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (4,))}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [task_instruction(task) for task in TASKS]
    sizes = {"image_size": 32, "patch_size": 8, "vision_dim": 32, "text_dim": 32, "text_layers": 2}
    return write_tiny_vlm(tmp_path_factory.mktemp("vlm"), texts=texts, **sizes)


def small_policy(vlm: Path, track: Track = "state") -> tuple[PreTrainedPolicy, Pipelines]:
    policy = tiny_smolvla(features(track), vlm, chunk_size=CHUNK, num_steps=2)
    return policy, make_pre_post_processors(policy.config)


def evaluate(policy: PreTrainedPolicy, pipelines: Pipelines, **settings: Any) -> Rollouts:
    defaults = {"tasks": TASKS, "track": "state", "seeds": (3, 4, 5), "progress": False}
    return evaluate_success(policy, *pipelines, **{**defaults, **settings})


@pytest.mark.full
def test_success_is_that_of_lerobots_own_loop() -> None:
    policy = ReachRight()
    ours = evaluate(policy, untouched())
    assert ours.by_task == {"reach-left": 0.0, "reach-right": 1.0}
    assert ours.mean == 0.5
    config = make_env_config("ptr_metaworld", task="reach-left,reach-right", episode_length=150)
    envs = make_env(config, n_envs=3)
    assert list(envs) == list(TASKS)
    environment = make_env_pre_post_processors(config, policy.config)
    for task, success, steps in zip(TASKS, ours.success, ours.steps, strict=True):
        theirs = eval_policy(envs[task][0], policy, *environment, *untouched(), n_episodes=3, start_seed=3)
        assert [episode["success"] for episode in theirs["per_episode"]] == success.tolist()
        assert [episode["seed"] for episode in theirs["per_episode"]] == list(ours.seeds)
        assert (steps == 150).all() != success.all()


def test_actions_are_those_of_lerobots_own_loop(vlm: Path) -> None:
    """A policy that draws: same seed and batch, hence the same draws and the same states at the end."""
    policy, pipelines = small_policy(vlm)
    evaluate(policy, pipelines, tasks=("reach-left",), max_steps=2 * CHUNK, seed=11)
    ours = shared_scene("reach-left", "state").agent_pos  # of the last start
    config = make_env_config("ptr_metaworld", task="reach-left", episode_length=2 * CHUNK)
    env = make_env(config, n_envs=3)["reach-left"][0]
    environment = make_env_pre_post_processors(config, policy.config)
    torch.manual_seed(11)
    eval_policy(env, policy, *environment, *pipelines, n_episodes=3, start_seed=3)
    np.testing.assert_allclose(env.envs[-1].unwrapped.agent_pos, ours, atol=1e-6)


def test_results_repeat_and_leave_the_global_random_state_alone(vlm: Path) -> None:
    policy, pipelines = small_policy(vlm)
    policy.train()
    before = torch.get_rng_state()
    results = [evaluate(policy, pipelines, max_steps=40, seed=seed) for seed in (0, 0)]
    assert torch.equal(before, torch.get_rng_state())
    assert policy.training
    assert results[0].success.tolist() == results[1].success.tolist()
    assert (results[0].steps == 40).all()
    assert results[0].steps.shape == (2, 3)


def test_finished_episodes_leave_the_batch_unless_the_policy_may_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ReachRight()
    evaluate(policy, untouched(), max_steps=60)
    assert policy.batches[-1] == 3, "the right ones are done; reach-left goes on"
    monkeypatch.setattr("ptr_hf.training.rollouts.STATELESS", ())
    policy.batches.clear()
    evaluate(policy, untouched(), max_steps=60)
    assert set(policy.batches) == {6}
    policy.batches.clear()
    evaluate(policy, untouched(), max_steps=6, batch_size=4)
    assert policy.batches == [4, 2]


def test_a_belief_is_carried_while_episodes_end_one_by_one(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pipelines = small_policy(vlm)
    policy = PTRPolicy(PTRConfig(device="cpu", preset="ptr", num_belief_tokens=2), base_policy=base)
    monkeypatch.setitem(metaworld_tasks.RADIUS, "reach", 0.28)  # so near that some starts end at once, others later
    result = evaluate(policy, pipelines, max_steps=60)
    assert len(np.unique(result.steps)) > 2
    assert policy._belief_tokens is not None
    assert len(policy._belief_tokens) == 6


def test_pixels(vlm: Path) -> None:
    policy, pipelines = small_policy(vlm, "pixels")
    result = evaluate(policy, pipelines, track="pixels", seeds=(1,), max_steps=8)
    assert (result.steps == 8).all()
    scene = shared_scene("reach-left", "pixels")
    assert scene.observation()["pixels"].shape == (84, 84, 3)
    scene.close()


def test_fewer_steps_of_a_chunk_can_be_executed() -> None:
    policy = ReachRight()
    evaluate(policy, untouched(), tasks=("reach-left",), max_steps=12, n_action_steps=2)
    assert len(policy.batches) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "one start seed"),
        ({"n_action_steps": 7}, "between 1 and the policy's chunk of 6"),
        ({"tasks": ("juggle-v3",)}, "no task 'juggle-v3'"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(ReachRight(), untouched(), **settings)


def test_policies_that_do_not_act_chunk_by_chunk_are_refused() -> None:
    policy = ReachRight()
    policy.config.temporal_ensemble_coeff = 0.01
    with pytest.raises(ValueError, match="lerobot-eval"):
        evaluate(policy, untouched())


def test_the_environment_of_the_plugin() -> None:
    config = make_env_config("ptr_metaworld", task="push-left", track="pixels", episode_length=2)
    assert config.features["pixels"].shape == (84, 84, 3)
    scene = BenchmarkScene("push-left", **config.gym_kwargs)
    observation, _ = scene.reset(seed=1)
    assert scene.observation_space.contains(observation)
    assert scene.task_description == task_instruction("push-left")
    scene.step(np.zeros(4, np.float32))
    _, reward, terminated, truncated, info = scene.step(np.zeros(4, np.float32))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["final_info"] == {"task": "push-left", "is_success": False}
    scene.close()
    with pytest.raises(ValueError, match="names no task"):
        make_env(make_env_config("ptr_metaworld", task=" , "))
