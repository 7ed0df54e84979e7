"""Recorded values that are not finite: found before the forward, made harmless, and named.

One NaN in one sample of a batch makes every gradient NaN, also where the sample's loss is masked, because 0 · NaN is NaN in
the backward pass. So a sample with such a value is made finite and marked as padding: then it has weight 0, no target, is
nobody's candidate, and enters no statistic. Nothing here waits for the device.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ptr_hf.data.segments import ACTION, FUTURE_PAD, IMAGE_PREFIX, PAD_SUFFIX, SegmentLayout, is_rows

FINE = -1
"""Stands for "no frame" where frames are named."""
_NEVER = 1 << 40


def leave_out(batch: dict[str, Any], left_out: Bool[Tensor, " samples"]) -> dict[str, Any]:
    """Mark samples of a batch as padding, which takes their say; their values must be finite, and are not touched.

    Args:
        batch: collated segments, or rows that `segment_rows` has laid out.
        left_out: one entry a sample (a segment; a row where the batch is laid out).
    """
    return {
        key: value | _along(left_out, value) if key.endswith(PAD_SUFFIX) and isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


class Screen:
    """Finds samples whose recorded values are not finite, in two passes around the policy's preprocessor.

    `before` looks at what was recorded; `after` at what the preprocessor made of it (a finite value may overflow there) and
    gives samples that are left out neutral values: zeros, the mean of normalised data. A policy that is trained by its own
    loss may ignore `action_is_pad`, so without a scorer a copy of a good sample of the batch takes the place instead.

    Args:
        layout: at which the batches are read.
        features: the policy's observations under its own names; whatever else a dataset holds is not looked at.
        renames: dataset key -> policy key.
        substitute: copy a good sample over each that is left out.
    """

    def __init__(
        self,
        layout: SegmentLayout,
        features: Collection[str],
        renames: Mapping[str, str] | None = None,
        substitute: bool = False,
    ) -> None:
        self.layout = layout
        self.substitute = substitute
        self._read = {ACTION, *features}
        self._renames = dict(renames or {})

    def reads(self, key: str) -> bool:
        """Whether the policy reads what the dataset calls by this key."""
        return self._renames.get(key, key) in self._read

    def before(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Int[Tensor, " segments"]]:
        """Collated segments with finite values, those that had others left out; and the first bad frame of each.

        Returns:
            the batch, and per segment the dataset index of its first bad frame (its own index, where only frames that are
            repeated past the episode's end are bad), or FINE. A batch without actions, as a robot gives it, and one that is
            laid out already come back as they are, with no entries.
        """
        if batch.get(ACTION) is None or is_rows(batch):
            return batch, torch.empty(0, dtype=torch.int64)
        first = torch.full_like(batch["index"], _NEVER)
        found = torch.zeros_like(first, dtype=torch.bool)
        screened = dict(batch)
        for key, value in batch.items():
            if not self.reads(key) or not _is_floating(value):
                continue
            offsets = self.layout.action_offsets if key == ACTION else self.layout.observation_offsets or [0]
            # LeRobot drops the time axis of a single frame, so the shape alone does not tell the steps
            bad = ~value.reshape(len(value), len(offsets), -1).isfinite().all(dim=2)
            found = found | bad.any(dim=1)
            own = bad & ~batch[key + PAD_SUFFIX] if key + PAD_SUFFIX in batch else bad
            place = _offsets(tuple(offsets), value.device).masked_fill(~own, _NEVER)
            first = torch.minimum(first, place.amin(dim=1))
            screened[key] = value.nan_to_num(0.0, 0.0, 0.0)
        frame = batch["index"] + torch.where(first < _NEVER, first, 0)
        return leave_out(screened, found), torch.where(found, frame, FINE)

    def after(
        self, rows: dict[str, Any], frames: Int[Tensor, " segments"]
    ) -> tuple[dict[str, Any], Int[Tensor, " segments"]]:
        """The same for rows that the preprocessor returned; states and actions alone, for frames cannot overflow.

        Args:
            rows: of a batch that `before` has seen.
            frames: as `before` gave them.

        Returns:
            the rows, and the frames; a sample that has become bad is named by its first frame.
        """
        if not len(frames):
            return rows, frames
        total = len(rows[FUTURE_PAD])
        vectors = {
            key: value
            for key, value in rows.items()
            if key in self._read
            and not key.startswith(IMAGE_PREFIX)
            and _is_floating(value)
            and value.shape[:1] == (total,)
        }
        bad = torch.zeros_like(rows[FUTURE_PAD])
        for value in vectors.values():
            bad = bad | ~value.reshape(total, -1).isfinite().all(dim=1)
        found = (frames != FINE) | bad.view(-1, len(frames)).any(dim=0)
        frames = torch.where(found & (frames == FINE), rows["index"][: len(frames)], frames)
        left_out = found.repeat(total // len(frames))
        rows = {**rows, **{key: value.masked_fill(_along(left_out, value), 0.0) for key, value in vectors.items()}}
        if self.substitute:
            rows = self._substituted(rows, found)
        return leave_out(rows, left_out), frames

    def _substituted(self, rows: dict[str, Any], left_out: Bool[Tensor, " segments"]) -> dict[str, Any]:
        """A copy of the first good sample in the place of each that is left out; what is no tensor (text) stays its own."""
        size, total = len(left_out), len(rows[FUTURE_PAD])
        donor = torch.where(left_out, (~left_out).int().argmax(), torch.arange(size, device=left_out.device))
        taken = (torch.arange(0, total, size, device=left_out.device)[:, None] + donor).flatten()
        substituted = dict(rows)
        for key, value in rows.items():
            if key in ("index", "episode_index") or key.endswith(PAD_SUFFIX):
                continue
            # some processors lay out several entries a row, image patches for one
            if isinstance(value, Tensor) and value.ndim and len(value) % total == 0:
                substituted[key] = value.unflatten(0, (total, -1)).index_select(0, taken).flatten(0, 1)
        return substituted


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _along(samples: Bool[Tensor, " samples"], value: Tensor) -> Tensor:
    return samples.view(-1, *[1] * (value.ndim - 1))


@cache
def _offsets(offsets: tuple[int, ...], device: torch.device) -> Int[Tensor, " steps"]:
    return torch.tensor(offsets, device=device)
