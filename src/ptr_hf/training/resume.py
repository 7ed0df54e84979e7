"""`Resume`: a run that was killed at any moment continues as if it had not been.

transformers' Trainer resumes from whichever folder has the highest number, forgets the metrics between two log rows, and takes
a step too many after the last one.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ptr_hf.artifacts.checkpoint import is_ptr_folder
from ptr_hf.artifacts.checks import read_config
from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
from ptr_hf.files.regular import quoted
from ptr_hf.processor_ptr import keep_statistics
from ptr_hf.scoring.given_weights import other_weights
from ptr_hf.training.checkpoint_contents import reading
from ptr_hf.training.checkpoint_files import Manifest, checkpoints, fault, last_complete, remove_leftovers, step_of
from ptr_hf.training.checkpoints import WINDOW_LOGGED, WINDOW_LOSS, WINDOW_TOTAL, window_name
from ptr_hf.training.sharding import restore_weights

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

LAST = ("true", "last")
"""What asks for the newest checkpoint on a command line, where `resume_from_checkpoint` is a string."""

logger = logging.getLogger(__name__)


class Resume(TrainerCallback):
    """Chooses the checkpoint that a run goes on from, and restores what is in it.

    Args:
        trainer: whose run it is.
    """

    def __init__(self, trainer: "PTRTrainer") -> None:
        self._trainer = trainer
        self._checkpoint: Path | None = None
        self._manifest: Manifest | None = None

    @property
    def step(self) -> int:
        """Of the checkpoint that the run goes on from; 0 where it starts anew."""
        return self._manifest.step if self._manifest else 0

    def begin(self, asked: str | Path | bool | None) -> str | None:
        """Choose the checkpoint, tidy the run's folder, and say what will not be kept.

        Args:
            asked: as `PTRTrainer.train` takes it.

        Returns:
            the checkpoint's folder, for transformers' Trainer.

        Raises:
            ValueError: as `choose`.
        """
        trainer, args = self._trainer, self._trainer.args
        output = Path(args.output_dir)
        self._checkpoint = self.choose(asked)
        self._manifest = Manifest.read(self._checkpoint) if self._checkpoint else None
        if args.should_save:
            remove_leftovers(output)
            trainer.publisher.tidy()
            later = [folder.name for folder in checkpoints(output) if step_of(folder) > self.step]
            if later:
                logger.warning(
                    f"{output} holds {', '.join(later)} of an earlier run, from which resume_from_checkpoint=True would "
                    "continue: delete them unless they are still needed."
                )
        if self._manifest is not None and self._manifest.layout != trainer.checkpoints.layout.layout:
            self._report_other_layout(self._manifest)
        return str(self._checkpoint) if self._checkpoint else None

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, asked: str | Path | bool | None) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` asks for, the same on every rank; see `PTRTrainer.train`.

        The first process of each node reads and checks the files; the others learn what it found.

        Raises:
            ValueError: there is none that the run could be resumed from; on every rank.
        """
        word = str(asked).lower()
        if asked is None or word in ("false", ""):
            return None
        output = Path(self._trainer.args.output_dir)
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
        for sentence in skipped:
            self._warn(sentence)
        if steps[0] == -1:
            number = len(checkpoints(output))
            what = f"None of its {number} checkpoints can be used, as said above" if number else "It has no checkpoint"
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
        return self._trainer.args.local_process_index == 0 or self._trainer.args.process_index == 0

    def _first_reason(self, check: Callable[[], str | None]) -> str | None:
        """What speaks against a checkpoint on any node, known to every rank."""
        return next(filter(None, gather_object([check() if self._reads else None])), None)

    def _warn(self, sentence: str) -> None:
        if self._trainer.is_world_process_zero():
            logger.warning("%s", sentence)

    def _report_unchecked(self, folder: Path) -> None:
        if not Manifest.read(folder).checksums:
            self._warn(
                f"{folder} is of an earlier version and has no checksums: only the sizes of its files were checked."
            )

    def _report_other_layout(self, before: Manifest) -> None:
        """Say what is kept of a run that had other processes, batches or accumulation."""
        now = self._trainer.checkpoints.layout
        same_batch = now.global_batch == before.global_batch
        position = "and the position in the data" if same_batch else "and the number of the step"
        lost = ["the metrics since the last log row"]
        if now.world_size != before.world_size:
            lost.insert(0, "the random streams (each process starts a new one)")
        if not same_batch:
            lost.append(
                f"the position in the data (it goes on where {before.step} steps of the new batch would have led)"
            )
        self._warn(
            f"{self._checkpoint} was written by {before.world_size} process(es) with {before.batch_size} segments each and "
            f"accumulation {before.accumulation} ({before.global_batch} a step); this run has {now.world_size} with "
            f"{now.batch_size} and accumulation {now.accumulation} ({now.global_batch} a step). Kept: weights, optimiser, "
            f"schedule, the side pathway with its queue and controller, {position}. Not kept: {'; '.join(lost)}."
        )

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def load_policy(self, folder: Path) -> None:
        """Restore policy, scorer, belief, moving average, queue and controller, strictly, and the run's statistics.

        Those of the data may have changed since the run was started.
        """
        trainer = self._trainer
        restore_weights(trainer.policy, folder)
        changed_weights = other_weights(trainer.policy.config.weights_record, read_config(folder).weights_record)
        if changed_weights is not None:
            logger.warning("%s", changed_weights)
        pipelines = zip((trainer.preprocessor, trainer.postprocessor), PROCESSOR_FILES, strict=True)
        changed = [keep_statistics(pipeline, folder, file) for pipeline, file in pipelines]
        if any(changed):
            logger.warning(
                "The run keeps the statistics of %s, with which it was started, not the data's of now.", folder
            )

    def load_best(self) -> None:
        """Go back to the best checkpoint, whole; where it is damaged, the policy stays as it is after the last step."""
        state = self._trainer.state
        best = Path(state.best_model_checkpoint)
        reason = self._first_reason(lambda: fault(best, to_resume=False))
        if reason is None:
            restore_weights(self._trainer.policy, best)
            return
        state.best_model_checkpoint = None
        self._warn(f"The best checkpoint {best} cannot be loaded: {reason} The policy stays that of the last step.")

    def load_optimizer(self, checkpoint: str | None, otherwise: Callable[[str], None]) -> None:
        """By way of the host's memory: transformers would ask torch for a device "cpu:0" where several processes run on CPUs.

        Args:
            checkpoint: its folder; None restores nothing.
            otherwise: transformers' own, for states that are sharded.
        """
        if checkpoint is None:
            return
        trainer, folder = self._trainer, Path(checkpoint)
        if trainer.is_fsdp_enabled:
            with reading(folder / f"optimizer.bin or {SCHEDULER_NAME}"):
                otherwise(checkpoint)
            return
        for owner, name in ((trainer.optimizer, OPTIMIZER_NAME), (trainer.lr_scheduler, SCHEDULER_NAME)):
            assert owner is not None
            with reading(folder / name):
                owner.load_state_dict(torch.load(folder / name, map_location="cpu", weights_only=True))

    def load_scaler(self, checkpoint: str | None, load: Callable[[str], None]) -> None:
        """The state of AMP's scaler, where this run has one."""
        if checkpoint is not None and self._trainer.accelerator.scaler is not None:
            with reading(Path(checkpoint) / SCALER_NAME):
                load(checkpoint)

    def load_random_streams(self, checkpoint: str | None, load: Callable[[str], None]) -> None:
        """Those of this rank; where there were other ranks, new ones that do not repeat the run's first steps."""
        args = self._trainer.args
        if self._manifest is not None and self._manifest.world_size != args.world_size:
            set_seed(args.seed + args.world_size * self._manifest.step, device_specific=True)
            return
        if checkpoint is not None:
            several = args.world_size > 1
            path = Path(checkpoint) / (f"rng_state_{args.process_index}.pth" if several else "rng_state.pth")
            with reading(path):
                # transformers would go on without it
                path.stat()
                load(checkpoint)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore what the Trainer does not restore by itself, or has just reset."""
        folder, manifest, trainer = self._checkpoint, self._manifest, self._trainer
        if folder is None or manifest is None:
            return
        self._check_run_length(folder)
        self._find_best(folder)
        if manifest.layout == trainer.checkpoints.layout.layout:
            path = folder / window_name(args.process_index)
            with reading(path):
                own = load_file(path)
                self._restore_window({name: value.to(args.device) for name, value in own.items()})
        else:
            # for train_loss, which is the mean over all steps
            losses = []
            for rank in range(manifest.world_size):
                path = folder / window_name(rank)
                with reading(path):
                    part = load_file(path)
                    losses.append(float(part[WINDOW_LOSS] + part[WINDOW_TOTAL]))
            trainer._total_loss_scalar = sum(losses) / len(losses)

    def _check_run_length(self, folder: Path) -> None:
        """Refuse a checkpoint past the run's end, which would be given out as trained; say so where it is just there."""
        step, last = self._trainer.state.global_step, self._trainer.state.max_steps
        if step > last:
            raise ValueError(
                f"{folder} is of step {step}, but this run ends at step {last}, so nothing would be trained: raise max_steps "
                "(or num_train_epochs), resume from an earlier checkpoint, or start without resume_from_checkpoint."
            )
        if step == last:
            self._warn(f"{folder} is of step {step}, the last one of this run: nothing is left to train.")

    def _restore_window(self, state: dict[str, Tensor]) -> None:
        """Go on from what this rank had summed up since the last log row."""
        trainer = self._trainer
        trainer.window.restore(state)
        trainer._tr_loss, trainer._total_loss_scalar = state[WINDOW_LOSS], float(state[WINDOW_TOTAL])
        trainer._globalstep_last_logged = int(state[WINDOW_LOGGED])
        if not 0 <= trainer._globalstep_last_logged <= trainer.state.global_step:
            raise ValueError(f"its last log row cannot be of step {trainer._globalstep_last_logged}.")
        trainer.guard.watch.restore(state)

    def _find_best(self, folder: Path) -> None:
        """The best checkpoint, wherever the run's folder is now; without it the search for the best starts anew.

        It is one of the run's own folders, or of the one that the run was resumed from: no file may lead anywhere else.
        """
        state, output = self._trainer.state, Path(self._trainer.args.output_dir)
        recorded = state.best_model_checkpoint
        if recorded is None:
            return
        # the state's path may be of another machine
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        found = next(
            (place for place in (output / name, folder.parent / name) if fault(place, contents=False) is None), None
        )
        state.best_model_checkpoint = str(found) if found else None
        if found is None:
            state.best_metric = state.best_global_step = None
            # of this run it is recorded by its name alone
            self._warn(
                f"The best checkpoint so far, {quoted(output / recorded)}, is gone or damaged, or lies in another folder: the "
                "best is looked for from here on."
            )


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
