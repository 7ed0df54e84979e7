"""Several LeRobotDatasets read as one: different robots, cameras, rates and schemas, one batch.

`Mixture` reads segments of what `MixtureMetadata` describes; a sample of a source is the same whether the source is alone or
not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as images

from ptr_hf.data.datasets import check_episodes, episode_spans, open_dataset
from ptr_hf.data.in_memory import InMemorySegments, collate_segments, positions_of
from ptr_hf.data.mixture.action_space import to_slots
from ptr_hf.data.mixture.metadata import MixtureMetadata, Source
from ptr_hf.data.segment_dataset import TASK, TASK_INDEX
from ptr_hf.data.segments import (
    ACTION,
    CAMERA_MASK_SUFFIX,
    CHUNK_PREFIX,
    OBS_SOURCE,
    PAD_SUFFIX,
    SegmentLayout,
    as_vectors,
    sample_of,
)


class Mixture(Dataset[dict[str, Any]]):
    """Segments of several datasets, each in the mixture's own form.

    `__getitems__` returns one collated batch; give a DataLoader `collate_fn=collate_segments`. Beside what a LeRobotDataset
    has, a batch holds `observation.source` (B,) and the texts `source` and `embodiment`.

    Args:
        meta: of the mixture.
        layout: the offsets to read.
        in_memory: read the datasets into memory first, as `InMemorySegments` does.
        max_gigabytes: the most that each dataset may take there.

    Attributes:
        meta, layout: as given.
        datasets: open, by source.

    Raises:
        ValueError: a dataset holds nothing to learn from under this layout.
    """

    def __init__(
        self,
        meta: MixtureMetadata,
        layout: SegmentLayout,
        *,
        in_memory: bool = False,
        max_gigabytes: float = 4.0,
    ) -> None:
        self.meta, self.layout = meta, layout
        self.datasets: list[LeRobotDataset] = []
        self._segments: list[LeRobotDataset | InMemorySegments] = []
        for source in meta.sources:
            dataset = open_dataset(
                source.config.dataset, layout, episodes=source.config.episodes, revision=source.config.revision
            )
            check_episodes(source.meta, source.episodes, layout)
            self.datasets.append(dataset)
            self._segments.append(
                InMemorySegments(dataset, layout, max_gigabytes=max_gigabytes) if in_memory else dataset
            )
        self.sizes = tuple(map(len, self.datasets))
        """Samples of every source."""
        self._ends = torch.tensor(self.sizes).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, without the batch dimension."""
        return sample_of(self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A collated batch of the samples at the given positions, in their order.

        Raises:
            IndexError: a position is outside the mixture.
        """
        rows = positions_of(indices, len(self), "mixture")
        number = torch.searchsorted(self._ends, rows, right=True)
        parts, order = [], []
        for source in self.meta.sources:
            own = (number == source.number).nonzero()[:, 0]
            if len(own):
                first = int(self._ends[source.number]) - self.sizes[source.number]
                batch = _read(self._segments[source.number], (rows[own] - first).tolist())
                parts.append(unified(batch, source, self.meta, self.layout))
                order.append(own)
        return _joined(parts, torch.cat(order))

    def episode_spans(self) -> list[tuple[int, int, int]]:
        """(episode, first position, length) of every episode that is read."""
        starts = [int(end) - size for end, size in zip(self._ends, self.sizes, strict=True)]
        return [
            (source.first_episode + episode, start + first, length)
            for source, dataset, start in zip(self.meta.sources, self.datasets, starts, strict=True)
            for episode, first, length in episode_spans(dataset)
        ]


def unified(batch: dict[str, Any], source: Source, meta: MixtureMetadata, layout: SegmentLayout) -> dict[str, Any]:
    """A collated batch of one source in the mixture's form: slots, cameras, and numbers that no other source has."""
    batch = as_vectors(batch, layout)
    count, size = len(batch["index"]), len(meta.state_space)
    result: dict[str, Any] = {
        ACTION: to_slots(batch[ACTION].float(), source.action, len(meta.space)),
        ACTION + PAD_SUFFIX: batch[ACTION + PAD_SUFFIX],
    }
    steps = layout.observation_offsets
    pads = [value for key, value in batch.items() if key.startswith("observation.") and key.endswith(PAD_SUFFIX)]
    if OBS_STATE in meta.features:
        shape = (count, size) if steps is None else (count, len(steps), size)
        state = batch[OBS_STATE].float() if source.state else None
        result[OBS_STATE] = torch.zeros(shape) if state is None else to_slots(state, source.state, size).reshape(shape)
        if steps is not None:
            result[OBS_STATE + PAD_SUFFIX] = pads[0]
    own = {called: key for key, called in source.cameras.items()}
    for key in meta.camera_keys:
        height, width, channels = meta.features[key]["shape"]
        shape = (count, *(() if steps is None else (len(steps),)), channels, height, width)
        recorded = batch[own[key]] if key in own else torch.zeros(shape, dtype=torch.uint8)
        result[key] = resized(recorded, (height, width), meta.transforms_images).reshape(shape)
        result[key + CAMERA_MASK_SUFFIX] = torch.full((count,), key in own)
        if steps is not None:
            result[key + PAD_SUFFIX] = pads[0]
    episode, frame = batch["episode_index"], batch["frame_index"]
    task = source.tasks[batch["task_index"]]
    names = meta.tasks.index
    if CHUNK_PREFIX + TASK_INDEX in batch:
        of_chunks = source.tasks[batch[CHUNK_PREFIX + TASK_INDEX]]
        for key in (CHUNK_PREFIX + "timestamp", CHUNK_PREFIX + "frame_index"):
            result[key] = batch[key]
        result[CHUNK_PREFIX + TASK_INDEX] = of_chunks
        result[CHUNK_PREFIX + TASK] = [tuple(names[number] for number in column) for column in of_chunks.T.tolist()]
    return result | {
        "timestamp": batch["timestamp"],
        "frame_index": frame,
        "episode_index": episode + source.first_episode,
        "index": source.first_frame[episode] + frame,
        "task_index": task,
        "task": [names[number] for number in task.tolist()],
        OBS_SOURCE: torch.full((count,), source.number),
        "source": [source.name] * count,
        "embodiment": [source.robot.name] * count,
    }


def resized(
    frames: Shaped[Tensor, "*rows channels height width"], size: tuple[int, int], as_floats: bool = False
) -> Shaped[Tensor, "*rows channels new_height new_width"]:
    """Frames at another size as 8-bit values or as floats, their proportions kept, black beside them."""
    if as_floats:
        frames = frames.float() if frames.is_floating_point() else frames.float() / 255.0
    elif frames.is_floating_point():
        frames = (frames * 255.0).round().to(torch.uint8)
    height, width = frames.shape[-2:]
    if (height, width) == tuple(size):
        return frames
    factor = min(size[0] / height, size[1] / width)
    inner = [max(1, round(height * factor)), max(1, round(width * factor))]
    scaled = images.resize(frames.flatten(0, -4), inner, antialias=True)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded = images.pad(scaled, [left, top, size[1] - inner[1] - left, size[0] - inner[0] - top])
    return padded.reshape(*frames.shape[:-2], *size)


def _read(segments: LeRobotDataset | InMemorySegments, places: list[int]) -> dict[str, Any]:
    if isinstance(segments, InMemorySegments):
        return segments.__getitems__(places)
    return collate_segments([segments[place] for place in places])


def _joined(parts: list[dict[str, Any]], order: Int[Tensor, " rows"]) -> dict[str, Any]:
    """The sources' parts as one batch, in the order that was asked for."""
    back = order.argsort()
    joined: dict[str, Any] = {}
    for key, value in parts[0].items():
        if isinstance(value, Tensor):
            joined[key] = torch.cat([part[key] for part in parts])[back]
        elif key.startswith(CHUNK_PREFIX):
            columns = zip(*(part[key] for part in parts), strict=True)
            joined[key] = [tuple(_in_order(column, back)) for column in columns]
        else:
            joined[key] = _in_order([part[key] for part in parts], back)
    return joined


def _in_order(parts: Sequence[Sequence[str]], back: Int[Tensor, " rows"]) -> list[str]:
    together = [text for part in parts for text in part]
    return [together[place] for place in back.tolist()]
