"""`NonFiniteGuard`: keeps what is not finite out of the parameters, and says what it was."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ptr_hf.data.masked_segments import MaskedSegments
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.screening import FINE
from ptr_hf.method import ObjectiveOutput
from ptr_hf.training.checkpoint_files import checkpoints, fault, step_of
from ptr_hf.training.nonfinite_record import (
    KINDS,
    NONFINITE_FILE,
    BadFrame,
    Kind,
    NonFiniteRecord,
    by_kind,
    describe,
)

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

PATIENCE = 10
"""Steps in a row without a finite gradient before training stops, or a logging window, if that is longer."""
_FRAMES, _STEPS, _STREAK = "nonfinite.frames", "nonfinite.steps", "nonfinite.streak"

logger = logging.getLogger(__name__)


class NonFiniteGuard(TrainerCallback):
    """A NaN does not end a run: samples that hold one are left out, gradients that are one are not stepped on.

    Attributes:
        watch: what has not been finite since the last log row.
        masked: how many of the segments that were read hold nothing to learn from.

    Args:
        trainer: whose run it is.
        mixtures: the metadata of data that are mixtures, by "train" and "eval".
    """

    def __init__(self, trainer: "PTRTrainer", mixtures: Mapping[str, MixtureMetadata]) -> None:
        self._trainer = trainer
        self._mixtures = mixtures
        self.watch = NonFiniteWatch()
        self.masked = MaskedSegments()
        self._record: NonFiniteRecord | None = None
        self._found: tuple[Counter[BadFrame], list[bool]] | None = None
        self._many_masked: str | None = None

    def watch_losses(self, policy: nn.Module) -> None:
        """Note the chunks whose loss is not finite, of every forward that trains."""
        # not bound to the trainer, which a copy of the policy would then copy too
        policy.register_forward_hook(partial(_note_losses, self.watch))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start anew."""
        self._record = self._found = None
        self.watch.clear()
        self.masked.clear()

    def note(self, batch: dict[str, Any], rows: dict[str, Any], bad: Int[Tensor, " segments"]) -> None:
        """Note the frames of a batch that are not finite, and how many of its segments hold nothing to learn from.

        Args:
            batch: collated segments.
            rows: made of them.
            bad: as `Screen.after` gives them.
        """
        training = self._trainer.policy.training
        self.watch.add_frames("values" if training else "evaluation", bad, rows["episode_index"][: len(bad)])
        if training and len(bad):
            self.masked.add(batch["action_is_pad"].all(dim=1) | (bad != FINE))

    def check_gradients(self, norm: Tensor | float, model: nn.Module) -> None:
        """Zero the gradients of a step whose norm is not finite."""
        self.watch.guard(norm, model.parameters(), scaled=self._trainer.accelerator.scaler is not None)

    def read(self) -> dict[str, float]:
        """Read what was noted off the device; a collective. `report` then warns about it, or stops.

        Returns:
            figures for the log row.
        """
        noted, steps = self.watch.flush(self._trainer.accelerator)
        self._many_masked = self.masked.read(self._trainer.accelerator, self._trainer.state.global_step)
        frames = Counter({self._located(frame): times for frame, times in noted.items()})
        self._found = frames, steps
        samples = sum(times for frame, times in frames.items() if frame.kind != "evaluation")
        return {"nonfinite_samples": float(samples), "nonfinite_gradients": float(steps.count(False))}

    def report(self, stops: bool) -> None:
        """Say what the last `read` found, and end training if it has to.

        Args:
            stops: False at the end of training.

        Raises:
            ValueError: `nonfinite="stop"` and something was not finite; a checkpoint is written first.
            FloatingPointError: no gradient has been finite for a whole window and `PATIENCE` steps.
        """
        found, self._found = self._found, None
        if found is None:
            return
        frames, steps = found
        lost = steps.count(False)
        sentences = [describe(kind, new) for kind, new in self._kept(frames, lost).items()]
        if lost:
            sentences.append(
                f"{lost} of the {len(steps)} steps up to step {self._trainer.state.global_step} had a gradient that is not "
                "finite; they were left out. If this goes on, lower learning_rate or look for values that are far too large."
            )
        if self._many_masked is not None:
            sentences.append(self._many_masked)
        if self._trainer.is_world_process_zero():
            for sentence in sentences:
                logger.warning("%s", sentence)
        if stops:
            self._end_if_broken(frames, steps)

    def _located(self, frame: BadFrame) -> BadFrame:
        """The frame as a user finds it: in the dataset of a mixture that it was recorded in."""
        meta = self._mixtures.get("eval" if frame.kind == "evaluation" else "train")
        if meta is None:
            return frame
        start = meta.episodes["dataset_from_index"][frame.episode]
        names, episodes, indices = meta.located(np.array([frame.episode]), np.array([frame.index - start]))
        return BadFrame(frame.kind, int(indices[0]), int(episodes[0]), str(names[0]))

    def _kept(self, frames: Counter[BadFrame], lost: int) -> dict[Kind, list[BadFrame]]:
        """Add a window to the file; what is new of it."""
        trainer = self._trainer
        if self._record is None:
            path = Path(trainer.args.output_dir) / NONFINITE_FILE
            self._record = NonFiniteRecord(path, trainer.resume.step > 0, trainer.is_world_process_zero())
        return self._record.add(frames, lost)

    def _end_if_broken(self, found: Counter[BadFrame], steps: list[bool]) -> None:
        step, streak = self._trainer.state.global_step, self.watch.streak
        if streak >= max(PATIENCE, len(steps)) and not self._scale_can_fall:
            output = Path(self._trainer.args.output_dir)
            before = [folder for folder in checkpoints(output) if step_of(folder) <= step - streak]
            good = [folder for folder in before if fault(folder, contents=False) is None]
            back = f"the last good checkpoint is {max(good, key=step_of)}" if good else "there is no older checkpoint"
            raise FloatingPointError(
                f"The gradient has not been finite for {streak} steps, up to step {step}: the parameters or the data are "
                f"broken, and training cannot go on. Before that, {back}. Resume from there with a lower learning_rate, or look "
                f"into {NONFINITE_FILE}."
            )
        frames = [frame for frame in found if frame.kind != "evaluation"]
        if self._trainer.args.nonfinite == "stop" and (frames or False in steps):
            self._trainer.checkpoints.save()
            named = [describe(kind, own) for kind, own in by_kind(frames).items()]
            raise ValueError(
                f'Training stops at step {step}, as nonfinite="stop" asks; its checkpoint is written. '
                + " ".join(named or ["The gradient of a step was not finite."])
                + ' nonfinite="skip" goes on without them.'
            )

    @property
    def _scale_can_fall(self) -> bool:
        """Whether overflows may still be AMP's, whose scaler halves its scale at each; it reads the device."""
        scaler = self._trainer.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1.0


class NonFiniteWatch:
    """Collects on the device what is not finite; nothing leaves it before `flush`.

    Attributes:
        streak: optimiser steps in a row, up to the last flush, without a finite gradient; those of AMP's scaler too.
    """

    def __init__(self) -> None:
        self._scaled = False
        self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        self._frames: list[Int[Tensor, "rows 3"]] = []
        self._steps: list[Tensor] = []
        self.streak = 0

    def add_frames(self, kind: Kind, frames: Int[Tensor, " rows"], episodes: Int[Tensor, " rows"]) -> None:
        """Note the frames of some samples, or FINE, and their episodes."""
        if len(frames):
            self._frames.append(torch.stack([torch.full_like(frames, KINDS.index(kind)), frames, episodes], dim=1))

    def add_losses(self, output: ObjectiveOutput, rows: dict[str, Any]) -> None:
        """Note the chunks whose loss is not finite, which the objective leaves out.

        Args:
            output: of the policy's forward.
            rows: the preprocessed batch that the policy was given.
        """
        count = len(output.loss)
        bad = ~output.loss.detach().isfinite() & output.chunk_valid
        self.add_frames("loss", torch.where(bad, rows["index"][:count], FINE), rows["episode_index"][:count])

    @torch.no_grad()
    def guard(self, norm: Tensor | float, parameters: Iterable[nn.Parameter], scaled: bool = False) -> None:
        """Zero every gradient of a step whose norm is not finite, without looking at it: the parameters stay finite.

        The optimiser still steps, by its momentum and weight decay.

        Args:
            norm: of the gradients, the same on every rank.
            parameters: those in training; under FSDP2 their gradients are sharded.
            scaled: AMP's scaler is at work: it finds overflows in the course of things, skips such steps itself and lowers
                its scale, so they are nobody's fault and nothing is zeroed or counted.
        """
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        finite = norm.detach().isfinite()
        self._steps.append(finite)
        self._scaled = scaled
        # to read a number in host memory is to wait for nothing
        if scaled or (finite.device.type == "cpu" and finite):
            return
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                gradient.masked_fill_(~finite, 0.0)

    def state(self) -> dict[str, Tensor]:
        """What has been noted since the last `flush`, for a checkpoint of this rank."""
        frames = torch.cat(self._frames) if self._frames else torch.empty(0, 3, dtype=torch.int64)
        steps = torch.stack(self._steps) if self._steps else torch.empty(0, dtype=torch.bool)
        return {_FRAMES: frames, _STEPS: steps, _STREAK: torch.tensor(self.streak)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self._frames, self._steps = [state[_FRAMES]], list(state[_STEPS].unbind())
        self.streak = int(state[_STREAK])

    def flush(self, accelerator: Accelerator) -> tuple[Counter[BadFrame], list[bool]]:
        """Read what was collected, on every rank the same, and start anew; a collective.

        Returns:
            how often each bad frame was met, of a sample its first; and of every optimiser step whether its gradient was finite,
            where AMP's scaler does not look after them.
        """
        device = accelerator.device
        noted = torch.cat(self._frames) if self._frames else torch.empty(0, 3, dtype=torch.int64, device=device)
        noted = noted[noted[:, 1] != FINE]
        # ranks have noted different numbers of frames
        padded = accelerator.pad_across_processes(noted, dim=0, pad_index=FINE)
        everywhere = accelerator.gather(padded)
        assert isinstance(everywhere, Tensor)
        frames = Counter(
            BadFrame(KINDS[kind], index, episode) for kind, index, episode in everywhere.tolist() if index != FINE
        )
        steps: list[bool] = torch.stack(self._steps).tolist() if self._steps else []
        finite = [place for place, good in enumerate(reversed(steps)) if good]
        self.streak = finite[0] if finite else self.streak + len(steps)
        self._frames, self._steps = [], []
        return frames, [] if self._scaled else steps


def _note_losses(watch: NonFiniteWatch, _policy: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook: the chunks whose loss is not finite, of forwards that train."""
    if torch.is_grad_enabled() and isinstance(output[0], ObjectiveOutput):
        watch.add_losses(output[0], inputs[0])
