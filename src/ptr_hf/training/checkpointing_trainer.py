"""The part of `PTRTrainer` that writes: checkpoints that are whole or not there, and logs that a full disk does not end.

transformers' Trainer writes a checkpoint file by file into its final folder, and ends with the first write that fails.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from lerobot.processor import PolicyProcessorPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ptr_hf.report.text import without_local_paths
from ptr_hf.training.checkpoints import (
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
from ptr_hf.training.metrics import MetricsWindow
from ptr_hf.training.publishing_trainer import PublishingTrainer
from ptr_hf.training.run_lock import RunLock

TRAINING_ARGS_NAME = "training_args.json"
WINDOW_LOSS, WINDOW_TOTAL, WINDOW_LOGGED = "trainer.loss", "trainer.total_loss", "trainer.last_logged"
"""The Trainer's own sums between two log rows, beside the metrics in a rank's window file."""

logger = logging.getLogger(__name__)


class CheckpointingTrainer(PublishingTrainer):
    """A Trainer whose checkpoints appear at once, or not at all.

    Attributes:
        window: metrics since the last log row.
        preprocessor, postprocessor: the policy's pipelines.
    """

    window: MetricsWindow
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    _best_before: tuple[float | None, int | None] = (None, None)
    _lock: RunLock | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        board = self.pop_callback(TensorBoardCallback)
        if isinstance(board, TensorBoardCallback):
            self.add_callback(RecoveringTensorBoard(board.tb_writer))

    @property
    def _layout(self) -> Manifest:
        """The manifest of a checkpoint written now, without its files."""
        args = self.args
        batch = self._train_batch_size
        return Manifest(
            step=self.state.global_step,
            world_size=args.world_size,
            batch_size=batch,
            accumulation=args.gradient_accumulation_steps,
            global_batch=batch * args.gradient_accumulation_steps * args.world_size,
            resumable=not args.save_only_model,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that appears once it is complete, on all ranks; one that fails is reported, and training goes on."""
        output = Path(self._get_output_dir(trial))
        target = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = partial_folder(target)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.args.should_save:
            remove_leftovers(output)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if self.state.best_global_step:
            at_best = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if at_best == target or at_best.is_dir():
                self.state.best_model_checkpoint = str(at_best)
        # one after the other: a rank that fails in one must not leave the others waiting in the next
        steps: list[Callable[[], None]] = [partial(self.save_model, str(folder), _internal_call=True)]
        if not self.args.save_only_model:
            steps += [
                partial(self._save_optimizer_and_scheduler, str(folder)),
                partial(self._save_scaler, str(folder)),
                partial(self._save_rng_state, str(folder)),
                partial(self._save_window, folder),
            ]
        steps += [partial(self._save_state, folder), partial(self._commit, target)]
        if not all(self._everywhere(step, target) for step in steps):
            discard(folder)
            self.state.best_model_checkpoint = best
            if self.state.best_global_step == self.state.global_step:
                # the best of those that exist
                self.state.best_metric, self.state.best_global_step = self._best_before
            return
        # of a node that does not share the main one's disk
        discard(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            keep = {target, Path(self.state.best_model_checkpoint or target)}
            # what cannot be deleted now is deleted later
            with suppress(OSError):
                rotate(output, self.args.save_total_limit, keep)

    def _everywhere(self, write: Callable[[], None], target: Path) -> bool:
        """Run one step of a save; whether it came through on every rank."""
        reason = None
        try:
            write()
        except WRITE_ERRORS as error:
            reason = write_failure(error)
            if reason is None:
                raise
        failed = torch.tensor([reason is not None], dtype=torch.int32, device=self.args.device)
        if reason is not None:
            good, _ = last_complete(target.parent, contents=False)
            logger.error(
                f"{target} could not be written: {reason}{_free(target)}. Training goes on, and the next "
                f"save tries again; until then the last good checkpoint is {good or 'none'}. Make room on that disk, or set "
                "save_total_limit to keep fewer."
            )
        return not int(self.accelerator.reduce(failed, reduction="sum"))

    def _commit(self, target: Path) -> None:
        if self.args.should_save:
            commit(target, self._layout)

    @contextmanager
    def _alone_in(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of a folder, on all ranks; the main process holds the lock.

        Raises:
            ValueError: another run has it; on all ranks.
        """
        lock = RunLock(folder)
        (refusal,) = broadcast_object_list([lock.acquire() if self.args.process_index == 0 else None])
        if refusal is not None:
            raise ValueError(refusal)
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def window_state(self) -> dict[str, Tensor]:
        """What this rank has summed up since the last log row, for its checkpoint."""
        return {
            **self.window.state(),
            WINDOW_LOSS: self._tr_loss,
            WINDOW_TOTAL: torch.tensor(self._total_loss_scalar, dtype=torch.float64),
            WINDOW_LOGGED: torch.tensor(self._globalstep_last_logged),
        }

    def _save_window(self, folder: Path) -> None:
        # safetensors takes no two names for one storage
        tensors = {name: value.detach().cpu().clone() for name, value in self.window_state().items()}
        save_file(tensors, folder / window_name(self.args.process_index))

    def _save_state(self, folder: Path) -> None:
        """`trainer_state.json`, with the state of the callbacks that have one."""
        if not self.args.should_save:
            return
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states = self.state.stateful_callbacks
                name = type(callback).__name__
                if isinstance(states.get(name), list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()
        # a checkpoint of this run by its name alone: `last-checkpoint` is published, and a run's folder may be moved
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == Path(self.args.output_dir):
            self.state.best_model_checkpoint = Path(best).name
        try:
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        finally:
            self.state.best_model_checkpoint = best

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Also remember the best before, for a new best that cannot be written."""
        self._best_before = self.state.best_metric, self.state.best_global_step
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write policy, processors and arguments, all or none; the arguments as JSON, without tokens, local paths and pickle.

        Raises:
            SaveError: a file could not be written, or another run has the folder; those that stood there before still do.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self._lock is not None or self.args.process_index != 0:
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
        try:
            with written_aside(folder) as aside:
                self.policy.save_pretrained(aside, state_dict=state_dict)
                self.preprocessor.save_pretrained(aside, config_filename="policy_preprocessor.json")
                self.postprocessor.save_pretrained(aside, config_filename="policy_postprocessor.json")
                arguments = {name: value for name, value in self.args.to_dict().items() if not name.endswith("_token")}
                text = json.dumps(without_local_paths(arguments), indent=2, default=str)
                (aside / TRAINING_ARGS_NAME).write_text(text + "\n")
        except WRITE_ERRORS as error:
            reason = write_failure(error)
            if reason is None:
                raise
            good, _ = last_complete(Path(self.args.output_dir), contents=False)
            raise SaveError(
                f"The policy could not be written into {folder}: {reason}. What stood there is as it was, and the last good "
                f"checkpoint is {good or 'none'}. Make room on that disk and save again.",
                reason,
            ) from error


class RecoveringTensorBoard(TensorBoardCallback):
    """TensorBoard, whose writer is given up when its disk is full; the next row opens a new one."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Open the writer."""
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write the row, or report that it could not be written."""
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the writer."""
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except OSError as error:
            logger.error(
                f"TensorBoard's row could not be written ({error}); training goes on, and the next row tries again."
            )
            self.tb_writer = None


def _free(target: Path) -> str:
    """The room on the disk where a folder would be written, for a message; nothing where that disk does not say."""
    with suppress(OSError):
        there = next(folder for folder in target.absolute().parents if folder.exists())
        return f" ({shutil.disk_usage(there).free / 1e6:.1f} MB are free on that disk)"
    return ""


def window_name(rank: int) -> str:
    """The file of a checkpoint with a rank's sums since the last log row."""
    return f"ptr_window_{rank}.safetensors"
