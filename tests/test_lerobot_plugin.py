"""LeRobot's own code on checkpoints of `PTRTrainer`: rollouts, `lerobot-train`, and its async inference server.

`lerobot-eval` as a command, from a hub, is in tests/hub/test_lerobot_eval.py.
"""

import os

os.environ.setdefault("MUJOCO_GL", "egl")

import io
import json
import logging
import pickle
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from demonstrations import write_dataset
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.envs.factory import make_env, make_env_config, make_env_pre_post_processors
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.scripts import lerobot_train
from lerobot.scripts.lerobot_eval import rollout
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR
from lerobot.utils.import_utils import register_third_party_plugins
from small_policies import CHUNK, save_alone, tensors_equal, vlm_folder
from torch import Tensor

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.policies.tiny import tiny_smolvla

BIN = Path(sys.executable).parent
FRONT = "observation.images.front"
SEEDS = (3, 4)
register_third_party_plugins()  # as LeRobot's commands do before they read their arguments


def trained(folder: Path, root: Path, tokens: int, steps: int = 1) -> Path:
    """A checkpoint that `PTRTrainer` saved after a step or two."""
    args = PTRTrainingArguments(
        preset="ptr",
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        segment_length=2,
        queue_size=32,
        queue_negatives=8,
        scorer_warmup_steps=1,
        num_belief_tokens=tokens,
    )
    features = LeRobotDatasetMetadata(root.name, root=root).features
    trainer = PTRTrainer(tiny_smolvla(features, vlm_folder(), chunk_size=CHUNK, num_steps=2), args, root)
    trainer.train()
    save_alone(trainer)
    return folder


@pytest.fixture(scope="module")
def with_belief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """M = 2, on the bundled demonstrations."""
    return trained(tmp_path_factory.mktemp("checkpoints") / "belief", bundled_demonstrations("heldout"), tokens=2)


@pytest.fixture(scope="module")
def front_camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset whose camera is named as LeRobot names a robot's."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "front", (30, 24), cameras=(FRONT,))


@pytest.fixture(scope="module")
def of_robot(front_camera: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """M = 2, on `front_camera`."""
    return trained(tmp_path_factory.mktemp("checkpoints") / "robot", front_camera, tokens=2, steps=2)


def policy_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["type"]


class Rollouts:
    """LeRobot's rollout of a checkpoint, the flow's noise given by chunk and start instead of drawn for a batch."""

    def __init__(self, folder: Path) -> None:
        self.policy = PTRPolicy.from_pretrained(folder)
        self.pipelines = make_pre_post_processors(self.policy.config.base_config, pretrained_path=str(folder))
        self.config = make_env_config("ptr_metaworld", task="reach-left", track="pixels", episode_length=3 * CHUNK)
        self.policy.base.model.sample_noise = self.noise  # type: ignore[assignment]

    def noise(self, shape: tuple[int, ...], device: Any) -> Tensor:
        self.chunk += 1
        streams = [torch.Generator().manual_seed(100 * seed + self.chunk) for seed in self.seeds]
        return torch.stack([torch.randn(shape[1:], generator=stream) for stream in streams])

    def actions(self, *seeds: int) -> Tensor:
        """(starts, steps, action) of the starts, in one batch of environments."""
        self.seeds, self.chunk = seeds, 0
        env = make_env(self.config, n_envs=len(seeds))["reach-left"][0]
        environment = make_env_pre_post_processors(self.config, self.policy.config.base_config)
        found = rollout(env, self.policy, *environment, *self.pipelines, seeds=list(seeds))["action"]
        env.close()
        assert self.chunk == 3
        return found


class TestBelief:
    @pytest.fixture(scope="class")
    def rollouts(self, with_belief: Path) -> Rollouts:
        rollouts = Rollouts(with_belief)
        # a belief after one step hardly moves the actions; this makes what it does larger than rounding
        with torch.no_grad():
            for parameter in rollouts.policy.belief.parameters():
                parameter.mul_(3.0)
        return rollouts

    @pytest.mark.full
    def test_a_batch_of_environments_acts_as_each_alone(self, rollouts: Rollouts) -> None:
        together = rollouts.actions(*SEEDS)
        for row, seed in enumerate(SEEDS):
            torch.testing.assert_close(together[row], rollouts.actions(seed)[0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(together[0], together[1], atol=1e-2)

    def test_it_is_carried_between_chunks(self, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
        carried, policy = rollouts.actions(SEEDS[0]), rollouts.policy
        predict = policy.predict_action_chunk

        def without_memory(batch: dict[str, Any], **kwargs: Any) -> Tensor:
            policy._belief_tokens = None
            return predict(batch, **kwargs)

        monkeypatch.setattr(policy, "predict_action_chunk", without_memory)
        forgotten = rollouts.actions(SEEDS[0])
        assert torch.equal(carried[:, :CHUNK], forgotten[:, :CHUNK])
        assert (carried - forgotten)[:, CHUNK:].abs().max() > 1e-3

    @pytest.mark.full
    def test_it_is_forgotten_with_the_episode(self, rollouts: Rollouts) -> None:
        first = rollouts.actions(SEEDS[0])
        rollouts.actions(SEEDS[1])
        assert rollouts.policy._belief_tokens is not None
        assert torch.equal(rollouts.actions(SEEDS[0]), first)


@pytest.mark.full
def test_lerobot_train_continues_a_checkpoint_under_ptr(of_robot: Path, front_camera: Path, tmp_path: Path) -> None:
    output, log, argv, handlers = tmp_path / "run", io.StringIO(), sys.argv, logging.getLogger().handlers[:]
    before = PTRPolicy.from_pretrained(of_robot)
    try:
        sys.argv = [
            str(BIN / "lerobot-train"),
            f"--policy.path={of_robot}",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
            "--dataset.repo_id=tests/points",
            f"--dataset.root={front_camera}",
            f"--output_dir={output}",
            *("--steps=2", "--save_freq=2", "--log_freq=1", "--batch_size=2", "--num_workers=0", "--env_eval_freq=0"),
        ]
        with redirect_stdout(log), redirect_stderr(log):
            lerobot_train.main()
    finally:
        sys.argv = argv
        logging.getLogger().handlers[:] = handlers
    assert "weight_mean" in log.getvalue()
    folder = output / CHECKPOINTS_DIR / "000002" / PRETRAINED_MODEL_DIR
    assert policy_type(folder) == "ptr"
    after = PTRPolicy.from_pretrained(folder)
    assert before.objective.step == 2
    assert after.objective.step == 4
    assert len(after.objective.queue) > len(before.objective.queue)
    for part in ("base", "belief", "objective"):
        old, new = (policy.get_submodule(part).state_dict() for policy in (before, after))
        assert old.keys() == new.keys()
        assert not tensors_equal(old, new)


@pytest.fixture
def policy_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """LeRobot's policy server on loopback, and a stub connected to it; `ptr` is added to the types that it serves."""
    monkeypatch.chdir(tmp_path)  # importing the server starts a log file in the working directory
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.constants import SUPPORTED_POLICIES
    from lerobot.async_inference.policy_server import PolicyServer

    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    monkeypatch.setattr(f"{PolicyServer.__module__}.SUPPORTED_POLICIES", [*SUPPORTED_POLICIES, "ptr"])
    policy_server = PolicyServer(PolicyServerConfig(fps=1000, inference_latency=0.0))
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(policy_server, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield policy_server, services_pb2_grpc.AsyncInferenceStub(channel)
    server.stop(None).wait()


def test_async_inference_loads_and_carries_the_belief(of_robot: Path, policy_server: tuple[Any, Any]) -> None:
    """What LeRobot's robot client sends, in its own encoding; the answers are those of the policy itself."""
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation, raw_observation_to_observation

    server, stub = policy_server
    names = ["x", "y", "frame", "episode"]
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": names},
        FRONT: {"dtype": "video", "shape": (48, 48, 3), "names": ["height", "width", "channels"]},
    }
    stub.Ready(services_pb2.Empty())
    specification = RemotePolicyConfig("ptr", str(of_robot), features, actions_per_chunk=CHUNK)
    stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(specification)))
    assert isinstance(server.policy, PTRPolicy)

    random = np.random.default_rng(0)
    observations = [
        {name: float(random.uniform()) for name in names}
        | {"front": random.integers(0, 255, (48, 48, 3), dtype=np.uint8), "task": "reach the goal"}
        for _ in range(2)
    ]
    answers = []
    torch.manual_seed(5)
    for step, observation in enumerate(observations):
        sent = pickle.dumps(TimedObservation(float(step), CHUNK * step, dict(observation), must_go=True))
        stub.SendObservations(send_bytes_in_chunks(sent, services_pb2.Observation, silent=True))
        answers.append(pickle.loads(stub.GetActions(services_pb2.Empty()).data))
    assert [action.get_timestep() for action in answers[1]] == list(range(CHUNK, 2 * CHUNK))

    policy = get_policy_class("ptr").from_pretrained(of_robot)
    assert isinstance(policy, PTRPolicy)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(of_robot))
    torch.manual_seed(5)
    for observation, answer in zip(observations, answers, strict=True):
        batch = preprocessor(raw_observation_to_observation(observation, features, policy.config.image_features))
        expected = postprocessor(policy.predict_action_chunk(batch)[0])
        torch.testing.assert_close(torch.stack([action.get_action() for action in answer]), expected)
    torch.testing.assert_close(server.policy._belief_tokens, policy._belief_tokens)
