"""Several LeRobotDatasets read as one: different robots, cameras, rates and schemas, one batch.

`MixtureMetadata` says what the pooled data set looks like before anything is read: one action and state vector of named
slots, all cameras at one size, episodes, frames and instructions numbered through. `Mixture` reads segments of it; a sample
of a source is the same whether the source is alone or not. `MixtureSampler` draws the sources at their shares.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.transforms.v2 import functional as images

from ptr_hf.data.action_space import ActionSpace, EmbodimentLayout, resolve_layout, to_slots
from ptr_hf.data.datasets import check_episodes, dataset_metadata, episode_spans, open_dataset
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.mixture_config import MixtureConfig, SourceConfig
from ptr_hf.data.screening import with_finite_statistics
from ptr_hf.data.segments import ACTION, CAMERA_MASK_SUFFIX, OBS_SOURCE, PAD_SUFFIX, SegmentLayout
from ptr_hf.data.statistics import Placed, affine, pooled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture, and how its samples become the mixture's.

    Attributes:
        number: its place in the mixture.
        config: as the user gave it.
        meta: LeRobot's metadata of the dataset.
        robot: which slot every entry of its action and state goes to.
        action, state: those slots as positions in the mixture's vector.
        cameras: the dataset's key of every camera -> the mixture's.
        frame_stride: recorded frames to one of the mixture's.
        first_frame: (episodes,) number in the mixture of every episode's first frame.
        first_episode: number in the mixture of its first episode.
        tasks: (tasks,) number in the mixture of every instruction.
    """

    number: int
    config: SourceConfig
    meta: LeRobotDatasetMetadata
    robot: EmbodimentLayout
    action: tuple[int, ...]
    state: tuple[int, ...]
    cameras: dict[str, str]
    frame_stride: int
    first_frame: Int[Tensor, " episodes"]
    first_episode: int
    tasks: Int[Tensor, " tasks"]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.config.called

    @property
    def episodes(self) -> Sequence[int]:
        """Those that are read."""
        chosen = self.config.episodes
        if chosen is None and isinstance(self.config.dataset, LeRobotDataset):
            chosen = self.config.dataset.episodes
        return range(self.meta.total_episodes) if chosen is None else list(chosen)

    @property
    def frames(self) -> int:
        """The mixture's frames in the episodes that are read."""
        lengths = np.asarray(self.meta.episodes["length"])[list(self.episodes)]
        return int(np.ceil(lengths / self.frame_stride).sum())


@dataclass(frozen=True, eq=False)
class MixtureMetadata:
    """What a mixture looks like, in the words of LeRobot's metadata; policies are built from it.

    Attributes:
        config: as the user gave it.
        sources: in the order given.
        space, state_space: what the entries of action and state mean; one space unless it is compact.
        features: action, state and cameras as in LeRobot's `info.json`.
        tasks: instruction -> task_index, all sources'.
        episodes: a row an episode, with the columns `source` and `embodiment`.
        fps: frames a second; the first source's, where each has its own.
    """

    config: MixtureConfig
    sources: tuple[Source, ...]
    space: ActionSpace
    state_space: ActionSpace
    features: dict[str, dict[str, Any]]
    tasks: pd.DataFrame
    episodes: datasets.Dataset
    fps: float

    has_language_columns = False
    stats = None
    """Normalisation is by source: `mixture_statistics`."""

    @property
    def repo_id(self) -> str:
        """The names of the sources."""
        return " + ".join(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return tuple(source.name for source in self.sources)

    @property
    def camera_keys(self) -> list[str]:
        """Of all sources."""
        return [key for key, feature in self.features.items() if feature["dtype"] == "video"]

    @property
    def total_episodes(self) -> int:
        """Of all sources, whether they are read or not."""
        return len(self.episodes)

    @property
    def total_tasks(self) -> int:
        """Different instructions."""
        return len(self.tasks)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """π: the share of samples of each source."""
        return self.config.shares_of([source.frames for source in self.sources])

    def source(self, name: str) -> Source:
        """The source of that name, or the one whose robot has it.

        Raises:
            ValueError: there is none, or several sources have that robot.
        """
        found = [source for source in self.sources if source.name == name]
        found = found or [source for source in self.sources if source.robot.name == name]
        if len(found) != 1:
            raise ValueError(
                f"{name!r} names {len(found)} sources of the mixture; choose one of {', '.join(self.names)}."
            )
        return found[0]

    def located(
        self, episode: Int[np.ndarray, " rows"], frame: Int[np.ndarray, " rows"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where frames of the mixture are recorded.

        Args:
            episode: in the mixture.
            frame: in its episode, at the mixture's rate.

        Returns:
            source names, episode in the source, frame in the episode, and frame in the source's dataset.
        """
        starts = np.array([source.first_episode for source in self.sources])
        number = np.searchsorted(starts, episode, side="right") - 1
        names = np.array(self.names, dtype=object)[number]
        own = episode - starts[number]
        recorded = frame * np.array([source.frame_stride for source in self.sources])[number]
        first = np.empty_like(own)
        for source in self.sources:
            rows = number == source.number
            first[rows] = np.asarray(source.meta.episodes["dataset_from_index"])[own[rows]]
        return names, own, recorded, first + recorded

    @classmethod
    def read(cls, config: MixtureConfig, like: "MixtureMetadata | None" = None) -> "MixtureMetadata":
        """Read the metadata of every source and lay out what they have in common.

        Args:
            config: of the mixture.
            like: a mixture of the same robots in the same order, whose form this one takes: held-out data for what was
                trained on that.

        Raises:
            ValueError: a dataset cannot be read, has no action, or does not fit its robot's layout; a rate does not divide
                a source's; or the robots are not those of `like`.
        """
        metas = [dataset_metadata(source.dataset, source.revision) for source in config.sources]
        robots = [_robot(source, meta) for source, meta in zip(config.sources, metas, strict=True)]
        space = state_space = ActionSpace.standard()
        if like is not None:
            _check_same_robots(config, robots, like)
            space, state_space = like.space, like.state_space
        elif config.action_space == "compact":
            space = space.compact(robots, ("action",))
            if any(robot.state for robot in robots):
                state_space = state_space.compact(robots, ("state",))
        strides = [_frame_stride(config, meta) for meta in metas]
        instructions: dict[str, int] = {}
        if like is not None:
            instructions |= dict(zip(like.tasks.index, like.tasks["task_index"], strict=True))
        sources: list[Source] = []
        first_frame = first_episode = 0
        for number, (given, meta, robot, stride) in enumerate(zip(config.sources, metas, robots, strides, strict=True)):
            recorded = meta.tasks["task_index"].sort_values().index
            called = [given.tasks.get(task, task) for task in recorded]
            _check_renames(given, meta, recorded)
            lengths = np.ceil(np.asarray(meta.episodes["length"]) / stride).astype(np.int64)
            starts = first_frame + np.concatenate([[0], lengths.cumsum()])
            sources.append(
                Source(
                    number,
                    given,
                    meta,
                    robot,
                    action=space.positions(robot.action),
                    state=state_space.positions(robot.state),
                    cameras={key: given.rename.get(key, key) for key in meta.camera_keys},
                    frame_stride=stride,
                    first_frame=torch.from_numpy(starts[:-1]),
                    first_episode=first_episode,
                    tasks=torch.tensor([instructions.setdefault(task, len(instructions)) for task in called]),
                )
            )
            first_frame, first_episode = int(starts[-1]), first_episode + meta.total_episodes
        return cls(
            config,
            tuple(sources),
            space,
            state_space,
            _features(config, sources, space, state_space) if like is None else like.features,
            pd.DataFrame({"task_index": list(instructions.values())}, index=pd.Index(instructions, name="task")),
            _episodes(sources),
            fps=metas[0].fps / strides[0],
        )


class Mixture(Dataset[dict[str, Any]]):
    """Segments of several datasets, each in the mixture's own form.

    `__getitems__` returns one collated batch; give a DataLoader `collate_fn=collate_segments`. Beside what a LeRobotDataset
    has, a batch holds `observation.source` (B,) and the texts `source` and `embodiment`.

    Args:
        meta: of the mixture.
        layout: the offsets to read.
        in_memory: read the datasets into memory first, as `InMemorySegments` does.
        max_gigabytes, frames_cache: for that; the limit is each dataset's.

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
        frames_cache: str | Path | None = None,
    ) -> None:
        self.meta, self.layout = meta, layout
        self.datasets: list[LeRobotDataset] = []
        self._segments: list[LeRobotDataset | InMemorySegments] = []
        self._positions: list[Int[Tensor, " frames"]] = []
        for source in meta.sources:
            dataset = open_dataset(
                source.config.dataset,
                layout,
                episodes=source.config.episodes,
                revision=source.config.revision,
                frame_stride=source.frame_stride,
            )
            check_episodes(source.meta, source.episodes, layout, source.frame_stride)
            self.datasets.append(dataset)
            self._segments.append(
                InMemorySegments(
                    dataset,
                    layout,
                    max_gigabytes=max_gigabytes,
                    frames_cache=frames_cache,
                    frame_stride=source.frame_stride,
                )
                if in_memory
                else dataset
            )
            spans = episode_spans(dataset)
            self._positions.append(
                torch.cat([torch.arange(first, first + length, source.frame_stride) for _, first, length in spans])
            )
        self._ends = torch.tensor([len(positions) for positions in self._positions]).cumsum(0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of every source."""
        return tuple(len(positions) for positions in self._positions)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, without the batch dimension."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A collated batch of the samples at the given positions, in their order.

        Raises:
            IndexError: a position is outside the mixture.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        if ((rows < -len(self)) | (rows >= len(self))).any():
            raise IndexError(f"The mixture has positions 0 to {len(self) - 1}; the batch asks for {list(indices)}.")
        rows = torch.where(rows < 0, rows + len(self), rows)
        number = torch.searchsorted(self._ends, rows, right=True)
        parts, order = [], []
        for source in self.meta.sources:
            own = (number == source.number).nonzero()[:, 0]
            if len(own):
                local = rows[own] - (int(self._ends[source.number]) - self.sizes[source.number])
                places = self._positions[source.number][local].tolist()
                batch = _read(self._segments[source.number], places)
                parts.append(unified(batch, source, self.meta, self.layout))
                order.append(own)
        return _joined(parts, torch.cat(order))

    def episode_spans(self) -> list[tuple[int, int, int]]:
        """(episode, first position, length) of every episode that is read."""
        spans, position = [], 0
        for source, dataset in zip(self.meta.sources, self.datasets, strict=True):
            for episode, _, length in episode_spans(dataset):
                frames = -(-length // source.frame_stride)
                spans.append((source.first_episode + episode, position, frames))
                position += frames
        return spans


class MixtureSampler(Sampler[int]):
    """Draws every source at its share, in an order that depends on seed and epoch alone.

    An epoch has as many samples as the mixture; each source gives its share of them, rounded, without repeating a sample
    before all of its own have been drawn.

    Args:
        sizes: samples of every source.
        shares: π, adding up to 1.
        seed: of the order.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int = 0) -> None:
        self.sizes, self.shares, self.seed = tuple(sizes), tuple(shares), seed
        self.epoch = 0
        total = sum(self.sizes)
        ends = np.rint(np.cumsum(self.shares) * total).astype(int)
        self.counts = tuple(np.diff(ends, prepend=0).tolist())
        """Samples of every source in an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Accelerate calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(stream_seed(self.seed, self.epoch))
        first, drawn = 0, []
        for size, count in zip(self.sizes, self.counts, strict=True):
            passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
            drawn.append(first + torch.cat([*passes, torch.empty(0, dtype=torch.int64)])[:count])
            first += size
        together = torch.cat(drawn)
        yield from together[torch.randperm(len(together), generator=generator)].tolist()


def stream_seed(*numbers: int) -> int:
    """A seed for torch that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def mixture_statistics(
    meta: MixtureMetadata,
    modes: Mapping[FeatureType, NormalizationMode] | Mapping[str, NormalizationMode],
    datasets: Sequence[LeRobotDataset] | None = None,
) -> dict[str, Float[Tensor, "sources *rest"]]:
    """What normalises every source's samples: `<key>.offset` and `<key>.scale`, stacked by source.

    Args:
        meta: of the mixture; its configuration says over whom statistics are pooled.
        modes: the policy's normalization_mapping.
        datasets: open, by source; where one's statistics are not finite they are computed anew from it.

    Raises:
        ValueError: statistics that a mode needs are missing.
    """
    metas = [
        source.meta
        if datasets is None
        else with_finite_statistics(source.meta, datasets[source.number], _read_keys(source))
        for source in meta.sources
    ]
    groups: dict[str, list[int]] = {}
    for source in meta.sources:
        key = {"source": source.name, "embodiment": source.robot.name, "pooled": ""}[meta.config.statistics]
        groups.setdefault(key, []).append(source.number)
    by_kind = {FeatureType(kind): mode for kind, mode in modes.items()}
    tensors: dict[str, Tensor] = {}
    for key in meta.features:
        kind = {ACTION: FeatureType.ACTION, OBS_STATE: FeatureType.STATE}.get(key, FeatureType.VISUAL)
        mode = by_kind.get(kind, NormalizationMode.IDENTITY)
        of: dict[int, Placed] = {}
        size = len(meta.space if key == ACTION else meta.state_space)
        for source, recorded in zip(meta.sources, metas, strict=True):
            stats = recorded.stats or {}
            if kind is FeatureType.VISUAL:
                own = next((name for name, called in source.cameras.items() if called == key), None)
                if own is not None and own in stats:
                    of[source.number] = Placed.of_frames(stats[own])
            elif key in stats and (slots := source.action if key == ACTION else source.state):
                of[source.number] = Placed.in_slots(stats[key], slots, size)
        if mode is NormalizationMode.IDENTITY and kind is FeatureType.VISUAL:
            continue
        shape = (3, 1, 1) if kind is FeatureType.VISUAL else (size,)
        offset, scale = torch.zeros(len(metas), *shape), torch.ones(len(metas), *shape)
        for members in groups.values():
            having = [number for number in members if number in of]
            if having:
                what = f"{key} of {', '.join(meta.names[number] for number in having)}"
                values = affine(pooled([of[number] for number in having]), mode, what)
                for number in having:
                    offset[number], scale[number] = values
        tensors[f"{key}.offset"], tensors[f"{key}.scale"] = offset, scale
    return tensors


def unified(batch: dict[str, Any], source: Source, meta: MixtureMetadata, layout: SegmentLayout) -> dict[str, Any]:
    """A collated batch of one source in the mixture's form: slots, cameras, and numbers that no other source has."""
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
        result[key] = resized(recorded, (height, width)).reshape(shape)
        result[key + CAMERA_MASK_SUFFIX] = torch.full((count,), key in own)
        if steps is not None:
            result[key + PAD_SUFFIX] = pads[0]
    episode = batch["episode_index"]
    frame = torch.div(batch["frame_index"], source.frame_stride, rounding_mode="floor")
    task = source.tasks[batch["task_index"]]
    names = meta.tasks.index
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
    frames: Shaped[Tensor, "*rows channels height width"], size: tuple[int, int]
) -> Shaped[Tensor, "*rows channels new_height new_width"]:
    """Frames at another size as 8-bit values, their proportions kept, black beside them."""
    if frames.is_floating_point():
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
    return default_collate([segments[place] for place in places])


def _joined(parts: list[dict[str, Any]], order: Int[Tensor, " rows"]) -> dict[str, Any]:
    """The sources' parts as one batch, in the order that was asked for."""
    back = order.argsort()
    joined: dict[str, Any] = {}
    for key, value in parts[0].items():
        if isinstance(value, Tensor):
            joined[key] = torch.cat([part[key] for part in parts])[back]
        else:
            together = [text for part in parts for text in part[key]]
            joined[key] = [together[place] for place in back.tolist()]
    return joined


def _robot(source: SourceConfig, meta: LeRobotDatasetMetadata) -> EmbodimentLayout:
    if ACTION not in meta.features:
        raise ValueError(f"The dataset {meta.repo_id} has no {ACTION!r} feature, which a policy learns.")
    try:
        return resolve_layout(source.embodiment, meta.features, name=source.called)
    except ValueError as error:
        raise ValueError(f"Source {source.called} of the mixture: {error}") from error


def _frame_stride(config: MixtureConfig, meta: LeRobotDatasetMetadata) -> int:
    if config.fps is None:
        return 1
    if meta.fps % config.fps:
        raise ValueError(
            f"{meta.repo_id} was recorded at {meta.fps:g} frames a second, which fps={config.fps} of the mixture does not "
            "divide: choose a rate that divides every source's, or leave fps out to read each at its own."
        )
    return int(meta.fps // config.fps)


def _check_same_robots(config: MixtureConfig, robots: Sequence[EmbodimentLayout], like: MixtureMetadata) -> None:
    given = [(robot.action, robot.state) for robot in robots]
    if given != [(source.robot.action, source.robot.state) for source in like.sources]:
        raise ValueError(
            f"The mixture {', '.join(config.names)} has to have the robots of the one that is trained on "
            f"({', '.join(like.names)}), in the same order and with the same layouts."
        )


def _check_renames(source: SourceConfig, meta: LeRobotDatasetMetadata, tasks: Collection[str]) -> None:
    for what, given, known in (("rename", source.rename, meta.camera_keys), ("tasks", source.tasks, tasks)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"{what} of the source {source.called} names {', '.join(map(repr, unknown))}, which the dataset lacks; it has "
                f"{', '.join(map(repr, known)) or 'none'}."
            )
    called = [source.rename.get(key, key) for key in meta.camera_keys]
    if len(set(called)) < len(called):
        raise ValueError(f"rename of the source {source.called} gives two cameras one name: {', '.join(called)}.")


def _features(
    config: MixtureConfig, sources: Sequence[Source], space: ActionSpace, state_space: ActionSpace
) -> dict[str, dict[str, Any]]:
    features = {ACTION: _vector(space)}
    if any(source.state for source in sources):
        features[OBS_STATE] = _vector(state_space)
    for source in sources:
        for key, called in source.cameras.items():
            shape = tuple(source.meta.features[key]["shape"])
            # recorded as (height, width, channels); image datasets of old name them the other way round
            names = source.meta.features[key].get("names") or ()
            height, width = shape[1:] if tuple(names[:1]) in (("channels",), ("channel",)) else shape[:2]
            size = tuple(config.image_size or (height, width))
            feature = {"dtype": "video", "shape": (*size, 3), "names": ["height", "width", "channels"]}
            features.setdefault(called, feature)
    return features


def _vector(space: ActionSpace) -> dict[str, Any]:
    return {"dtype": "float32", "shape": (len(space),), "names": list(space.slots)}


def _episodes(sources: Sequence[Source]) -> datasets.Dataset:
    """A row an episode: its frames in the mixture, its instructions, source and robot."""
    columns: dict[str, list[Any]] = {}
    for source in sources:
        lengths = np.ceil(np.asarray(source.meta.episodes["length"]) / source.frame_stride).astype(int)
        tasks = [[source.config.tasks.get(task, task) for task in tasks] for tasks in source.meta.episodes["tasks"]]
        own = {
            "episode_index": (source.first_episode + np.arange(len(lengths))).tolist(),
            "dataset_from_index": source.first_frame.tolist(),
            "dataset_to_index": (source.first_frame.numpy() + lengths).tolist(),
            "length": lengths.tolist(),
            "tasks": tasks,
            "source": [source.name] * len(lengths),
            "embodiment": [source.robot.name] * len(lengths),
        }
        for name, values in own.items():
            columns.setdefault(name, []).extend(values)
    return datasets.Dataset.from_dict(columns)


def _read_keys(source: Source) -> list[str]:
    return [key for key in (ACTION, OBS_STATE) if key in source.meta.features]
