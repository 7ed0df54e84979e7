"""`EvaluationCallback`: success rates in simulation in the course of training, by LeRobot's own evaluation loop.

Training is the same to the bit with and without it: random streams, module modes and the trainer's schedule of log rows
are put back after every evaluation.
"""

import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
import gymnasium as gym
import numpy as np
from lerobot.envs.configs import EnvConfig, HubEnvConfig
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot.utils.random_utils import get_rng_state, set_rng_state, set_seed
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptr_hf.data.mixture.processor import for_robot, robots_of
from ptr_hf.envs import draw_without_display
from ptr_hf.envs.metaworld_config import PTRMetaworldConfig
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.report.files import beside_the_run, put_aside, replacing

EVALUATION_FILE = "ptr_evaluation.json"
DEFAULT_ENVIRONMENT = "ptr_metaworld"

type EnvironmentSource = EnvConfig | str | Mapping[str, Any]
type Environments = Mapping[str, Mapping[int, gym.vector.VectorEnv]]
type Pipelines = tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """The episodes of one task: the seed of each start, and whether it was solved."""

    task: str
    seeds: tuple[int, ...]
    solved: tuple[bool, ...]

    @property
    def success(self) -> float:
        """Solved share of the episodes, in [0, 1]."""
        return float(np.mean(self.solved))

    @property
    def standard_error(self) -> float | None:
        """Of `success`; None where one episode cannot tell."""
        episodes = len(self.solved)
        return float(np.std(self.solved, ddof=1) / math.sqrt(episodes)) if episodes > 1 else None


class EvaluationCallback(TrainerCallback):
    """Evaluates the policy in training in simulation, every `steps` optimiser steps and at the end.

    The main process alone evaluates; the others wait for it at their next step (raise `ddp_timeout` where that takes
    long). The same starts are used every time. Results go to the trainer's log, as `eval_env/success`,
    `eval_env/standard_error` and both for every task, and to `ptr_evaluation.json`, which the model card reads.

    Args:
        trainer: a `PTRTrainer`; its policy and processors are evaluated.
        environment: see `resolve_environment`.
        steps: optimiser steps between two evaluations; 0 evaluates at the end alone.
        episodes: of every task.
        batch_size: environments that advance together.
        seed: of the first start and of the policy's own draws; the default is that of `lerobot-eval`.
        must_succeed: a simulator that fails ends the training. Otherwise it is reported once, and training goes on.
        robot: of a policy that is trained on a mixture: the source, or its embodiment, that the environment has.

    Raises:
        ValueError: the environment or a number does not make sense, the robot is none of the policy's, or the model is sharded
            over processes.

    Example:
        >>> trainer.add_callback(EvaluationCallback(trainer, {"type": "ptr_metaworld", "task": "reach-left"}, steps=500))
    """

    def __init__(
        self,
        trainer: Trainer,
        environment: EnvironmentSource = DEFAULT_ENVIRONMENT,
        *,
        steps: int = 0,
        episodes: int = 10,
        batch_size: int = 10,
        seed: int = 1000,
        must_succeed: bool = False,
        robot: str | None = None,
    ) -> None:
        if steps < 0 or episodes < 1 or batch_size < 1:
            raise ValueError(
                f"An evaluation takes steps >= 0, episodes >= 1 and batch_size >= 1; got steps={steps}, "
                f"episodes={episodes}, batch_size={batch_size}."
            )
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "A policy sharded by FSDP cannot be evaluated in one process while it trains: leave the "
                "environment out and run lerobot-eval on the checkpoints."
            )
        self.trainer = trainer
        self.config = resolve_environment(environment, trainer.policy)
        self.steps, self.episodes, self.seed = steps, episodes, seed
        self.num_envs = min(batch_size, episodes)
        self.must_succeed = must_succeed
        self.pipelines = (trainer.preprocessor, trainer.postprocessor)
        known = robots_of(trainer.preprocessor)
        if robot is not None or len(known) > 1:
            if robot is None:
                raise ValueError(
                    f"The policy has several robots: say which one the environment has, of {', '.join(known)}."
                )
            self.pipelines = (for_robot(trainer.preprocessor, robot), for_robot(trainer.postprocessor, robot))
        self._environments: Environments = {}
        self._rows: list[dict[str, Any]] = []
        self._reported = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what a resumed run had measured, and build and reset the environments: what is missing shows at once."""
        if not state.is_world_process_zero:
            return
        path, rows = Path(args.output_dir) / EVALUATION_FILE, []
        if state.global_step:
            try:
                rows = read_evaluations(args.output_dir)
            except (ValueError, OSError) as error:
                put_aside(path, error)
        self._rows = [row for row in rows if row["step"] <= state.global_step]
        with beside_the_run(f"{path} of an earlier run could not be replaced"):
            if self._rows:
                write_evaluations(args.output_dir, self._rows)
            else:
                path.unlink(missing_ok=True)
        with self._forgiven(), _undisturbed(self.trainer.policy, self.seed):
            # one task is enough to see whether the simulator runs and draws; others may start their processes when they are asked
            _, env = next(_tasks(self._open()))
            env.reset(seed=self.seed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate every `steps` steps."""
        if self.steps and state.global_step % self.steps == 0:
            self._evaluate(args, state, control, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the policy that training leaves, unless that step has been evaluated, and close the environments."""
        step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = state.best_global_step or step
        if step not in {row["step"] for row in self._rows}:
            self._evaluate(args, state, control, step)
        self._close()

    def _evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, step: int) -> None:
        if not state.is_world_process_zero:
            return
        logs: dict[str, float] = {}
        with self._forgiven():
            results = self._run(progress=not args.disable_tqdm)
            self._rows += [evaluation_row(result, step, self.config.type) for result in results]
            write_evaluations(args.output_dir, self._rows)
            logs = _logged(results)
        if logs:
            # Trainer.log takes the row that is due at this step for written
            due = control.should_log
            self.trainer.log(logs)
            control.should_log = due

    def _run(self, progress: bool) -> list[TaskResult]:
        policy = self.trainer.policy
        with _undisturbed(policy, self.seed):
            return run_episodes(
                policy,
                self.pipelines,
                self._open(),
                make_env_pre_post_processors(self.config, policy.config.base_config),
                episodes=self.episodes,
                seed=self.seed,
                progress=progress,
            )

    def _open(self) -> Environments:
        if not self._environments:
            draw_without_display()
            self._environments = make_env(self.config, n_envs=self.num_envs)
        return self._environments

    def _close(self) -> None:
        for _, env in _tasks(self._environments):
            # one that has failed may fail again here, and there is nothing left to lose
            with suppress(Exception):
                env.close()
        self._environments = {}

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """An evaluation that fails is reported the first time; the next one starts from new environments."""
        try:
            yield
        except Exception as error:
            self._close()
            if self.must_succeed:
                raise
            if not self._reported:
                self._reported = True
                kind = self.config.type
                logger.error(
                    f"The evaluation in '{kind}' failed ({type(error).__name__}: {error}), so its results are missing; "
                    "training goes on, and later evaluations try again without another message. Check the environment's "
                    "installation (to draw without a display: MUJOCO_GL=egl or osmesa, and its library), its task and that it "
                    "shows what the policy observes, then evaluate the checkpoints with "
                    f"`lerobot-eval --policy.path=<folder> --env.type={kind}`. must_succeed=True stops the training instead."
                )
                logger.debug("The evaluation in '%s' failed", kind, exc_info=error)


def resolve_environment(source: EnvironmentSource, policy: PTRPolicy) -> EnvConfig:
    """The configuration that an environment argument stands for.

    Args:
        source: LeRobot's configuration of an environment, its type, or a mapping with its type and settings, such as
            `{"type": "ptr_metaworld", "task": "reach-left,push-right"}`.
        policy: what it observes decides between the tracks of `ptr_metaworld` where none is named.

    Raises:
        ValueError: there is no such environment or setting, or it would run code from the Hub.
    """
    if isinstance(source, EnvConfig):
        config = source
    else:
        register_third_party_plugins()
        settings = {"type": source} if isinstance(source, str) else dict(source)
        if settings.get("type") == EnvConfig.get_choice_name(PTRMetaworldConfig):
            settings.setdefault("track", "pixels" if policy.config.base_config.image_features else "state")
        try:
            config = draccus.decode(EnvConfig, settings)
        except draccus.ParsingError as error:
            raise ValueError(
                f"{source!r} is no environment of LeRobot: {error}. Give an EnvConfig, or type and settings of one of "
                f"{', '.join(sorted(EnvConfig.get_known_choices()))}."
            ) from error
    if isinstance(config, HubEnvConfig) and config.hub_path:
        raise ValueError(
            f"The environment '{config.type}' would run code from the Hub, which ptr_hf does not do in training: evaluate "
            "the checkpoints with lerobot-eval."
        )
    return config


def run_episodes(
    policy: PTRPolicy,
    pipelines: Pipelines,
    environments: Environments,
    environment_pipelines: Pipelines,
    *,
    episodes: int,
    seed: int,
    progress: bool = True,
) -> list[TaskResult]:
    """Roll a policy out `episodes` times in every task by LeRobot's `eval_policy`.

    Args:
        policy: the policy; its modes and the random streams are the caller's to put back.
        pipelines: the policy's pre- and postprocessor.
        environments: vector environments by suite and task, as `make_env` builds them.
        environment_pipelines: as `make_env_pre_post_processors` makes them.
        episodes: of every task.
        seed: of the first start; the others follow it.
        progress: show a bar over the episodes.
    """
    tasks = list(_tasks(environments))
    results = []
    with tqdm(total=episodes * len(tasks), desc="evaluation", unit="episode", leave=False, disable=not progress) as bar:
        for task, env in tasks:
            # LeRobot's own bars, one a rollout, would fill the screen; its errors are raised, not printed
            with redirect_stderr(io.StringIO()):
                found = eval_policy(
                    env, policy, *environment_pipelines, *pipelines, n_episodes=episodes, start_seed=seed
                )["per_episode"]
            seeds = tuple(int(episode["seed"]) for episode in found)
            results.append(TaskResult(task, seeds, tuple(bool(episode["success"]) for episode in found)))
            bar.update(len(found))
            bar.set_postfix(success=f"{np.mean([result.success for result in results]):.1%}")
    return results


def evaluation_row(result: TaskResult, step: int, environment: str) -> dict[str, Any]:
    """A row of `ptr_evaluation.json`.

    Args:
        result: of one task.
        step: of training, at which the policy was evaluated.
        environment: its name.
    """
    return {
        "step": step,
        "environment": environment,
        "task": result.task,
        "episodes": len(result.solved),
        "success": result.success,
        "standard_error": result.standard_error,
        "seeds": list(result.seeds),
        "lerobot": version("lerobot"),
    }


def write_evaluations(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a run's `ptr_evaluation.json`, which the model card reads, from its `evaluation_row`s."""
    with replacing(Path(folder) / EVALUATION_FILE) as temporary:
        temporary.write_text(json.dumps(list(rows), indent=1) + "\n")


def read_evaluations(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `ptr_evaluation.json`, one a task and evaluation; none where nothing was evaluated.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / EVALUATION_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and type(row.get("step")) is int for row in rows
        ):
            raise ValueError("it is no list of evaluations, each with its step")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or restore it from a backup.") from error
    return rows


def _tasks(environments: Environments) -> Iterator[tuple[str, gym.vector.VectorEnv]]:
    """Every task's name, the suite's where it has one task alone, with its environments."""
    for suite, group in environments.items():
        for number, env in group.items():
            yield (suite if len(group) == 1 else f"{suite}/{number}"), env


def _logged(results: Sequence[TaskResult]) -> dict[str, float]:
    """Success and standard error over all tasks, which count alike, and of each."""
    logs = {"eval_env/success": float(np.mean([result.success for result in results]))}
    errors = [result.standard_error for result in results if result.standard_error is not None]
    if len(errors) == len(results):
        logs["eval_env/standard_error"] = float(np.linalg.norm(errors) / len(errors))
    for result in results:
        logs[f"eval_env/{result.task}/success"] = result.success
        if result.standard_error is not None:
            logs[f"eval_env/{result.task}/standard_error"] = result.standard_error
    return logs


@contextmanager
def _undisturbed(policy: PTRPolicy, seed: int) -> Iterator[None]:
    """Seed all random streams; afterwards they, every module's mode and the policy's memory of episodes are as before."""
    modes = [(module, module.training) for module in policy.modules()]
    streams = get_rng_state()
    try:
        set_seed(seed)
        yield
    finally:
        policy.reset()
        for module, mode in modes:
            module.training = mode
        set_rng_state(streams)
