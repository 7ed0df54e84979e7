"""Segments: one training sample is T consecutive chunks of one episode plus the observation that followed each chunk.

LeRobot reads frames at fixed offsets from an anchor frame (`delta_timestamps`). A `SegmentLayout` lists the offsets a
segment needs, each of them once. `segment_rows` lays the batch that comes back out as plain rows for the policy's own
preprocessor, and `split_segment` cuts what the preprocessor returns into a plain policy batch (one row a chunk) and futures
that lie apart, where no policy looks for its inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ptr_hf.constants import ACTION, CAMERA_MASK_SUFFIX

OBSERVATION_PREFIX = "observation."
IMAGE_PREFIX = "observation.image"
LANGUAGE_PREFIX = "observation.language"
PAD_SUFFIX = "_is_pad"
OBS_SOURCE = "observation.source"
"""Number of the dataset of a mixture that a sample is from; the embodiment's processor takes it out again."""
SOURCE_INDEX = "source_index"
"""The same in rows, as the policy gets them; absent where there is one dataset."""
CHUNK_PREFIX = "chunk."
"""Before a per-frame column (`chunk.task`): its values at the first frame of every chunk of a segment."""
FUTURE_PAD = "future_is_pad"
"""Says, in rows, which chunk's consequence was not recorded; LeRobot's pipelines keep keys with this ending."""


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
        return self._chunk_showing(self.future_offsets[t])

    @property
    def lone_futures(self) -> tuple[int, ...]:
        """Consequence offsets, sorted, that no chunk has as its present."""
        return tuple(offset for offset in sorted(set(self.future_offsets)) if self._chunk_showing(offset) is None)

    def view_of(self, future: int) -> int:
        """Which block of rows shows a consequence: a chunk's, or one after the chunks'."""
        chunk = self._chunk_showing(future)
        return self.segment_length + self.lone_futures.index(future) if chunk is None else chunk

    def _chunk_showing(self, offset: int) -> int | None:
        position = offset - self._steps[-1]
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
        futures: per observation key the frames that followed, F of (B, ...), one per distinct consequence offset.
        future_index: (T,) which of the F futures belongs to chunk t.
        future_valid: (N,) False where the consequence lies past the episode's end (LeRobot repeats the last frame there).
        chunk_valid: (N,) False where the whole chunk lies past the episode's end.
        index, target_index: (N,) dataset index of the chunk's first frame and of its consequence.
        episode, task: (N,) as recorded at the chunk's first frame.
        source: (N,) number of the dataset in its mixture; 0 where there is one.
        batch_size, length: B and T.
    """

    chunks: dict[str, Any]
    futures: dict[str, list[Tensor]]
    future_index: tuple[int, ...]
    future_valid: Bool[Tensor, " rows"]
    chunk_valid: Bool[Tensor, " rows"]
    index: Int[Tensor, " rows"]
    target_index: Int[Tensor, " rows"]
    episode: Int[Tensor, " rows"]
    task: Int[Tensor, " rows"]
    source: Int[Tensor, " rows"]
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


def is_rows(batch: dict[str, Any]) -> bool:
    """Whether a batch has been laid out by `segment_rows`."""
    return FUTURE_PAD in batch


def segment_rows(batch: dict[str, Any], layout: SegmentLayout) -> dict[str, Any]:
    """Lay collated segments out as rows of a plain LeRobot batch, so that a policy's preprocessor sees nothing unusual.

    The first T·B rows are the chunks, time-major; after them come B rows for every consequence that no chunk has as its
    present, with an action that is all padding. A frame that a policy reads once appears once.

    Args:
        batch: observations (B, V, ...) at `layout.observation_offsets` with their `<key>_is_pad` (B, V), action
            (B, A, d) at `layout.action_offsets` with `action_is_pad`, LeRobot's `index`, `episode_index`, `task_index` (B,);
            per-frame columns of every chunk (B, T, ...) under `CHUNK_PREFIX`, texts as T lists of B. Without these, every
            chunk is given the anchor's.
            An observation without actions (at inference), and rows that are laid out already, come back as they are.
        layout: the offsets the batch was read with.

    Raises:
        ValueError: when the batch was not read with this layout.
    """
    if batch.get(ACTION) is None or is_rows(batch):
        return batch
    batch = as_vectors(batch, layout)
    _check_segments(batch, layout)
    action = batch[ACTION]
    batch_size, device = action.shape[0], action.device
    offsets, steps = layout.observation_offsets, layout.observation_steps or (0,)
    action_rows = _positions(layout.action_offsets, layout.chunk_starts, layout.action_steps, device)
    chunk_views = [[start + step for step in steps] for start in layout.chunk_starts]
    # a policy that reads several observations gets a lone future in all their places
    views = chunk_views + [[offset] * len(steps) for offset in layout.lone_futures]
    blocks, extra = len(views), len(layout.lone_futures)

    rows: dict[str, Any] = {}
    for key, value in batch.items():
        if key in (ACTION, ACTION + PAD_SUFFIX):
            taken = _take(value, action_rows)
            unseen = torch.full_like(taken[:1], key != ACTION).expand(extra * batch_size, *taken.shape[1:])
            rows[key] = torch.cat([taken, unseen]) if extra else taken
        elif (key.startswith(OBSERVATION_PREFIX) and key.endswith(PAD_SUFFIX)) or CHUNK_PREFIX + key in batch:
            continue
        elif key.startswith(CHUNK_PREFIX):
            rows[key.removeprefix(CHUNK_PREFIX)] = _of_each_chunk(key, value, layout.segment_length, extra)
        elif offsets is not None and _is_recorded(key) and not (key.endswith(CAMERA_MASK_SUFFIX) and value.ndim == 1):
            if len(offsets) == 1 and key.startswith(IMAGE_PREFIX) and value.ndim == 4:
                # LeRobot drops the time axis of a single video frame
                value = value.unsqueeze(1)
            if value.shape[1] != len(offsets):
                raise ValueError(
                    f"{key} holds {value.shape[1]} frames per sample but the segment layout reads {len(offsets)}; build the "
                    "dataset with `layout.delta_timestamps`."
                )
            where = torch.tensor([[offsets.index(offset) for offset in view] for view in views], device=device)
            rows[key] = _take(value, where)
            if layout.observation_steps is None or key.endswith(CAMERA_MASK_SUFFIX):
                # whether a camera exists does not change within a row
                rows[key] = rows[key][:, -1]
        elif isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch_size:
            rows[key] = value.repeat(blocks, *[1] * (value.ndim - 1))
        elif isinstance(value, list) and len(value) == batch_size:
            rows[key] = value * blocks
        else:
            rows[key] = value
    for key in [key for key in rows if key.endswith(CAMERA_MASK_SUFFIX)]:
        rows[key] = rows[key].reshape(blocks * batch_size).bool()

    starts = torch.tensor([*layout.chunk_starts, *layout.lone_futures], device=device)
    rows["index"] = batch["index"].repeat(blocks) + starts.repeat_interleave(batch_size)
    rows[FUTURE_PAD] = _future_pad(batch, layout, blocks)
    return rows


def as_vectors(batch: dict[str, Any], layout: SegmentLayout) -> dict[str, Any]:
    """Collated segments whose actions and states are vectors: LeRobot gives numbers where a vector has one entry."""
    steps = 0 if layout.observation_offsets is None else 1
    return {
        key: value.unsqueeze(-1)
        if isinstance(value, Tensor)
        and ((key == ACTION and value.ndim == 2) or (_is_state(key) and value.ndim == steps + 1))
        else value
        for key, value in batch.items()
    }


def _is_state(key: str) -> bool:
    return _is_recorded(key) and not key.startswith(IMAGE_PREFIX)


def split_segment(batch: dict[str, Any], layout: SegmentLayout) -> Segment:
    """Cut a batch of segments into chunks and futures; nothing is copied from rows that are laid out already.

    Args:
        batch: what `segment_rows` returned, after the policy's preprocessor; or collated segments as it takes them.
        layout: the offsets the batch was read with.

    Raises:
        ValueError: when the batch was not read with this layout.
    """
    if not is_rows(batch):
        for key in (ACTION, "index", "episode_index", "task_index"):
            _require(batch, key)
        batch = segment_rows(batch, layout)
    length = layout.segment_length
    batch_size = len(batch[FUTURE_PAD]) // (length + len(layout.lone_futures))
    chunk_rows = slice(0, length * batch_size)
    chunks = select_rows({key: value for key, value in batch.items() if key != FUTURE_PAD}, chunk_rows)

    offsets = sorted(set(layout.future_offsets))
    futures: dict[str, list[Tensor]] = {}
    for key in (key for key in batch if _is_recorded(key) and offsets):
        blocks = batch[key].split(batch_size)
        # a policy that reads several observations sees the last one as its present
        frames = [blocks[layout.view_of(offset)] for offset in offsets]
        several = layout.observation_steps is not None and not key.endswith(CAMERA_MASK_SUFFIX)
        futures[key] = [frame[:, -1] for frame in frames] if several else frames

    chunk_valid = ~chunks[ACTION + PAD_SUFFIX].all(dim=1)
    return Segment(
        chunks=chunks,
        futures=futures,
        future_index=tuple(offsets.index(offset) for offset in layout.future_offsets),
        future_valid=~batch[FUTURE_PAD][chunk_rows] & chunk_valid,
        chunk_valid=chunk_valid,
        index=chunks["index"],
        target_index=chunks["index"] + (layout.consequence_offset or 0),
        episode=chunks["episode_index"],
        task=chunks["task_index"],
        source=chunks[SOURCE_INDEX] if SOURCE_INDEX in chunks else torch.zeros_like(chunks["task_index"]),
        batch_size=batch_size,
        length=length,
    )


def _check_segments(batch: dict[str, Any], layout: SegmentLayout) -> None:
    for key in (ACTION + PAD_SUFFIX, "index", "episode_index", "task_index"):
        _require(batch, key)
    action = batch[ACTION]
    if action.ndim < 3 or action.shape[1] != len(layout.action_offsets):
        held = f"{action.shape[1]} actions per sample" if action.ndim > 2 else "actions that have no time axis"
        raise ValueError(
            f"The batch holds {held} but the segment layout reads {len(layout.action_offsets)}; build the dataset with "
            "`layout.delta_timestamps`."
        )


def _require(batch: dict[str, Any], key: str) -> None:
    if key not in batch:
        raise ValueError(f"The batch has no {key!r}; build the dataset with `layout.delta_timestamps`.")


def _future_pad(batch: dict[str, Any], layout: SegmentLayout, blocks: int) -> Bool[Tensor, " rows"]:
    """True where a chunk row's consequence was not recorded, and on all rows that are no chunk."""
    missing = torch.ones(blocks * batch[ACTION].shape[0], dtype=torch.bool, device=batch[ACTION].device)
    if not layout.future_offsets:
        return missing
    # Every observation is read at the same offsets, so one mask speaks for all, renamed keys included.
    pads = [value for key, value in batch.items() if key.startswith(OBSERVATION_PREFIX) and key.endswith(PAD_SUFFIX)]
    if not pads:
        raise ValueError(
            "The batch has no `observation.*_is_pad`, which tells recorded consequences from repeated last frames; build "
            "the dataset with `layout.delta_timestamps` and a preprocessor that keeps these keys."
        )
    offsets = layout.observation_offsets
    assert offsets is not None
    positions = torch.tensor([offsets.index(offset) for offset in layout.future_offsets], device=missing.device)
    recorded = pads[0].index_select(1, positions).T.reshape(-1)
    missing[: len(recorded)] = recorded
    return missing


def _is_recorded(key: str) -> bool:
    """Whether a key holds an observation of the dataset, at the layout's offsets."""
    return (
        key.startswith(OBSERVATION_PREFIX)
        and not key.startswith(LANGUAGE_PREFIX)
        and not key.endswith(PAD_SUFFIX)
        and key != OBS_SOURCE
    )


def _of_each_chunk(key: str, value: Tensor | Sequence[Sequence[str]], length: int, extra: int) -> Tensor | list[str]:
    """A column's values at the chunks' first frames as rows; the rows of lone futures, which are no chunk, get the anchor's."""
    by_chunk = value.transpose(0, 1) if isinstance(value, Tensor) else value
    if len(by_chunk) != length:
        raise ValueError(
            f"{key} holds {len(by_chunk)} values per sample but the segment layout has {length} chunks; open the dataset at "
            "this layout."
        )
    blocks = [*range(length), *[0] * extra]
    if isinstance(by_chunk, Tensor):
        return by_chunk[blocks].flatten(0, 1)
    return [text for block in blocks for text in by_chunk[block]]


def sample_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The first sample of a collated batch of segments, without the batch dimension."""
    return {
        key: [texts[0] for texts in value] if key.startswith(CHUNK_PREFIX) and isinstance(value, list) else value[0]
        for key, value in batch.items()
    }


def _positions(
    offsets: list[int], starts: tuple[int, ...], steps: tuple[int, ...], device: torch.device
) -> Int[Tensor, "chunks steps"]:
    where = {offset: position for position, offset in enumerate(offsets)}
    return torch.tensor([[where[start + step] for step in steps] for start in starts], device=device)


def _take(value: Tensor, positions: Int[Tensor, "chunks steps"]) -> Tensor:
    """(B, V, ...) at (T, K) positions -> (T·B, K, ...), time-major."""
    picked = value[:, positions]
    return picked.transpose(0, 1).reshape(-1, positions.shape[1], *value.shape[2:])
