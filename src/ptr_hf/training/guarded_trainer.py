"""The part of `PTRTrainer` that keeps what is not finite out of the parameters, and says what it was."""

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptr_hf.data.masked_segments import MaskedSegments
from ptr_hf.data.screening import Screen
from ptr_hf.method import ObjectiveOutput
from ptr_hf.training.checkpoints import checkpoints, fault, step_of
from ptr_hf.training.nonfinite import (
    NONFINITE_FILE,
    PATIENCE,
    BadFrame,
    Kind,
    NonFiniteRecord,
    NonFiniteWatch,
    NonFiniteWindow,
    describe,
)
from ptr_hf.training.resumable_trainer import ResumableTrainer

logger = logging.getLogger(__name__)


class GuardedTrainer(ResumableTrainer):
    """A Trainer that a NaN does not end: samples that hold one are left out, gradients that are one are not stepped on.

    Attributes:
        screen: finds the samples; set before the Trainer is.
        nonfinite: what has not been finite since the last log row.
        masked: how many of the segments that were read hold nothing to learn from.
    """

    screen: Screen
    nonfinite: NonFiniteWatch
    masked: MaskedSegments
    _many_masked: str | None = None
    _bad_frames: NonFiniteRecord | None = None
    _found: NonFiniteWindow | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nonfinite = NonFiniteWatch()
        self.masked = MaskedSegments()
        # not bound to the trainer, which a copy of the policy would then copy too
        self.policy.register_forward_hook(partial(_note_losses, self.nonfinite))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`.

        Raises:
            ValueError: with `nonfinite="stop"`, at the first log row after something was not finite.
            FloatingPointError: gradients were not finite for many steps in a row.
        """
        self._bad_frames = self._found = None
        self.nonfinite.clear()
        self.masked.clear()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch; a loss that is not finite would stay in transformers' sum for ever."""
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """The norm just before the optimiser's step, whose gradients are zeroed where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.nonfinite.guard(norm, model.parameters(), scaled=self.accelerator.scaler is not None)
        return norm

    def window_state(self) -> dict[str, Tensor]:
        """What this rank has noted since the last log row, for its checkpoint."""
        return super().window_state() | self.nonfinite.state()

    def restore_window(self, state: dict[str, Tensor]) -> None:
        """Go on from a `window_state`."""
        super().restore_window(state)
        self.nonfinite.restore(state)

    def read_nonfinite(self) -> dict[str, float]:
        """Read the window off the device; a collective. `log` then warns about it, or stops.

        Returns:
            figures for the log row.
        """
        self._found = self.nonfinite.flush(self.accelerator)
        self._many_masked = self.masked.read(self.accelerator, self.state.global_step)
        self._found.frames = Counter({self.located(frame): times for frame, times in self._found.frames.items()})
        return self._found.metrics

    def located(self, frame: BadFrame) -> BadFrame:
        """The frame as a user finds it: in the dataset that it was recorded in."""
        return frame

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers' Trainer; afterwards it says what was not finite, and ends training if it has to."""
        ending = "train_runtime" in logs
        if ending or ("eval_runtime" in logs and not self.is_in_train):
            self.read_nonfinite()
        super().log(logs, start_time)
        found, self._found = self._found, None
        if found is None:
            return
        new = self._kept(found)
        lost = found.steps.count(False)
        sentences = [describe(kind, frames) for kind, frames in new.items()]
        if lost:
            sentences.append(
                f"{lost} of the {len(found.steps)} steps up to step {self.state.global_step} had a gradient that is not finite; "
                "they were left out. If this goes on, lower learning_rate or look for values that are far too large."
            )
        if self._many_masked is not None:
            sentences.append(self._many_masked)
            self._many_masked = None
        if self.is_world_process_zero():
            for sentence in sentences:
                logger.warning("%s", sentence)
        if not ending:
            self._end_if_broken(found)

    def _kept(self, found: NonFiniteWindow) -> dict[Kind, list[BadFrame]]:
        """Add a window to the file; what is new of it."""
        if self._bad_frames is None:
            path = Path(self.args.output_dir) / NONFINITE_FILE
            self._bad_frames = NonFiniteRecord(path, self._resumed_step > 0, self.is_world_process_zero())
        return self._bad_frames.add(found)

    def _end_if_broken(self, found: NonFiniteWindow) -> None:
        """Raise where going on makes no sense, on every rank.

        Raises:
            ValueError: `nonfinite="stop"` and something was not finite; a checkpoint is written first.
            FloatingPointError: no gradient has been finite for a whole window and `PATIENCE` steps.
        """
        step, streak = self.state.global_step, self.nonfinite.streak
        if streak >= max(PATIENCE, len(found.steps)) and not self._scale_can_fall:
            output = Path(self.args.output_dir)
            before = [folder for folder in checkpoints(output) if step_of(folder) <= step - streak]
            good = [folder for folder in before if fault(folder, contents=False) is None]
            back = f"the last good checkpoint is {max(good, key=step_of)}" if good else "there is no older checkpoint"
            raise FloatingPointError(
                f"The gradient has not been finite for {streak} steps, up to step {step}: the parameters or the data are "
                f"broken, and training cannot go on. Before that, {back}. Resume from there with a lower learning_rate, or look "
                f"into {NONFINITE_FILE}."
            )
        frames = [frame for frame in found.frames if frame.kind != "evaluation"]
        if self.args.nonfinite == "stop" and (frames or False in found.steps):
            self._save_checkpoint(self.model, None)
            kinds = dict.fromkeys(frame.kind for frame in frames)
            named = [describe(kind, sorted(frame for frame in frames if frame.kind == kind)) for kind in kinds]
            raise ValueError(
                f'Training stops at step {step}, as nonfinite="stop" asks; its checkpoint is written. '
                + " ".join(named or ["The gradient of a step was not finite."])
                + ' nonfinite="skip" goes on without them.'
            )

    @property
    def _scale_can_fall(self) -> bool:
        """Whether overflows may still be AMP's, whose scaler halves its scale at each; it reads the device."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1.0


def _note_losses(watch: NonFiniteWatch, _policy: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook: the chunks whose loss is not finite, of forwards that train."""
    if torch.is_grad_enabled() and isinstance(output[0], ObjectiveOutput):
        watch.add_losses(output[0], inputs[0])
