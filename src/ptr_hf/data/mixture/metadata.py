"""What a mixture of datasets looks like before anything is read.

One action and state vector of named slots, all cameras at one size, episodes, frames and instructions numbered through, so
that policies, episode tables and reports see one data set in LeRobot's words.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.mixture.action_space import ActionSpace, EmbodimentLayout, resolve_layout
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig
from ptr_hf.data.segments import ACTION


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
        """In the episodes that are read."""
        return int(episode_column(self.meta, "length").to_numpy()[list(self.episodes)].sum())


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
        fps: frames a second of the first source; each is read at its own.
    """

    config: MixtureConfig
    sources: tuple[Source, ...]
    space: ActionSpace
    state_space: ActionSpace
    features: dict[str, dict[str, Any]]
    tasks: pd.DataFrame
    episodes: datasets.Dataset
    fps: float

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
    def transforms_images(self) -> bool:
        """Whether a source transforms its images: then all frames are floats in [0, 1] as it leaves them, else 8-bit."""
        given = (source.config.dataset for source in self.sources)
        return any(isinstance(dataset, LeRobotDataset) and dataset.image_transforms is not None for dataset in given)

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

    def located(
        self, episode: Int[np.ndarray, " rows"], frame: Int[np.ndarray, " rows"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where frames of the mixture are recorded.

        Args:
            episode: in the mixture.
            frame: in its episode.

        Returns:
            source names, episode in the source, and frame in the source's dataset.
        """
        starts = np.array([source.first_episode for source in self.sources])
        number = np.searchsorted(starts, episode, side="right") - 1
        names = np.array(self.names, dtype=object)[number]
        own = episode - starts[number]
        first = np.empty_like(own)
        for source in self.sources:
            rows = number == source.number
            first[rows] = episode_column(source.meta, "dataset_from_index").to_numpy()[own[rows]]
        return names, own, first + frame

    @classmethod
    def read(
        cls, config: MixtureConfig, like: "MixtureMetadata | None" = None, widest: int | None = None
    ) -> "MixtureMetadata":
        """Read the metadata of every source and lay out what they have in common.

        Args:
            config: of the mixture.
            like: a mixture of the same robots in the same order, whose form this one takes: held-out data for what was
                trained on that.
            widest: vector that the policy takes, which decides where the configuration leaves the space open.

        Raises:
            ValueError: a dataset cannot be read, has no action, or does not fit its robot's layout; or the robots are not
                those of `like`.
        """
        metas = [dataset_metadata(source.dataset, source.revision, source.episodes) for source in config.sources]
        robots = [_robot(source, meta) for source, meta in zip(config.sources, metas, strict=True)]
        space = state_space = ActionSpace.standard()
        if like is not None:
            _check_same_robots(config, robots, like)
            space, state_space = like.space, like.state_space
        elif config.action_space == "compact" or (config.action_space is None and (widest or len(space)) < len(space)):
            space = space.compact(robots, ("action",))
            if any(robot.state for robot in robots):
                state_space = state_space.compact(robots, ("state",))
        instructions: dict[str, int] = {}
        if like is not None:
            instructions |= dict(zip(like.tasks.index, like.tasks["task_index"], strict=True))
        sources: list[Source] = []
        first_frame = first_episode = 0
        for number, (given, meta, robot) in enumerate(zip(config.sources, metas, robots, strict=True)):
            recorded = meta.tasks["task_index"].sort_values().index
            called = [given.tasks.get(task, task) for task in recorded]
            _check_renames(given, meta, recorded)
            _check_chosen_episodes(given, meta)
            starts = first_frame + np.concatenate([[0], np.cumsum(episode_column(meta, "length"))])
            sources.append(
                Source(
                    number,
                    given,
                    meta,
                    robot,
                    action=space.positions(robot.action),
                    state=state_space.positions(robot.state),
                    cameras={key: given.rename.get(key, key) for key in meta.camera_keys},
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
            fps=float(metas[0].fps),
        )


def _robot(source: SourceConfig, meta: LeRobotDatasetMetadata) -> EmbodimentLayout:
    if ACTION not in meta.features:
        raise ValueError(f"The dataset {meta.repo_id} has no {ACTION!r} feature, which a policy learns.")
    try:
        return resolve_layout(source.embodiment, meta.features, name=source.called)
    except ValueError as error:
        raise ValueError(f"Source {source.called} of the mixture: {error}") from error


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
        if unknown and what == "rename" and given[unknown[0]] in known:
            raise ValueError(
                f"rename of the source {source.called} maps {unknown[0]!r} onto {given[unknown[0]]!r}, but it goes from the "
                f"dataset's name to the policy's: write {{{given[unknown[0]]}: {unknown[0]}}}."
            )
        if unknown:
            raise ValueError(
                f"{what} of the source {source.called} names {', '.join(map(repr, unknown))}, which the dataset lacks; it has "
                f"{', '.join(map(repr, known)) or 'none'}."
            )
    called = [source.rename.get(key, key) for key in meta.camera_keys]
    if len(set(called)) < len(called):
        raise ValueError(f"rename of the source {source.called} gives two cameras one name: {', '.join(called)}.")


def _check_chosen_episodes(source: SourceConfig, meta: LeRobotDatasetMetadata) -> None:
    times = Counter(source.episodes or ())
    wrong = [episode for episode, count in times.items() if count > 1 or not 0 <= episode < meta.total_episodes]
    if wrong or source.episodes == []:
        raise ValueError(
            f"episodes of the source {source.called} names {', '.join(map(str, wrong)) or 'none'}: give some of 0 to "
            f"{meta.total_episodes - 1}, each at most once, or leave episodes out for all."
        )


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
        lengths = episode_column(source.meta, "length").to_numpy()
        recorded = episode_column(source.meta, "tasks").to_pylist()
        tasks = [[source.config.tasks.get(task, task) for task in tasks] for tasks in recorded]
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
