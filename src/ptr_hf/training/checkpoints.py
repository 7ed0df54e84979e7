"""`Checkpoints`: writes a run's checkpoints and final files, each of them whole or not there.

transformers' Trainer writes a checkpoint file by file into its final folder, and ends with the first write that fails.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ptr_hf.report.text import without_local_paths
from ptr_hf.training.checkpoint_files import (
    WRITE_ERRORS,
    Manifest,
    SaveError,
    commit,
    discard,
    last_complete,
    partial_folder,
    remove_leftovers,
    rotate,
    write_failure,
    written_aside,
)
from ptr_hf.training.plan import free_bytes, gigabytes
from ptr_hf.training.run_lock import RunLock

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

TRAINING_ARGS_NAME = "training_args.json"
WINDOW_LOSS, WINDOW_TOTAL, WINDOW_LOGGED = "trainer.loss", "trainer.total_loss", "trainer.last_logged"
"""The Trainer's own sums between two log rows, beside the metrics in a rank's window file."""

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves, and deletes the oldest; a save that fails is reported, and training goes on.

    Args:
        trainer: whose run it is.
    """

    def __init__(self, trainer: "PTRTrainer") -> None:
        self._trainer = trainer
        self._best_before: tuple[float | None, int | None] = (None, None)
        self._lock: RunLock | None = None

    @property
    def layout(self) -> Manifest:
        """The manifest of a checkpoint written now, without its files."""
        args = self._trainer.args
        batch = self._trainer._train_batch_size
        return Manifest(
            step=self._trainer.state.global_step,
            world_size=args.world_size,
            batch_size=batch,
            accumulation=args.gradient_accumulation_steps,
            global_batch=batch * args.gradient_accumulation_steps * args.world_size,
            resumable=not args.save_only_model,
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of the run's folder, on all ranks; the main process holds the lock.

        Raises:
            ValueError: another run has it; on all ranks.
        """
        args = self._trainer.args
        lock = RunLock(Path(args.output_dir))
        (refusal,) = broadcast_object_list([lock.acquire() if args.process_index == 0 else None])
        if refusal is not None:
            raise ValueError(refusal)
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint that appears once it is complete, on all ranks; one that fails is reported, and training goes on."""
        trainer, args, state = self._trainer, self._trainer.args, self._trainer.state
        output = Path(args.output_dir)
        target = output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folder = partial_folder(target)
        trainer.store_flos()
        if args.should_save:
            remove_leftovers(output)
        trainer.accelerator.wait_for_everyone()
        best = state.best_model_checkpoint
        if state.best_global_step:
            at_best = output / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if at_best == target or at_best.is_dir():
                state.best_model_checkpoint = str(at_best)
        # one after the other: a rank that fails in one must not leave the others waiting in the next
        steps: list[Callable[[], None]] = [partial(trainer.save_model, str(folder), _internal_call=True)]
        if not args.save_only_model:
            steps += [
                partial(trainer._save_optimizer_and_scheduler, str(folder)),
                partial(trainer._save_scaler, str(folder)),
                partial(trainer._save_rng_state, str(folder)),
                partial(self._save_window, folder),
            ]
        steps += [partial(self._save_state, folder), partial(self._commit, target)]
        if not all(self._everywhere(step, target) for step in steps):
            discard(folder)
            state.best_model_checkpoint = best
            if state.best_global_step == state.global_step:
                # the best of those that exist
                state.best_metric, state.best_global_step = self._best_before
            return
        # of a node that does not share the main one's disk
        discard(folder)
        if args.push_to_hub:
            trainer.publisher.push_checkpoint(target)
        if args.should_save:
            keep = {target, Path(state.best_model_checkpoint or target)}
            # what cannot be deleted now is deleted later
            with suppress(OSError):
                rotate(output, args.save_total_limit, keep)

    def remember_best(self) -> None:
        """Before a new best is looked for, which may then not be written."""
        self._best_before = self._trainer.state.best_metric, self._trainer.state.best_global_step

    def _everywhere(self, write: Callable[[], None], target: Path) -> bool:
        """Run one step of a save; whether it came through on every rank."""
        reason = None
        try:
            write()
        except WRITE_ERRORS as error:
            reason = write_failure(error)
            if reason is None:
                raise
        failed = torch.tensor([reason is not None], dtype=torch.int32, device=self._trainer.args.device)
        if reason is not None:
            good, _ = last_complete(target.parent, contents=False)
            free = free_bytes(target)
            room = "" if free is None else f" ({gigabytes(free)} are free on that disk)"
            logger.error(
                f"{target} could not be written: {reason}{room}. Training goes on, and the next "
                f"save tries again; until then the last good checkpoint is {good or 'none'}. Make room on that disk, or set "
                "save_total_limit to keep fewer."
            )
        return not int(self._trainer.accelerator.reduce(failed, reduction="sum"))

    def _commit(self, target: Path) -> None:
        if self._trainer.args.should_save:
            commit(target, self.layout)

    def _save_window(self, folder: Path) -> None:
        """What this rank has summed up since the last log row."""
        trainer = self._trainer
        tensors = {
            **trainer.window.state(),
            WINDOW_LOSS: trainer._tr_loss,
            WINDOW_TOTAL: torch.tensor(trainer._total_loss_scalar, dtype=torch.float64),
            WINDOW_LOGGED: torch.tensor(trainer._globalstep_last_logged),
            **trainer.guard.watch.state(),
        }
        # safetensors takes no two names for one storage
        tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        save_file(tensors, folder / window_name(trainer.args.process_index))

    def _save_state(self, folder: Path) -> None:
        """`trainer_state.json`, with the state of the callbacks that have one."""
        trainer, state = self._trainer, self._trainer.state
        if not trainer.args.should_save:
            return
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                states = state.stateful_callbacks
                name = type(callback).__name__
                if isinstance(states.get(name), list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()
        # a checkpoint of this run by its name alone: `last-checkpoint` is published, and a run's folder may be moved
        best = state.best_model_checkpoint
        if best is not None and Path(best).parent == Path(trainer.args.output_dir):
            state.best_model_checkpoint = Path(best).name
        try:
            state.save_to_json(str(folder / TRAINER_STATE_NAME))
        finally:
            state.best_model_checkpoint = best

    # ---- the policy --------------------------------------------------------------------------------------------------

    def write_policy(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write policy, processors and arguments, all or none; the arguments as JSON, without tokens, local paths and pickle.

        Raises:
            SaveError: a file could not be written, or another run has the folder; those that stood there before still do.
        """
        if self._lock is not None or self._trainer.args.process_index != 0:
            self._write(folder, state_dict)
            return
        # after training, when another run may have begun
        lock = RunLock(folder)
        refusal = lock.acquire()
        if refusal is not None:
            raise SaveError(f"The policy was not written. {refusal} save_model takes another folder, too.", refusal)
        try:
            self._write(folder, state_dict)
        finally:
            lock.release()

    def _write(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        trainer, args = self._trainer, self._trainer.args
        try:
            with written_aside(folder) as aside:
                trainer.policy.save_pretrained(aside, state_dict=state_dict)
                trainer.preprocessor.save_pretrained(aside, config_filename="policy_preprocessor.json")
                trainer.postprocessor.save_pretrained(aside, config_filename="policy_postprocessor.json")
                arguments = {name: value for name, value in args.to_dict().items() if not name.endswith("_token")}
                text = json.dumps(without_local_paths(arguments), indent=2, default=str)
                (aside / TRAINING_ARGS_NAME).write_text(text + "\n")
        except WRITE_ERRORS as error:
            reason = write_failure(error)
            if reason is None:
                raise
            good, _ = last_complete(Path(args.output_dir), contents=False)
            raise SaveError(
                f"The policy could not be written into {folder}: {reason}. What stood there is as it was, and the last good "
                f"checkpoint is {good or 'none'}. Make room on that disk and save again.",
                reason,
            ) from error


def window_name(rank: int) -> str:
    """The file of a checkpoint with a rank's sums since the last log row."""
    return f"ptr_window_{rank}.safetensors"
