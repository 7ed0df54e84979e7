"""What was not finite in training: counted on the device, read at logging steps, named, and kept out of the parameters."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ptr_hf.data.screening import FINE
from ptr_hf.method import ObjectiveOutput
from ptr_hf.report.files import beside_the_run, put_aside, replacing
from ptr_hf.report.text import visible

NONFINITE_FILE = "ptr_nonfinite.json"
PATIENCE = 10
"""Steps in a row without a finite gradient before training stops, or a logging window, if that is longer."""
NAMED = 10
"""Frames that a warning names; the file has all."""

Kind = Literal["values", "loss", "evaluation"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FRAMES, _STEPS, _STREAK = "nonfinite.frames", "nonfinite.steps", "nonfinite.streak"
_MEANING: dict[Kind, str] = {
    "values": "recorded values that are not finite (NaN or Inf): samples that hold one have no say in training",
    "loss": "finite values but a loss that is not finite (values far too large?): the chunks that begin there have no say, and "
    "a step whose gradient they spoil is left out",
    "evaluation": "recorded values that are not finite (NaN or Inf): samples that hold one are no part of the evaluation loss",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class BadFrame:
    """A frame and what was not finite: "values" and "evaluation" as recorded, "loss" of the chunk that begins there.

    `source` names its dataset in a mixture, and index and episode are that dataset's own.
    """

    kind: Kind
    index: int
    episode: int
    source: str = ""


@dataclass
class NonFiniteWindow:
    """What a logging window held, over all ranks.

    Attributes:
        frames: how often each bad frame was met; of a sample its first.
        steps: per optimiser step whether its gradient was finite; of steps that AMP's scaler looks after nothing.
    """

    frames: Counter[BadFrame] = field(default_factory=Counter)
    steps: list[bool] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """For the log row."""
        samples = sum(times for frame, times in self.frames.items() if frame.kind != "evaluation")
        return {"nonfinite_samples": float(samples), "nonfinite_gradients": float(self.steps.count(False))}


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
    def guard(self, norm: Tensor | float | None, parameters: Iterable[nn.Parameter], scaled: bool = False) -> None:
        """Zero every gradient of a step whose norm is not finite, without looking at it: the parameters stay finite.

        The optimiser still steps, by its momentum and weight decay.

        Args:
            norm: of the gradients, the same on every rank; None where DeepSpeed keeps it to itself.
            parameters: those in training; under FSDP2 their gradients are sharded.
            scaled: AMP's scaler is at work: it finds overflows in the course of things, skips such steps itself and lowers
                its scale, so they are nobody's fault and nothing is zeroed or counted.
        """
        if norm is None:
            return
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

    def flush(self, accelerator: Accelerator) -> NonFiniteWindow:
        """Read what was collected, on every rank the same, and start anew; a collective."""
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
        window = NonFiniteWindow(frames, [] if self._scaled else steps)
        self._frames, self._steps = [], []
        return window


class NonFiniteRecord:
    """Every bad frame of a run, in `ptr_nonfinite.json`; each is warned about once.

    Args:
        path: of the file.
        resumed: go on with the file that is there, else it is deleted. What a killed run met after its checkpoint is then
            counted twice.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, resumed: bool, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self.frames: Counter[BadFrame] = Counter()
        self.gradients = 0
        if resumed and path.is_file():
            self._read()
        elif writes:
            with beside_the_run(f"{path} of an earlier run could not be removed"):
                path.unlink(missing_ok=True)

    def _read(self) -> None:
        """Go on with the file that is there; one that cannot be read is put aside."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            frames = Counter(
                {BadFrame(**{"source": "", **row}): times for row, times in map(_taken_apart, kept["frames"])}
            )
            if not all(type(number) is int for number in (kept["gradients"], *frames.values())):
                raise ValueError("it has counts that are no numbers")
        # JSON of another kind has other types where these keys are
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            if self._writes:
                put_aside(self._path, error)
            return
        self.frames, self.gradients = frames, kept["gradients"]

    def add(self, window: NonFiniteWindow) -> dict[Kind, list[BadFrame]]:
        """Keep a window's frames and write the file; returns those that are new, by kind."""
        gradients = window.steps.count(False)
        if not window.frames and not gradients:
            return {}
        new = sorted(window.frames.keys() - self.frames.keys())
        self.frames += window.frames
        self.gradients += gradients
        if self._writes:
            rows = [{**asdict(frame), "times": times} for frame, times in sorted(self.frames.items())]
            text = json.dumps({"frames": rows, "gradients": self.gradients}, indent=2)
            try:
                with replacing(self._path) as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                logger.error(f"{self._path} could not be written ({error}); the next one found is written with these.")
        return {kind: frames for kind in KINDS if (frames := [frame for frame in new if frame.kind == kind])}


def _taken_apart(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A row of the file as the fields of a frame, and how often it was met."""
    fields = {name: value for name, value in row.items() if name != "times"}
    numbers = all(type(fields[name]) is int for name in ("index", "episode"))
    if fields["kind"] not in KINDS or not numbers or type(fields.get("source", "")) is not str:
        raise ValueError("it has a frame without kind, index and episode")
    return fields, row["times"]


def describe(kind: Kind, frames: Sequence[BadFrame]) -> str:
    """A sentence that names bad frames and says what they mean and what to do."""
    places = (
        f"episode {frame.episode}" + (f" of {visible(frame.source)}" if frame.source else "")
        for frame in frames[:NAMED]
    )
    named = ", ".join(f"{frame.index} ({place})" for frame, place in zip(frames, places, strict=False))
    more = f" and {len(frames) - NAMED} more" if len(frames) > NAMED else ""
    count = "1 frame" if len(frames) == 1 else f"{len(frames)} frames"
    return (
        f"{count} with {_MEANING[kind]}. Dataset indices: {named}{more}. Mend these recordings or leave their episodes out; "
        f"{NONFINITE_FILE} lists every one met."
    )
