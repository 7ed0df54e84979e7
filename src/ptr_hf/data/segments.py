"""Segments: one training sample is T consecutive chunks of one episode plus the observation that followed each chunk.

LeRobot reads frames at fixed offsets from an anchor frame (`delta_timestamps`). A `SegmentLayout` lists the offsets a
segment needs, each of them once, and `split_segment` turns the batch that comes back into plain policy batches (one row a
chunk) and futures that lie apart, where no policy looks for its inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ACTION = "action"
OBSERVATION_PREFIX = "observation."
IMAGE_PREFIX = "observation.image"
LANGUAGE_PREFIX = "observation.language"
PAD_SUFFIX = "_is_pad"


@dataclass(frozen=True)
class SegmentLayout:
    """Which frames a segment reads, as offsets (in frames) from its anchor.

    Args:
        observation_steps: the base policy's own observation offsets, e.g. `(0,)` or `(-1, 0)`; None when the policy takes
            observations without a time axis.
        action_steps: the base policy's own action offsets, e.g. `0..L-1`.
        segment_length: T, chunks per segment.
        chunk_stride: frames between the starts of two chunks.
        consequence_offset: Δ, frames from a chunk's start to its consequence; None reads no futures (plain fine-tuning).
    """

    observation_steps: tuple[int, ...] | None
    action_steps: tuple[int, ...]
    segment_length: int
    chunk_stride: int
    consequence_offset: int | None

    @property
    def chunk_starts(self) -> tuple[int, ...]:
        return tuple(t * self.chunk_stride for t in range(self.segment_length))

    @property
    def _steps(self) -> tuple[int, ...]:
        return self.observation_steps or (0,)

    @property
    def future_offsets(self) -> tuple[int, ...]:
        """Offset of each chunk's consequence; empty without futures."""
        if self.consequence_offset is None:
            return ()
        return tuple(start + self.consequence_offset for start in self.chunk_starts)

    @property
    def observation_offsets(self) -> list[int] | None:
        """Every observation offset of the segment, sorted, each once: no frame is decoded twice."""
        if self.observation_steps is None and self.segment_length == 1 and self.consequence_offset is None:
            return None
        current = {start + step for start in self.chunk_starts for step in self._steps}
        return sorted(current | set(self.future_offsets))

    @property
    def action_offsets(self) -> list[int]:
        """Every action offset of the segment, sorted, each once."""
        return sorted({start + step for start in self.chunk_starts for step in self.action_steps})

    @property
    def is_plain(self) -> bool:
        """True when the layout is the base policy's own: one chunk, no future."""
        return self.segment_length == 1 and self.consequence_offset is None

    def future_chunk(self, t: int) -> int | None:
        """The chunk whose current view is chunk t's consequence (Δ a multiple of the stride), or None."""
        if len(self._steps) != 1:
            return None
        position = self.future_offsets[t] - self._steps[0]
        return self.chunk_starts.index(position) if position in self.chunk_starts else None

    def delta_timestamps(self, feature_keys: list[str], fps: float | int) -> dict[str, list[float]]:
        """LeRobot's `delta_timestamps` (seconds) for the dataset's observation and action features."""
        deltas: dict[str, list[float]] = {}
        for key in feature_keys:
            if key == ACTION:
                deltas[key] = [step / fps for step in self.action_offsets]
            elif key.startswith(OBSERVATION_PREFIX) and self.observation_offsets is not None:
                deltas[key] = [step / fps for step in self.observation_offsets]
        return deltas


@dataclass
class Segment:
    """A batch of B segments as N = T·B chunk rows, time-major: row = t·B + b.

    Attributes:
        chunks: a plain LeRobot policy batch of N rows; it holds no future frame.
        futures: per observation key the frames that followed, (F, B, ...), one per distinct consequence offset.
        future_index: (T,) which of the F futures belongs to chunk t.
        future_valid: (N,) False where the consequence lies past the episode's end (LeRobot repeats the last frame there).
        chunk_valid: (N,) False where the whole chunk lies past the episode's end.
        index, target_index: (N,) dataset index of the chunk's first frame and of its consequence.
        episode, task: (N,) as recorded.
        batch_size, length: B and T.
    """

    chunks: dict[str, Any]
    futures: dict[str, Tensor]
    future_index: tuple[int, ...]
    future_valid: Bool[Tensor, " rows"]
    chunk_valid: Bool[Tensor, " rows"]
    index: Int[Tensor, " rows"]
    target_index: Int[Tensor, " rows"]
    episode: Int[Tensor, " rows"]
    task: Int[Tensor, " rows"]
    batch_size: int
    length: int

    def rows(self, t: int) -> slice:
        """The rows of the t-th chunk of every segment."""
        return slice(t * self.batch_size, (t + 1) * self.batch_size)

    def chunk(self, t: int) -> dict[str, Any]:
        """The t-th chunk of every segment as a policy batch of B rows."""
        return select_rows(self.chunks, self.rows(t))


def select_rows(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The given rows of a policy batch; entries that are neither tensors nor lists pass through."""
    return {
        key: value[rows] if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0) else value
        for key, value in batch.items()
    }


def split_segment(batch: dict[str, Any], layout: SegmentLayout) -> Segment:
    """Cut a collated (and preprocessed) batch of segments into chunks and futures.

    Args:
        batch: observations (B, V, ...) at `layout.observation_offsets` with their `<key>_is_pad` (B, V), action
            (B, A, d) at `layout.action_offsets` with `action_is_pad`, LeRobot's `index`, `episode_index`, `task_index` (B,).
        layout: the offsets the batch was read with.

    Raises:
        ValueError: when the batch was not read with this layout.
    """
    offsets = layout.observation_offsets
    for key in (ACTION, ACTION + PAD_SUFFIX, "index", "episode_index", "task_index"):
        if key not in batch:
            raise ValueError(f"The batch has no {key!r}; build the dataset with `layout.delta_timestamps`.")
    action = batch[ACTION]
    if action.ndim < 3 or action.shape[1] != len(layout.action_offsets):
        held = f"{action.shape[1]} actions per sample" if action.ndim > 2 else "actions that have no time axis"
        raise ValueError(
            f"The batch holds {held} but the segment layout reads {len(layout.action_offsets)}; build the dataset with "
            "`layout.delta_timestamps`."
        )
    batch_size, length, device = action.shape[0], layout.segment_length, action.device
    action_rows = _positions(layout.action_offsets, layout.chunk_starts, layout.action_steps, device)

    chunks: dict[str, Any] = {}
    futures: dict[str, Tensor] = {}
    unique_futures = sorted(set(layout.future_offsets))
    # Every observation is read at the same offsets, so one mask speaks for all, renamed keys included.
    pads = [value for key, value in batch.items() if key.startswith(OBSERVATION_PREFIX) and key.endswith(PAD_SUFFIX)]
    if unique_futures and not pads:
        raise ValueError(
            "The batch has no `observation.*_is_pad`, which tells recorded consequences from repeated last frames; build "
            "the dataset with `layout.delta_timestamps` and a preprocessor that keeps these keys."
        )
    for key, value in batch.items():
        if key == ACTION or key == ACTION + PAD_SUFFIX:
            chunks[key] = _take(value, action_rows)
        elif key.startswith(OBSERVATION_PREFIX) and key.endswith(PAD_SUFFIX):
            continue
        elif offsets is not None and key.startswith(OBSERVATION_PREFIX) and not key.startswith(LANGUAGE_PREFIX):
            if len(offsets) == 1 and key.startswith(IMAGE_PREFIX) and value.ndim == 4:
                # LeRobot drops the time axis of a single video frame
                value = value.unsqueeze(1)
            if value.shape[1] != len(offsets):
                raise ValueError(
                    f"{key} holds {value.shape[1]} frames per sample but the segment layout reads {len(offsets)}; build the "
                    "dataset with `layout.delta_timestamps`."
                )
            current = _positions(offsets, layout.chunk_starts, layout.observation_steps or (0,), device)
            chunks[key] = _take(value, current)
            if layout.observation_steps is None:
                chunks[key] = chunks[key].squeeze(1)
            if unique_futures:
                position = torch.tensor([offsets.index(offset) for offset in unique_futures], device=device)
                futures[key] = value.index_select(1, position).transpose(0, 1)
        elif isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch_size:
            chunks[key] = value.repeat(length, *[1] * (value.ndim - 1))
        elif isinstance(value, list) and len(value) == batch_size:
            chunks[key] = value * length
        else:
            chunks[key] = value

    starts = torch.tensor(layout.chunk_starts, device=device).repeat_interleave(batch_size)
    index = batch["index"].repeat(length) + starts
    chunk_valid = ~chunks[ACTION + PAD_SUFFIX].all(dim=1)
    future_index = tuple(unique_futures.index(offset) for offset in layout.future_offsets)
    if offsets is not None and unique_futures:
        positions = torch.tensor([offsets.index(offset) for offset in layout.future_offsets], device=device)
        future_valid = ~pads[0].index_select(1, positions).T.reshape(-1) & chunk_valid
    else:
        future_valid = torch.zeros_like(chunk_valid)
    return Segment(
        chunks=chunks,
        futures=futures,
        future_index=future_index,
        future_valid=future_valid,
        chunk_valid=chunk_valid,
        index=index,
        target_index=index + (layout.consequence_offset or 0),
        episode=batch["episode_index"].repeat(length),
        task=batch["task_index"].repeat(length),
        batch_size=batch_size,
        length=length,
    )


def _positions(
    offsets: list[int], starts: tuple[int, ...], steps: tuple[int, ...], device: torch.device
) -> Int[Tensor, "chunks steps"]:
    where = {offset: position for position, offset in enumerate(offsets)}
    return torch.tensor([[where[start + step] for step in steps] for start in starts], device=device)


def _take(value: Tensor, positions: Int[Tensor, "chunks steps"]) -> Tensor:
    """(B, V, ...) at (T, K) positions -> (T·B, K, ...), time-major."""
    picked = value[:, positions]
    return picked.transpose(0, 1).reshape(-1, positions.shape[1], *value.shape[2:])
