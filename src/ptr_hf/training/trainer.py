"""`PTRTrainer`: transformers' Trainer around a `PTRPolicy`.

The algorithm is `compute_loss`: per-chunk losses and weights come from the policy's one forward, the objective of Eq. 32 is
put together here, and after every optimiser step the policy moves its moving average, queue and controller (`AfterStep`).
Four collaborators do the rest: `Checkpoints`, `Resume`, `NonFiniteGuard` and `RunPublisher`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ptr_hf.data.in_memory import collate_segments
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.processor import for_robot
from ptr_hf.data.order import EpochSampler, MixtureSampler
from ptr_hf.data.screening import leave_out
from ptr_hf.data.segments import is_rows
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.processor_ptr import preprocess
from ptr_hf.report.dynamics import DYNAMICS_FILE, DynamicsLog
from ptr_hf.report.files import beside_the_run
from ptr_hf.scores import weighed_loss, weight_metrics
from ptr_hf.training.arguments import PTRTrainingArguments
from ptr_hf.training.callbacks import AfterStep, add_callbacks
from ptr_hf.training.checkpoints import Checkpoints
from ptr_hf.training.data_sources import DataSource
from ptr_hf.training.evaluation import EnvironmentSource
from ptr_hf.training.feature_cache import FeatureCache, check_cacheable
from ptr_hf.training.global_batches import repeated_rows
from ptr_hf.training.launch import check_alike, check_launch
from ptr_hf.training.metrics import logged_bounds
from ptr_hf.training.nonfinite import NonFiniteGuard
from ptr_hf.training.opening import arguments_for_transformers, open_run, set_run_length
from ptr_hf.training.plan import RunPlan
from ptr_hf.training.policy_sources import ModelSource
from ptr_hf.training.publisher import RunPublisher
from ptr_hf.training.reporting import check_reporting
from ptr_hf.training.resume import Resume
from ptr_hf.training.sharding import prepare_sharding, share_weights


class PTRTrainer(Trainer):
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

    args: PTRTrainingArguments
    optimizer: torch.optim.Optimizer | None
    _sampler: EpochSampler | None = None
    _dynamics: DynamicsLog | None = None

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
        given = {"train": train_dataset, "eval": eval_dataset}
        opened = open_run(model, args, given, peft_config, preprocessor, postprocessor)
        self.training_data, self.screen, self.window = opened.described, opened.screen, opened.window
        self.preprocessor, self.postprocessor = opened.preprocessor, opened.postprocessor
        self.checkpoints = Checkpoints(self)
        self.resume = Resume(self)
        self.guard = NonFiniteGuard(self, opened.mixtures)
        self.publisher = RunPublisher(self, random_weights=isinstance(model, PreTrainedConfig))
        with arguments_for_transformers(args, opened.policy):
            super().__init__(
                model=opened.policy,
                args=args,
                data_collator=collate_segments,
                train_dataset=opened.datasets.get("train"),
                eval_dataset=opened.datasets.get("eval"),
                callbacks=[AfterStep(), RunPlan(self), *callbacks],
                optimizers=optimizers,
            )
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        prepare_sharding(self.accelerator, self.policy)
        self.policy.seed_draws(args.seed)
        if args.cache_features and self.train_dataset is not None:
            check_cacheable(self.policy, self.train_dataset, args)
        self.guard.watch_losses(self.policy)
        add_callbacks(self, args.eval_env if eval_env is None else eval_env)

    @property
    def policy(self) -> PTRPolicy:
        """The policy in training, without Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    # ---- a run -------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or True ("true" or "last" on a command line), the newest complete
                one of `args.output_dir`.
            trial: as there.
            ignore_keys_for_eval: as there.

        Returns:
            transformers' `TrainOutput`: the last step, the mean loss, and the run's figures.

        Raises:
            ValueError: there is nothing to train on, no checkpoint that the run could be resumed from, it is past the last step
                of this run, another run writes into `args.output_dir`, or the processes were not started alike. With
                `nonfinite="stop"`, at the first log row after something was not finite.
            FloatingPointError: gradients were not finite for many steps in a row.
        """
        if self.train_dataset is None:
            raise ValueError("There is nothing to train on: give PTRTrainer a train_dataset.")
        check_alike(self.args, self.policy, self.training_data, self.train_dataset)
        share_weights(self.accelerator, self.policy)
        set_run_length(self.policy, self.args, self.train_dataset)
        with self.checkpoints.alone():
            checkpoint = self.resume.begin(resume_from_checkpoint)
            self.window.clear()
            if self.args.cache_features:
                FeatureCache(self).begin()
            self._dynamics = self._open_dynamics()
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _open_dynamics(self) -> DynamicsLog | None:
        """The run's rows in `ptr_dynamics.parquet`, on the main process; those of an earlier run go where it starts anew."""
        path = Path(self.args.output_dir) / DYNAMICS_FILE
        if not self.is_world_process_zero():
            return None
        if not self.resume.step:
            # what cannot be removed is replaced with the first row
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return DynamicsLog(path, self.policy.config.preset, self.resume.step)

    def choose_checkpoint(self, asked: str | Path | bool | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` asks for, the same on every rank; it raises as `train` does."""
        return self.resume.choose(asked)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """A run that was killed after its last step takes none more, which transformers' loop would."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._sampler is not None:
            # Accelerate cannot reach it under all of its wrappers
            self._sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step; rows that the loader repeats to fill the last one are left out."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.policy.weighs:
            repeated = repeated_rows(batches[-1], self.accelerator)
            if repeated is not None:
                batches[-1] = leave_out(batches[-1], repeated)
                self.guard.masked.discount(repeated)
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move to the device, scale 8-bit frames there, cut into rows, preprocess; leave samples out that are not finite."""
        if is_rows(inputs):
            return inputs
        batch, bad = self.screen.before(super()._prepare_inputs(inputs))
        rows, bad = self.screen.after(preprocess(batch, self.preprocessor, self.policy.config.layout), bad)
        self.guard.note(batch, rows, bad)
        return rows

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch; a loss that is not finite would stay in transformers' sum for ever."""
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """The norm just before the optimiser's step, whose gradients are zeroed where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check_gradients(norm, model)
        return norm

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
        """A mixture's sources are drawn at their shares; frames of one dataset in transformers' order, which is kept small."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(dataset, Mixture):
            sampler = self._sampler = MixtureSampler(dataset.sizes, dataset.meta.shares, seed)
        elif isinstance(sampler, RandomSampler) and self.accelerator.use_seedable_sampler:
            sampler = self._sampler = EpochSampler(len(sampler), seed)
        return sampler

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As transformers' Trainer, which keeps the loader of persistent workers whatever dataset is asked for later."""
        if isinstance(eval_dataset, Dataset) and eval_dataset is not self.eval_dataset:
            return self._get_dataloader(
                eval_dataset, "Evaluation", self.args.eval_batch_size, sampler_fn=self._get_eval_sampler
            )
        return super().get_eval_dataloader(eval_dataset)

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
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            preset = self.policy.config.get_optimizer_preset().lr
            base, side = self.policy.base_groups(), self.policy.side_groups()
            for group in base:
                if group.get("lr") is not None:
                    group["lr"] = group["lr"] / preset * self.args.learning_rate
            for group in (*base, *side):
                group["weight_decay"] = self.args.weight_decay
            self.optimizer = optimizer_class([group for group in (*base, *side) if group["params"]], **kwargs)
        return self.optimizer

    # ---- logs ------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The last step is always logged, so that a run of fewer steps than `logging_steps` has a row too."""
        if self.control.should_training_stop and self.args.logging_strategy != IntervalStrategy.NO:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics over all ranks, and write `ptr_dynamics.parquet`; then say what was not finite, or stop."""
        ending = "train_runtime" in logs
        if "loss" in logs and self.window:
            metrics, columns = self.window.flush(self.accelerator, logged_bounds(self.policy))
            logs |= metrics | self.guard.read()
            if self._dynamics is not None:
                with beside_the_run(f"{DYNAMICS_FILE} could not be written; its rows are written with the next one"):
                    self._dynamics.append(logs | columns | {"step": self.state.global_step})
        elif ending or ("eval_runtime" in logs and not self.is_in_train):
            self.guard.read()
        super().log(logs, start_time)
        self.guard.report(stops=not ending)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.save()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.checkpoints.remember_best()
        return super()._determine_best_metric(metrics, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' Trainer; beside the policy of a trained run it leaves the model card and the report.

        With `push_to_hub=True` it publishes too; what fails there is reported, not raised.

        Args:
            output_dir: folder; by default `args.output_dir`.
        """
        super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            self.publisher.after_save(Path(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.checkpoints.write_policy(Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.resume.load_policy(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.resume.load_best()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.resume.load_optimizer(checkpoint, super()._load_optimizer_and_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        self.resume.load_scaler(checkpoint, super()._load_scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.resume.load_random_streams(checkpoint, super()._load_rng_state)

    # ---- the Hub ---------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None) -> None:
        """Create the repo, or say at once that it cannot be: before training, nothing is lost by stopping.

        Raises:
            PushError: the Hub refuses (token, permission, name); one that does not answer is only warned about.
        """
        self.publisher.create_repo(token)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card with its pictures and the report to the output folder, where transformers would write its own."""
        if self.is_world_process_zero():
            self.publisher.write_card(Path(self.args.output_dir))

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "End of training",
        *,
        tags: str | Sequence[str] | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        **_: Any,
    ) -> str | None:
        """Save the policy, write its card and report, and push the whole folder in one commit.

        Args:
            repo_id: user/name; by default `args.hub_model_id`, or the name of `args.output_dir`.
            commit_message: of the commit.
            tags: git tags to set on the commit, e.g. "v1.0".
            revision: branch; by default `args.hub_revision`, or main.
            private: whether a new repo is private.
            token: of the Hub; by default `args.hub_token`, or the one that `hf auth login` stored.

        Returns:
            the address of the commit on the main process, None on the others.

        Raises:
            PushError: it did not get through; the folder is complete, and the message has the command to push it.
        """
        names = [tags] if isinstance(tags, str) else tags or ()
        return self.publisher.push(
            commit_message, names, repo_id=repo_id, revision=revision, private=private, token=token
        )

    def _finish_current_push(self) -> None:
        self.publisher.finish()
