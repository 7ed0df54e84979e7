"""The part of `PTRTrainer` that resumes: a run that was killed at any moment continues as if it had not been.

transformers' Trainer resumes from whichever folder has the highest number, forgets the metrics between two log rows, and takes
a step too many after the last one.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ptr_hf.artifacts.checkpoint import is_ptr_folder
from ptr_hf.files.regular import quoted
from ptr_hf.publishing.push import remove_staged
from ptr_hf.report import DYNAMICS_FILE, DynamicsLog
from ptr_hf.training.checkpoint_contents import reading
from ptr_hf.training.checkpointing_trainer import (
    WINDOW_LOGGED,
    WINDOW_LOSS,
    WINDOW_TOTAL,
    CheckpointingTrainer,
    window_name,
)
from ptr_hf.training.checkpoints import Manifest, checkpoints, fault, last_complete, remove_leftovers, step_of
from ptr_hf.training.sharding import restore_weights

LAST = ("true", "last")
"""What asks for the newest checkpoint on a command line, where `resume_from_checkpoint` is a string."""

logger = logging.getLogger(__name__)


class ResumableTrainer(CheckpointingTrainer):
    """A Trainer that can be killed at any moment."""

    _dynamics_log: DynamicsLog | None = None
    _resumed: Path | None = None
    _manifest: Manifest | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_AtTheStart(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Fix the sampler's seed, which would otherwise be what the global random stream was last seeded with."""
        if self.args.data_seed is None:
            self.args.data_seed = self.args.seed
        super().create_accelerator_and_postprocess()

    # ---- resuming --------------------------------------------------------------------------------------------------

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
            trial, ignore_keys_for_eval: as there.

        Raises:
            ValueError: there is no checkpoint that the run could be resumed from, it is past the last step of this run, or
                another run writes into `args.output_dir`.
        """
        with self._alone_in(Path(self._get_output_dir(trial))):
            return self._train_alone(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train_alone(
        self, resume_from_checkpoint: str | Path | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> Any:
        output = Path(self.args.output_dir)
        self._resumed = self.choose_checkpoint(resume_from_checkpoint)
        self._manifest = Manifest.read(self._resumed) if self._resumed else None
        self._dynamics_log = None
        self.window.clear()
        if self.args.should_save:
            remove_leftovers(output)
            self._finish_current_push()
            remove_staged(output)
            later = [folder.name for folder in checkpoints(output) if step_of(folder) > self._resumed_step]
            if later:
                logger.warning(
                    f"{output} holds {', '.join(later)} of an earlier run, from which resume_from_checkpoint=True would "
                    "continue: delete them unless they are still needed."
                )
        if self._manifest is not None and self._manifest.layout != self._layout.layout:
            self._report_other_layout(self._manifest)
        if self._resumed is not None and self.is_deepspeed_enabled and self.is_world_process_zero():
            logger.warning(
                f"DeepSpeed opens its files in {self._resumed} with pickle, which can run code: trust who wrote them."
            )
        checkpoint = str(self._resumed) if self._resumed else None
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    @property
    def _resumed_step(self) -> int:
        return self._manifest.step if self._manifest else 0

    def choose_checkpoint(self, asked: str | Path | bool | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` asks for, the same on every rank; see `train`.

        The first process of each node reads and checks the files; the others learn what it found.

        Raises:
            ValueError: as `train`, on every rank.
        """
        word = str(asked).lower()
        if asked is None or word in ("false", ""):
            return None
        output = Path(self.args.output_dir)
        if word not in LAST:
            folder = Path(str(asked))
            reason = self._first_reason(lambda: _why_not(folder))
            if reason is not None:
                raise ValueError(reason)
            self._report_unchecked(folder)
            return folder
        found, skipped = last_complete(output) if self._reads else (None, [])
        step = -1 if found is None else step_of(found)
        steps = [step for step in gather_object([step if self._reads else None]) if step is not None]
        if len(set(steps)) > 1:
            raise ValueError(
                f"The nodes find different newest checkpoints in {output} (steps {steps}, -1 for none): put output_dir on "
                "a file system that all nodes share, or give resume_from_checkpoint the path of a folder that all have."
            )
        if self.is_world_process_zero():
            for sentence in skipped:
                logger.warning(sentence)
        if steps[0] == -1:
            number = len(checkpoints(output))
            what = f"None of its {number} checkpoints is complete" if number else "It has no checkpoint"
            raise ValueError(
                f"There is nothing to resume from in {output}. {what}: start without resume_from_checkpoint, or give it the "
                "path of a checkpoint-<step> folder."
            )
        folder = output / f"{PREFIX_CHECKPOINT_DIR}-{steps[0]}"
        self._report_unchecked(folder)
        return folder

    @property
    def _reads(self) -> bool:
        """Whether this process is the one of its node that checks checkpoints."""
        return self.args.local_process_index == 0 or self.args.process_index == 0

    def _first_reason(self, check: Callable[[], str | None]) -> str | None:
        """What speaks against a checkpoint on any node, known to every rank."""
        return next(filter(None, gather_object([check() if self._reads else None])), None)

    def _report_unchecked(self, folder: Path) -> None:
        if self.is_world_process_zero() and not Manifest.read(folder).checksums:
            logger.warning(
                f"{folder} is of an earlier version and has no checksums: only the sizes of its files were checked."
            )

    def _report_other_layout(self, before: Manifest) -> None:
        """Say what is kept of a run that had other processes, batches or accumulation."""
        now = self._layout
        same_batch = now.global_batch == before.global_batch
        position = "and the position in the data" if same_batch else "and the number of the step"
        lost = ["the metrics since the last log row"]
        if now.world_size != before.world_size:
            lost.insert(0, "the random streams (each process starts a new one)")
        if not same_batch:
            lost.append(
                f"the position in the data (it goes on where {before.step} steps of the new batch would have led)"
            )
        if self.is_world_process_zero():
            logger.warning(
                f"{self._resumed} was written by {before.world_size} process(es) with {before.batch_size} segments each and "
                f"accumulation {before.accumulation} ({before.global_batch} a step); this run has {now.world_size} with "
                f"{now.batch_size} and accumulation {now.accumulation} ({now.global_batch} a step). Kept: weights, optimiser, "
                f"schedule, the side pathway with its queue and controller, {position}. Not kept: {'; '.join(lost)}."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore policy, scorer, belief, moving average, queue and controller, strictly."""
        restore_weights(self.policy, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint, whole; where it is damaged, the policy stays as it is after the last step."""
        best = Path(self.state.best_model_checkpoint)
        reason = self._first_reason(lambda: fault(best, to_resume=False))
        if reason is None:
            restore_weights(self.policy, best)
            return
        self.state.best_model_checkpoint = None
        if self.is_world_process_zero():
            logger.warning(
                f"The best checkpoint {best} cannot be loaded: {reason} The policy stays that of the last step."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """By way of the host's memory: transformers would ask torch for a device "cpu:0" where several processes run on CPUs."""
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            with reading(Path(checkpoint) / f"optimizer.bin or {SCHEDULER_NAME}"):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        for owner, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            assert owner is not None
            with reading(Path(checkpoint) / name):
                owner.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The state of AMP's scaler, where this run has one."""
        if checkpoint is not None and self.accelerator.scaler is not None:
            with reading(Path(checkpoint) / SCALER_NAME):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random streams of this rank; where there were other ranks, new ones that do not repeat the run's first steps."""
        if self._manifest is not None and self._manifest.world_size != self.args.world_size:
            set_seed(self.args.seed + self.args.world_size * self._manifest.step, device_specific=True)
            return
        if checkpoint is not None:
            several = self.args.world_size > 1
            path = Path(checkpoint) / (f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth")
            with reading(path):
                # transformers would go on without it
                path.stat()
                super()._load_rng_state(checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that was killed after its last step takes none more, which transformers' loop would."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _continue(self) -> None:
        """After the Trainer has set its state up for training: what it does not restore by itself."""
        if self._resumed is None or self._manifest is None:
            return
        self._check_run_length(self._resumed)
        self._find_best(self._resumed)
        if self._manifest.layout == self._layout.layout:
            path = self._resumed / window_name(self.args.process_index)
            with reading(path):
                own = load_file(path)
                self.restore_window({name: value.to(self.args.device) for name, value in own.items()})
        else:
            # for train_loss, which is the mean over all steps
            losses = []
            for rank in range(self._manifest.world_size):
                path = self._resumed / window_name(rank)
                with reading(path):
                    part = load_file(path)
                    losses.append(float(part[WINDOW_LOSS] + part[WINDOW_TOTAL]))
            self._total_loss_scalar = sum(losses) / len(losses)

    def _check_run_length(self, resumed: Path) -> None:
        """Refuse a checkpoint past the run's end, which would be given out as trained; say so where it is just there."""
        step, last = self.state.global_step, self.state.max_steps
        if step > last:
            raise ValueError(
                f"{resumed} is of step {step}, but this run ends at step {last}, so nothing would be trained: raise max_steps "
                "(or num_train_epochs), resume from an earlier checkpoint, or start without resume_from_checkpoint."
            )
        if step == last and self.is_world_process_zero():
            logger.warning(f"{resumed} is of step {step}, the last one of this run: nothing is left to train.")

    def restore_window(self, state: dict[str, Tensor]) -> None:
        """Go on from a `window_state`."""
        self.window.restore(state)
        self._tr_loss, self._total_loss_scalar = state[WINDOW_LOSS], float(state[WINDOW_TOTAL])
        self._globalstep_last_logged = int(state[WINDOW_LOGGED])
        if not 0 <= self._globalstep_last_logged <= self.state.global_step:
            raise ValueError(f"its last log row cannot be of step {self._globalstep_last_logged}.")

    def _find_best(self, resumed: Path) -> None:
        """The best checkpoint, wherever the run's folder is now; without it the search for the best starts anew.

        It is one of the run's own folders, or of the one that the run was resumed from: no file may lead anywhere else.
        """
        recorded = self.state.best_model_checkpoint
        if recorded is None:
            return
        # the state's path may be of another machine
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        places = (Path(self.args.output_dir) / name, resumed.parent / name)
        found = next((place for place in places if fault(place, contents=False) is None), None)
        self.state.best_model_checkpoint = str(found) if found else None
        if found is None:
            self.state.best_metric = self.state.best_global_step = None
        if found is None and self.is_world_process_zero():
            # of this run it is recorded by its name alone
            place = Path(self.args.output_dir) / recorded
            logger.warning(
                f"The best checkpoint so far, {quoted(place)}, is gone or damaged, or lies in another folder: the best is "
                "looked for from here on."
            )

    def _log_dynamics(self, row: Mapping[str, Any]) -> None:
        """Add a row to `ptr_dynamics.parquet`; one that a full disk refuses is written with the next one."""
        try:
            if self._dynamics_log is None:
                path = Path(self.args.output_dir) / DYNAMICS_FILE
                if not self._resumed_step:
                    # what cannot be removed is replaced with the first row
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
                self._dynamics_log = DynamicsLog(path, self.policy.config.preset, self._resumed_step)
            self._dynamics_log.append(row)
        # the run is worth more than its log, whatever it stumbles over
        except Exception as error:
            logger.error(f"{DYNAMICS_FILE} could not be written ({error}); its rows are written with the next one.")


def _why_not(folder: Path) -> str | None:
    """Why a checkpoint that was asked for by name is refused."""
    try:
        if not is_ptr_folder(folder):
            return f"{folder} is no PTR checkpoint; resume from a checkpoint-<step> folder of this run's output_dir."
        reason = fault(folder)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        return None
    return (
        f"{folder} cannot be resumed from: {reason} Name another checkpoint, or use resume_from_checkpoint=True for the newest "
        "complete one."
    )


class _AtTheStart(TrainerCallback):
    """Restores what the Trainer resets just before the first step."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._continue()
