"""Evaluation in simulation during training: it changes nothing, measures what LeRobot measures, and may fail."""

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config, make_env_pre_post_processors
from lerobot.policies.factory import make_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy
from lerobot.utils.random_utils import set_seed
from small_policies import tensors_equal
from transformers import TrainerControl, TrainerState

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.envs import metaworld_tasks
from ptr_hf.envs.metaworld_config import PTRMetaworldConfig
from ptr_hf.envs.metaworld_tasks import task_instruction
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.training.evaluation import (
    EVALUATION_FILE,
    EnvironmentSource,
    EvaluationCallback,
    TaskResult,
    _undisturbed,
    read_evaluations,
    resolve_environment,
)

TASKS = ("reach-left", "reach-right")
ENVIRONMENT = {"type": "ptr_metaworld", "task": ",".join(TASKS), "episode_length": 20}
CHUNK, EPISODES, SEED = 6, 3, 40
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (39,), "names": None},
    "action": {"dtype": "float32", "shape": (4,), "names": None},
}


class BrokenEnv(gym.Env):
    """Starts an episode, and loses its simulator at the third step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012  gymnasium's name
    observation_space = gym.spaces.Dict({"agent_pos": gym.spaces.Box(-1.0, 1.0, (39,), np.float32)})
    action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    task_description, task, _max_episode_steps = "break", "break", 10
    steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self.steps = 0
        return {"agent_pos": np.zeros(39, np.float32)}, {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict]:
        np.random.rand()
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("the simulator is gone")
        return {"agent_pos": np.zeros(39, np.float32)}, 0.0, False, False, {}


@EnvConfig.register_subclass("broken_for_tests")
@dataclass
class BrokenConfig(EnvConfig):
    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        return {"broken": {0: gym.vector.SyncVectorEnv([BrokenEnv] * n_envs)}}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dataset of states and actions, without cameras, such as the state track records."""
    root = tmp_path_factory.mktemp("datasets") / "states"
    dataset = LeRobotDataset.create("tests/states", 80, FEATURES, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for episode in range(2):
        for _ in range(30):
            frame = {key: random.normal(size=item["shape"]).astype(np.float32) for key, item in FEATURES.items()}
            dataset.add_frame({**frame, "task": task_instruction(TASKS[episode])})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"image_size": 32, "patch_size": 8, "vision_dim": 32, "text_dim": 32, "text_layers": 2}
    return write_tiny_vlm(tmp_path_factory.mktemp("vlm"), texts=map(task_instruction, TASKS), **sizes)


@pytest.fixture(autouse=True)
def wide_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goals so wide that an untrained policy reaches some of them."""
    monkeypatch.setitem(metaworld_tasks.RADIUS, "reach", 0.25)


def new_trainer(
    folder: Path, states: Path, vlm: Path, environment: EnvironmentSource | None = None, **settings: Any
) -> PTRTrainer:
    """Four steps with belief and scorer, evaluated at the second and the last one."""
    args = PTRTrainingArguments(
        output_dir=str(folder),
        preset="ptr",
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        segment_length=2,
        num_belief_tokens=2,
        queue_size=64,
        queue_negatives=8,
        scorer_warmup_steps=1,
    )
    base = tiny_smolvla(
        {**FEATURES}, vlm, chunk_size=CHUNK, num_steps=2, expert_width_multiplier=1.0, tokenizer_max_length=32
    )
    torch.manual_seed(0)
    trainer = PTRTrainer(base, args, states)
    if environment is not None:
        settings = {"steps": 2, "episodes": EPISODES, "batch_size": 2, "seed": SEED, **settings}
        trainer.add_callback(EvaluationCallback(trainer, environment, **settings))
    return trainer


def training_rows(trainer: PTRTrainer) -> list[dict[str, Any]]:
    """The log without evaluations and times."""
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    rows = [{name: value for name, value in row.items() if name not in timed} for row in trainer.state.log_history]
    return [row for row in rows if not any(name.startswith("eval_env") for name in row)]


@pytest.fixture(scope="module")
def untrained(states: Path, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
    return new_trainer(tmp_path_factory.mktemp("runs") / "untrained", states, vlm)


@pytest.fixture(scope="module")
def undisturbed(states: Path, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
    trainer = new_trainer(tmp_path_factory.mktemp("runs") / "alone", states, vlm)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def evaluated(states: Path, vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(metaworld_tasks.RADIUS, "reach", 0.25)
        trainer = new_trainer(tmp_path_factory.mktemp("runs") / "evaluated", states, vlm, ENVIRONMENT)
        trainer.train()
    return trainer


@pytest.mark.full
def test_training_is_the_same_to_the_bit(undisturbed: PTRTrainer, evaluated: PTRTrainer) -> None:
    assert tensors_equal(undisturbed.policy.state_dict(), evaluated.policy.state_dict())
    rows = training_rows(undisturbed)
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert json.dumps(rows) == json.dumps(training_rows(evaluated))


@pytest.mark.full
def test_results_are_those_of_lerobots_own_loop(evaluated: PTRTrainer) -> None:
    """The checkpoint that training left, loaded and evaluated by hand on the same starts."""
    folder = Path(evaluated.args.output_dir)
    evaluated.save_model()
    rows = read_evaluations(folder)
    assert [(row["step"], row["task"]) for row in rows] == [(step, task) for step in (2, 4) for task in TASKS]
    policy = PTRPolicy.from_pretrained(folder)
    pipelines = make_pre_post_processors(policy.config.base_config, pretrained_path=str(folder))
    config = make_env_config("ptr_metaworld", task=ENVIRONMENT["task"], episode_length=20)
    environment = make_env_pre_post_processors(config, policy.config)
    envs = make_env(config, n_envs=2)
    set_seed(SEED)
    for row in rows[2:]:
        found = eval_policy(
            envs[row["task"]][0], policy, *environment, *pipelines, n_episodes=EPISODES, start_seed=SEED
        )
        solved = [episode["success"] for episode in found["per_episode"]]
        assert row["seeds"] == [episode["seed"] for episode in found["per_episode"]] == [40, 41, 42]
        assert row["success"] == pytest.approx(np.mean(solved))
        assert row["standard_error"] == pytest.approx(np.std(solved, ddof=1) / np.sqrt(EPISODES))
        assert (row["episodes"], row["environment"]) == (EPISODES, "ptr_metaworld")
        assert row["lerobot"] == version("lerobot")
    assert any(0.0 < row["success"] < 1.0 for row in rows)


def test_the_log_has_every_task_and_all_together(evaluated: PTRTrainer) -> None:
    rows = read_evaluations(evaluated.args.output_dir)
    logged = [row for row in evaluated.state.log_history if "eval_env/success" in row]
    assert [row["step"] for row in logged] == [2, 4]
    of_end = rows[2:]
    assert logged[1]["eval_env/success"] == pytest.approx(np.mean([row["success"] for row in of_end]))
    errors = [row["standard_error"] for row in of_end]
    assert logged[1]["eval_env/standard_error"] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 2)
    for row in of_end:
        assert logged[1][f"eval_env/{row['task']}/success"] == row["success"]


@pytest.mark.full
def test_a_resumed_run_keeps_what_was_measured_before(
    evaluated: PTRTrainer, states: Path, vlm: Path, tmp_path: Path
) -> None:
    folder = Path(evaluated.args.output_dir)
    before = read_evaluations(folder)
    before[0]["success"] = 0.125  # a mark that only the file carries
    (tmp_path / EVALUATION_FILE).write_text(json.dumps(before))
    again = new_trainer(tmp_path, states, vlm, ENVIRONMENT)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert read_evaluations(tmp_path) == before
    assert tensors_equal(again.policy.state_dict(), evaluated.policy.state_dict())


@pytest.mark.full
def test_a_simulator_that_fails_is_reported_once_and_costs_nothing(
    undisturbed: PTRTrainer, states: Path, vlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / EVALUATION_FILE).write_text('[{"step": 9, "task": "of a run before"}]')
    trainer = new_trainer(tmp_path, states, vlm, "broken_for_tests")
    with caplog.at_level(logging.ERROR, logger="ptr_hf.training.evaluation"):
        trainer.train()
    assert tensors_equal(undisturbed.policy.state_dict(), trainer.policy.state_dict())
    assert json.dumps(training_rows(undisturbed)) == json.dumps(training_rows(trainer))
    (record,) = [item for item in caplog.records if item.name == "ptr_hf.training.evaluation"]
    assert "RuntimeError: the simulator is gone" in record.getMessage()
    assert "lerobot-eval" in record.getMessage()
    assert read_evaluations(tmp_path) == []


@pytest.mark.full
def test_a_simulator_that_fails_ends_the_training_where_that_was_asked(states: Path, vlm: Path, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, states, vlm, BrokenConfig(), must_succeed=True)
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_modes_and_random_streams_come_back_whatever_happens(untrained: PTRTrainer) -> None:
    policy = untrained.policy.train()
    frozen = next(policy.base.children()).eval()
    modes = [module.training for module in policy.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()

    def evaluate() -> float:
        with _undisturbed(policy, seed=7):
            policy.eval()
            drawn = float(torch.rand(()) + np.random.rand())
            if drawn > 0:
                raise RuntimeError(drawn)
        return drawn

    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            evaluate()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert [module.training for module in policy.modules()] == modes
    assert not frozen.training
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_the_main_process_alone_evaluates(untrained: PTRTrainer, tmp_path: Path) -> None:
    args = replace(untrained.args, output_dir=str(tmp_path))
    callback = EvaluationCallback(untrained, "broken_for_tests", steps=2, must_succeed=True)
    rows = len(untrained.state.log_history)
    for main in (False, True):
        state = TrainerState(global_step=2, is_world_process_zero=main)
        with pytest.raises(RuntimeError, match="simulator is gone") if main else nullcontext():
            callback.on_step_end(args, state, TrainerControl())
    assert len(untrained.state.log_history) == rows


def test_one_episode_has_no_standard_error() -> None:
    assert TaskResult("reach-left", (1,), (True,)).standard_error is None
    assert TaskResult("reach-left", (1, 2), (True, False)).standard_error == pytest.approx(0.5)


def test_the_default_environment_shows_what_the_policy_observes(untrained: PTRTrainer) -> None:
    found = resolve_environment("ptr_metaworld", untrained.policy)
    assert isinstance(found, PTRMetaworldConfig)
    assert found.track == "state"
    given = PTRMetaworldConfig(track="pixels")
    assert resolve_environment(given, untrained.policy) is given


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("moon_base", r"no environment of LeRobot.*one of .*ptr_metaworld"),
        ({"task": "reach-left"}, "type"),
        ({"type": "ptr_metaworld", "tusk": "reach-left"}, "tusk"),
        ({"type": "ptr_metaworld", "track": "sound"}, "track"),
        ({"type": "isaaclab_arena", "hub_path": "lab/arena"}, "code from the Hub"),
    ],
)
def test_wrong_environments(untrained: PTRTrainer, source: EnvironmentSource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_environment(source, untrained.policy)


def test_wrong_numbers(untrained: PTRTrainer) -> None:
    with pytest.raises(ValueError, match="episodes=0"):
        EvaluationCallback(untrained, episodes=0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / EVALUATION_FILE).write_text('[{"step": ')
    with pytest.raises(ValueError, match=r"ptr_evaluation.json is damaged"):
        read_evaluations(tmp_path)
