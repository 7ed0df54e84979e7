"""What was not finite in a run: frames by name, in a file and in sentences."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ptr_hf.report.files import beside_the_run, put_aside, replacing
from ptr_hf.report.text import visible

NONFINITE_FILE = "ptr_nonfinite.json"
NAMED = 10
"""Frames that a warning names; the file has all."""

Kind = Literal["values", "loss", "evaluation"]
KINDS: tuple[Kind, ...] = get_args(Kind)

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
            frames = Counter({_frame(row): int(row["times"]) for row in kept["frames"]})
            gradients = int(kept["gradients"])
        # JSON of another kind has other types where these keys are
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            if self._writes:
                put_aside(self._path, error)
            return
        self.frames, self.gradients = frames, gradients

    def add(self, frames: Counter[BadFrame], gradients: int) -> dict[Kind, list[BadFrame]]:
        """Keep a window's frames and number of bad gradients, and write the file; returns the frames that are new, by kind."""
        if not frames and not gradients:
            return {}
        new = sorted(frames.keys() - self.frames.keys())
        self.frames += frames
        self.gradients += gradients
        if self._writes:
            rows = [{**asdict(frame), "times": times} for frame, times in sorted(self.frames.items())]
            text = json.dumps({"frames": rows, "gradients": self.gradients}, indent=2)
            try:
                with replacing(self._path) as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                logger.error(f"{self._path} could not be written ({error}); the next one found is written with these.")
        return by_kind(new)


def by_kind(frames: Iterable[BadFrame]) -> dict[Kind, list[BadFrame]]:
    """Frames in order, by what was not finite."""
    return {kind: found for kind in KINDS if (found := sorted(frame for frame in frames if frame.kind == kind))}


def _frame(row: dict[str, Any]) -> BadFrame:
    kind = KINDS[KINDS.index(row["kind"])]
    return BadFrame(kind, int(row["index"]), int(row["episode"]), str(row.get("source", "")))


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
