"""Says, once, where more than a few per cent of the segments that are read hold nothing to learn from, whatever the cause.

LeRobot pads what lies past an episode's end, and an anchor never does: in a dataset in order no segment is wholly masked.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int
from torch import Tensor

from ptr_hf.data.screening import FINE, Screen
from ptr_hf.data.segments import ACTION, PAD_SUFFIX

MANY = 0.05
"""Share of wholly masked segments from which on it is said."""

logger = logging.getLogger(__name__)


def many_masked(masked: int, segments: int, where: str) -> str | None:
    """The sentence, where it has to be said.

    Args:
        masked: segments without an action that counts.
        segments: of how many.
        where: they were read, such as "up to step 50".
    """
    if masked < 2 or masked <= MANY * segments:
        return None
    return (
        f"{masked} of the {segments} segments {where} are wholly masked: nothing is learned from them. Values that are not "
        "finite or cannot be read do that, which are named where they are met; so do wrong bounds of episodes in meta/episodes."
    )


def saying_masked(batches: Iterable[dict[str, Any]], screen: Screen | None = None) -> Iterator[dict[str, Any]]:
    """Pass the collated batches of one reading on; where many of their segments were wholly masked, warn at the end.

    Args:
        batches: collated segments.
        screen: leaves those out that are not finite or could not be read, which the warning names.
    """
    masked = segments = 0
    bad: dict[int, int] = {}
    for batch in batches:
        if screen is not None:
            batch, frames = screen.before(batch)
            found = zip(frames.tolist(), batch["episode_index"].tolist(), strict=True)
            bad |= {frame: episode for frame, episode in found if frame != FINE}
        pads = batch[ACTION + PAD_SUFFIX]
        masked, segments = masked + int(pads.all(dim=1).sum()), segments + len(pads)
        yield batch
    if bad:
        named = ", ".join(f"{frame} (episode {episode})" for frame, episode in sorted(bad.items())[:10])
        logger.warning(
            "%d frames hold values that are not finite (NaN or Inf) or cannot be read: segments that need them are left out. "
            "Dataset indices: %s%s.",
            len(bad),
            named,
            f" and {len(bad) - 10} more" if len(bad) > 10 else "",
        )
    if sentence := many_masked(masked, segments, "that were read"):
        logger.warning("%s", sentence)


class MaskedSegments:
    """Counts the wholly masked segments of a run; what is on the device stays there until `read`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew, with a new run."""
        self._counts: Int[Tensor, 2] | None = None
        self._seen = (0, 0)
        self._said = False

    def add(self, masked: Bool[Tensor, " segments"]) -> None:
        """Note a batch: which of its segments are wholly masked."""
        self._add(torch.stack([masked.sum(), torch.full_like(masked.sum(), len(masked))]))

    def discount(self, repeated: Bool[Tensor, " segments"]) -> None:
        """Segments that are masked because the loader repeats them to fill a batch do not count."""
        self._add(-repeated.sum().expand(2))

    def _add(self, counts: Int[Tensor, "2"]) -> None:
        # what a loader repeats is counted before it reaches the device
        self._counts = counts if self._counts is None else self._counts.to(counts.device, non_blocking=True) + counts

    def read(self, accelerator: Accelerator, step: int) -> str | None:
        """The sentence, if it has not been said; a collective, at logging steps."""
        if self._said:
            return None
        new = torch.zeros(2, dtype=torch.int64) if self._counts is None else self._counts
        total = accelerator.reduce(new.to(accelerator.device), reduction="sum")
        assert isinstance(total, Tensor)
        self._counts, (masked, segments) = None, total.tolist()
        return self.count(masked, segments, f"read up to step {step}")

    def count(self, masked: int, segments: int, where: str) -> str | None:
        """Note so many of so many segments; the sentence of `many_masked`, if it has not been said."""
        self._seen = (self._seen[0] + masked, self._seen[1] + segments)
        sentence = None if self._said else many_masked(*self._seen, where)
        self._said = self._said or sentence is not None
        return sentence
