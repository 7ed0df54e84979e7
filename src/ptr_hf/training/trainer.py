"""`PTRTrainer`: transformers' Trainer around a `PTRPolicy`.

The algorithm is `compute_loss`: per-chunk losses and weights come from the policy's one forward, the objective of Eq. 32 is
put together here, and after every optimiser step the policy moves its moving average, queue and controller.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ptr_hf.artifacts.checkpoint import widest_vector
from ptr_hf.artifacts.checks import read_config
from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
from ptr_hf.data.in_memory import collate_segments
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture, MixtureSampler
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.processor import for_robot
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.data.screening import FINE, Screen, leave_out
from ptr_hf.data.segments import is_rows
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.processor_ptr import keep_statistics, preprocess
from ptr_hf.report import DYNAMICS_COLUMNS
from ptr_hf.report.console import PlainConsole
from ptr_hf.scores import weighed_loss, weight_metrics
from ptr_hf.scoring.given_weights import INSPECTION_FOLDER, other_weights, training_weights
from ptr_hf.training.arguments import PTRTrainingArguments
from ptr_hf.training.data_sources import (
    DataSource,
    Metadata,
    TrainingSet,
    described,
    episode_table,
    open_data,
    read_metadata,
)
from ptr_hf.training.evaluation import EnvironmentSource, EvaluationCallback
from ptr_hf.training.global_batches import has_batch_statistics, instructions_of, repeated_rows
from ptr_hf.training.guarded_trainer import GuardedTrainer
from ptr_hf.training.launch import check_launch, check_same_everywhere, run_facts
from ptr_hf.training.metrics import MetricsWindow
from ptr_hf.training.nonfinite import BadFrame
from ptr_hf.training.plan import RunPlan
from ptr_hf.training.policy_sources import ModelSource, resolve_policy
from ptr_hf.training.processors import checked_preprocessor, observation_renames, policy_processors
from ptr_hf.training.reporting import check_reporting
from ptr_hf.training.seeding import seeded
from ptr_hf.training.sharding import prepare_sharding, share_weights

logger = logging.getLogger(__name__)


class PTRTrainer(GuardedTrainer):
    """Post-train a LeRobot policy with Posterior-Transition Reweighting.

    Args:
        model: a Hub id or folder (of a LeRobot policy or of a PTR checkpoint), a LeRobot policy, the `PeftModel` around one,
            a `PTRPolicy`, or a LeRobot policy configuration, which starts from random weights.
        args: training arguments and hyperparameters. A `PTRPolicy` (or a PTR checkpoint) keeps its own hyperparameters.
        train_dataset: a Hub id, a folder, or a LeRobotDataset, which is read at the segment layout whatever it was opened with;
            or a mixture of several: a list of them, a `MixtureConfig`, its dict or its YAML file (docs/mixtures.md).
        eval_dataset: likewise, or None; for a mixture, one of the same robots in the same order.
        peft_config: trains a PEFT adapter in place of the policy's weights; `args.use_peft` with the policy's own target
            modules does so too.
        eval_env: a LeRobot environment (its type, a dict with `type`, or its configuration) in which the policy is evaluated in
            the course of training; by default `args.eval_env`, or none.
        preprocessor: a LeRobot pipeline; by default the policy's own, with the statistics that `args.statistics` says
            (docs/statistics.md).
        postprocessor: likewise.
        callbacks: more of transformers' callbacks.
        optimizers: optimiser and schedule, as for `transformers.Trainer`; by default AdamW and `args.lr_scheduler_type`.

    Raises:
        ValueError: before any training time is spent, for an unsupported policy, a dataset that holds nothing to learn from,
            a missing camera, or a launch that would train something else (`ptr_hf.training.launch`).

    Example:
        >>> trainer = PTRTrainer("lerobot/smolvla_base", PTRTrainingArguments(output_dir="out"), "me/my_demos")
        >>> trainer.train()
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: ModelSource,
        args: PTRTrainingArguments | None = None,
        train_dataset: DataSource | None = None,
        eval_dataset: DataSource | None = None,
        *,
        peft_config: PeftConfig | None = None,
        eval_env: EnvironmentSource | None = None,
        preprocessor: PolicyProcessorPipeline | None = None,
        postprocessor: PolicyProcessorPipeline | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = args or PTRTrainingArguments(output_dir="ptr_output")
        check_launch(args)
        check_reporting(args)
        if args.device.type == "cpu":
            # there is no accelerator to pin memory for; PyTorch would warn about it
            args.dataloader_pin_memory = False
        given = {"train": train_dataset, "eval": eval_dataset}
        metas: dict[str, Metadata] = {}
        for name, source in given.items():
            if source is not None:
                widest = widest_vector(model, args.model_revision) if MixtureConfig.of(source) is not None else None
                metas[name] = read_metadata(source, args, like=metas.get("train"), widest=widest)
        meta = next(iter(metas.values()), None)
        self._mixtures = {name: known for name, known in metas.items() if isinstance(known, MixtureMetadata)}
        with seeded(args.seed):
            policy = resolve_policy(model, args, meta, peft_config)
        if isinstance(meta, MixtureMetadata):
            policy.config.robots = list(meta.names)
        self.random_weights = isinstance(model, PreTrainedConfig)
        if args.gradient_checkpointing:
            policy.gradient_checkpointing_enable()
        if args.torch_compile:
            policy.compile_base(**_compile_options(args))
        layout = policy.config.layout
        renames = observation_renames(policy.config, meta, args, preprocessor)
        opened: dict[str, TrainingSet] = {}
        for name, known in metas.items():
            opened[name] = open_data(given[name], known, policy.config, args, name == "train", renames)
        if "train" in metas:
            self.training_data = described(train_dataset, metas["train"], args)
            with seeded(args.seed):
                policy.set_episodes(episode_table(policy.config, metas["train"], args), args.seed)
            # one process inspects, the others find what it has written
            with args.main_process_first(local=False, desc="weights"):
                policy.set_weights(
                    training_weights(
                        policy.config,
                        train_dataset,
                        metas["train"],
                        folder=Path(args.output_dir) / INSPECTION_FOLDER,
                        revision=args.dataset_revision,
                        seed=args.seed,
                        console=PlainConsole() if args.process_index == 0 and not args.disable_tqdm else None,
                    )
                )
        self.screen = Screen(layout, policy.config.input_features or {}, renames, substitute=policy.objective is None)
        first = next(iter(opened.values()), None)
        if preprocessor is not None:
            preprocessor = checked_preprocessor(preprocessor, policy.config, meta, renames, first)
        if preprocessor is None or postprocessor is None:
            own = policy_processors(policy, meta, args, first, renames)
            preprocessor = own[0] if preprocessor is None else preprocessor
            postprocessor = own[1] if postprocessor is None else postprocessor
        self.preprocessor, self.postprocessor = preprocessor, postprocessor
        self.window = MetricsWindow(
            policy.config,
            sources=meta.names if isinstance(meta, MixtureMetadata) else (),
            tasks=() if meta is None else instructions_of(meta),
        )
        if policy.frame_weights is not None:
            self.window.weight_range = policy.frame_weights.range
        # every process reads its own rows, of a stream too
        args.accelerator_config.dispatch_batches = False
        if args.ddp_broadcast_buffers is None and not has_batch_statistics(policy):
            # queue, controller and memory are computed alike on every rank, so there is nothing to send
            args.ddp_broadcast_buffers = False
        # Accelerate would compile the whole step, which reads values out of modules; compile_base has done what can be
        compiler, args.torch_compile_backend = args.torch_compile_backend, None
        super().__init__(
            model=policy,
            args=args,
            data_collator=collate_segments,
            train_dataset=opened.get("train"),
            eval_dataset=opened.get("eval"),
            callbacks=[_AfterStep(), RunPlan(self), *callbacks],
            optimizers=optimizers,
        )
        args.torch_compile_backend = compiler
        prepare_sharding(self.accelerator, policy)
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(PTRProgressCallback())
        policy.seed_draws(args.seed)
        environment = args.eval_env if eval_env is None else eval_env
        if environment is not None:
            self.add_callback(
                EvaluationCallback(
                    self,
                    environment,
                    steps=args.eval_env_steps,
                    episodes=args.eval_env_episodes,
                    batch_size=args.eval_env_batch_size,
                    seed=args.eval_env_seed,
                    must_succeed=args.eval_env_must_succeed,
                    robot=args.eval_env_robot,
                )
            )

    # ---- the algorithm ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Eq. 32 over the global batch; with weights known before training Σ w ℓ / Σ w; else (SFT) the base policy's loss."""
        objective = self.policy.objective
        if objective is not None:
            output, _ = model(inputs, reduction="none")
            terms = objective.combine(output)
            loss = terms.pop("loss")
            figures = {f"loss_{name}": value for name, value in terms.items()} | objective.metrics(output)
        elif self.policy.weighs and model.training:
            output, _ = model(inputs, reduction="none")
            loss = weighed_loss(output)
            figures = {"loss_action": loss} | weight_metrics(output)
        else:
            output, (loss, _) = None, model(inputs)
            # a batch of which nothing may be learned: some policies do not look at the mask
            loss = loss * (~inputs["action_is_pad"]).any()
            figures = {"loss_action": loss}
        if model.training:
            self.window.add(figures, output)
        return (loss, output) if return_outputs else loss

    _mixture_sampler: MixtureSampler | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step; rows that the loader repeats to fill the last one are left out."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.policy.weighs:
            repeated = repeated_rows(batches[-1], self.accelerator)
            if repeated is not None:
                batches[-1] = leave_out(batches[-1], repeated)
                self.masked.discount(repeated)
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move to the device, scale 8-bit frames to [0, 1] there, cut into rows, and run the policy's preprocessor.

        Samples with values that are not finite are left out.
        """
        if is_rows(inputs):
            return inputs
        batch, bad = self.screen.before(super()._prepare_inputs(inputs))
        rows, bad = self.screen.after(preprocess(batch, self.preprocessor, self.policy.config.layout), bad)
        episodes = rows["episode_index"][: len(bad)]
        self.nonfinite.add_frames("values" if self.policy.training else "evaluation", bad, episodes)
        if self.policy.training and len(bad):
            self.masked.add(batch["action_is_pad"].all(dim=1) | (bad != FINE))
        return rows

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Accelerate wraps the forward in autocast itself, except under FSDP2."""
        if self.accelerator.is_fsdp2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluation loss of a batch; there are no predictions to gather."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """A mixture's sources are drawn at their shares."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Mixture):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._mixture_sampler = MixtureSampler(dataset.sizes, dataset.meta.shares, seed)
        return self._mixture_sampler

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """Tell the sampler its epoch, which Accelerate cannot reach under all of its wrappers."""
        if self._mixture_sampler is not None:
            self._mixture_sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def processors_for(self, robot: str) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
        """Pre- and postprocessor for one of the robots of a mixture.

        Args:
            robot: a source's name, or its embodiment's.

        Raises:
            ValueError: there is no such robot.
        """
        return for_robot(self.preprocessor, robot), for_robot(self.postprocessor, robot)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) over the base policy's own parameter groups and the side pathway's.

        A base group's own learning rate (ACT's backbone) is kept as a ratio to the policy's preset; `head_learning_rate` is
        the side pathway's as it stands.
        """
        if self.optimizer is not None:
            return self.optimizer
        policy = self.policy
        optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        preset = policy.config.get_optimizer_preset().lr
        base, side = policy.base_groups(), policy.side_groups()
        for group in base:
            if group.get("lr") is not None:
                group["lr"] = group["lr"] / preset * self.args.learning_rate
        groups = [*base, *side]
        for group in groups:
            group["weight_decay"] = self.args.weight_decay
        self.optimizer = optimizer_class([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; `resume_from_checkpoint` takes a checkpoint folder or True."""
        if self.train_dataset is None:
            raise ValueError("There is nothing to train on: give PTRTrainer a train_dataset.")
        if self.args.world_size > 1:
            data = {"episodes": sum(part.episodes or 0 for part in self.training_data)}
            if not isinstance(self.train_dataset, StreamingMixture):
                data["training segments"] = len(self.train_dataset)
            check_same_everywhere(run_facts(self.args, self.policy.config, self.policy, data))
        share_weights(self.accelerator, self.policy)
        steps = self.args.max_steps
        if steps <= 0 and isinstance(self.train_dataset, StreamingMixture):
            raise ValueError("A stream has no end, so the run needs one: set max_steps.")
        if steps <= 0:
            per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            steps = math.ceil(len(self.train_dataset) / per_step * self.args.num_train_epochs)
        self.policy.set_run_length(steps)
        objective = self.policy.objective
        if objective is not None and objective.config.alpha > 0 and objective.warmup_steps >= steps:
            logger.warning(
                "The scorer's warm-up of %d steps is not shorter than the run of %d: every weight stays 1. Lower "
                "scorer_warmup_steps, or train longer.",
                objective.warmup_steps,
                steps,
            )
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Also keep the statistics that the run was started with, should those of the data have changed since."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        changed_weights = other_weights(self.policy.config.weights_record, read_config(folder).weights_record)
        if changed_weights is not None:
            logger.warning("%s", changed_weights)
        pipelines = zip((self.preprocessor, self.postprocessor), PROCESSOR_FILES, strict=True)
        changed = [keep_statistics(pipeline, folder, file) for pipeline, file in pipelines]
        if any(changed):
            logger.warning(
                "The run keeps the statistics of %s, with which it was started, not the data's of now.", folder
            )

    def located(self, frame: BadFrame) -> BadFrame:
        """A frame of a mixture by its source, episode and dataset index there."""
        meta = self._mixtures.get("eval" if frame.kind == "evaluation" else "train")
        if meta is None:
            return frame
        start = meta.episodes["dataset_from_index"][frame.episode]
        names, episodes, _, indices = meta.located(np.array([frame.episode]), np.array([frame.index - start]))
        return BadFrame(frame.kind, int(indices[0]), int(episodes[0]), str(names[0]))

    # ---- logs ------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The last step is always logged, so that a run of fewer steps than `logging_steps` has a row too."""
        if self.control.should_training_stop and self.args.logging_strategy != IntervalStrategy.NO:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's metrics of the window, averaged over steps and ranks, and write `ptr_dynamics.parquet`."""
        if "loss" in logs and self.window:
            objective = self.policy.objective
            bounds = None
            if objective is not None:
                bounds = (objective.config.alpha, objective.config.weight_min, objective.config.weight_max)
            if self.policy.frame_weights is not None:
                bounds = (1.0, *self.policy.frame_weights.bounds)
            metrics, histogram = self.window.flush(self.accelerator, bounds)
            logs |= metrics | self.read_nonfinite()
            if self.is_world_process_zero():
                row = {name: value for name, value in logs.items() if name in DYNAMICS_COLUMNS}
                self._log_dynamics({**row, **histogram, "step": self.state.global_step})
        super().log(logs, start_time)


class _AfterStep(TrainerCallback):
    """After every optimiser step, on every rank: moving average, queue, controller."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give every rank noise of its own: transformers seeds all alike, and they would draw the same for other samples."""
        if args.world_size > 1:
            set_seed(args.seed + args.world_size * state.global_step, device_specific=True)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert isinstance(model, PTRPolicy)
        model.update()


class PTRProgressCallback(ProgressCallback):
    """The progress bar, with the figures one watches beside it; the full row goes to `report_to`."""

    _SHOWN = (("loss_action", "action"), ("accuracy", "acc"), ("score", "T"), ("weight_mean", "w"))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the latest window in the bar instead of printing rows."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {label: f"{logs[name]:.3f}" for name, label in self._SHOWN if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)


def _compile_options(args: PTRTrainingArguments) -> dict[str, Any]:
    """`torch.compile` options of the arguments; without them PyTorch's own defaults."""
    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    return {name: value for name, value in options.items() if value is not None}
