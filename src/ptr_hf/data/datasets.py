"""Open LeRobot datasets at a segment layout, and refuse the ones a run could not learn from before it starts."""

import importlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from huggingface_hub.errors import HFValidationError
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.segments import ACTION, SegmentLayout

EMPTY_CAMERA = "observation.images.empty_camera_"


@cache
def video_backend() -> str:
    """The video decoder that works here: torchcodec where FFmpeg's libraries are installed, else PyAV, which carries its own."""
    try:
        importlib.import_module("torchcodec")
    except (ImportError, OSError, RuntimeError):
        logging.getLogger(__name__).info("torchcodec does not load here (no FFmpeg libraries); decoding with PyAV.")
        return "pyav"
    return "torchcodec"


def is_dataset_folder(source: str | Path) -> bool:
    """Whether a path is a local LeRobotDataset."""
    return (Path(source) / "meta" / "info.json").is_file()


def dataset_metadata(source: str | Path | LeRobotDataset, revision: str | None = None) -> LeRobotDatasetMetadata:
    """Metadata of a dataset by Hub id or folder, or of one that is open.

    Raises:
        ValueError: the folder is no dataset or an empty one, or there is no such folder and no repo of that name.
    """
    if isinstance(source, LeRobotDataset):
        return source.meta
    if is_dataset_folder(source):
        if json.loads((Path(source) / "meta" / "info.json").read_text())["total_frames"] == 0:
            raise ValueError(f"The dataset {source} is empty: it has no frames to train on.")
        return LeRobotDatasetMetadata(Path(source).resolve().name, root=Path(source), revision=revision)
    if Path(source).exists():
        raise ValueError(
            f"{source} is no LeRobotDataset: it has no meta/info.json. Give a dataset's folder or its Hub id."
        )
    try:
        return LeRobotDatasetMetadata(str(source), revision=revision)
    except HFValidationError as error:
        raise ValueError(f"{source} is neither a folder nor the name of a dataset on the Hub (user/name).") from error


def open_dataset(
    source: str | Path | LeRobotDataset,
    layout: SegmentLayout,
    *,
    episodes: Sequence[int] | None = None,
    revision: str | None = None,
    frame_stride: int = 1,
    root: Path | None = None,
) -> LeRobotDataset:
    """A dataset that reads segments, with frames as uint8.

    Args:
        source: Hub id, local folder, or an open LeRobotDataset, which is opened anew with the same episodes.
        layout: the offsets to read.
        episodes: a subset; None takes all, or those of the open dataset.
        revision: of the Hub repo.
        frame_stride: recorded frames to one step of the layout.
        root: folder for what is fetched from the Hub; None takes LeRobot's cache.

    Raises:
        ValueError: the folder is no dataset or lacks some of its files, or an episode does not exist.
    """
    meta = dataset_metadata(source, revision)
    backend, transforms = video_backend(), None
    if isinstance(source, LeRobotDataset):
        episodes = source.episodes if episodes is None else episodes
        revision, transforms = source.revision, source.image_transforms
    if episodes is not None and not len(episodes):
        raise ValueError("episodes is empty: name at least one episode, or leave episodes out to take all.")
    unknown = sorted(set(episodes or ()) - set(range(meta.total_episodes)))
    if unknown:
        raise ValueError(
            f"{meta.repo_id} has episodes 0 to {meta.total_episodes - 1}; episodes {unknown[:5]} do not exist."
        )
    settings: dict[str, Any] = {
        "root": root or meta.root,
        "episodes": None if episodes is None else list(episodes),
        "delta_timestamps": layout.delta_timestamps(list(meta.features), meta.fps / frame_stride),
        "revision": revision,
        "image_transforms": transforms,
        "video_backend": backend,
        "return_uint8": True,
    }
    try:
        try:
            return LeRobotDataset(meta.repo_id, **settings)
        except ValueError as error:
            if "corresponds to no data" not in str(error):
                raise
            # LeRobot found files, of other episodes alone, and does not think of fetching these
            return LeRobotDataset(meta.repo_id, force_cache_sync=True, **settings)
    except (OSError, HFValidationError) as error:
        # LeRobot asks the Hub for what a local folder lacks.
        raise ValueError(
            f"The dataset {meta.repo_id} cannot be read: files are missing in {meta.root} and the Hub gave none ({error})."
        ) from error


@runtime_checkable
class HasEpisodes(Protocol):
    """A dataset that knows its episodes itself, as a mixture does."""

    def episode_spans(self) -> list[tuple[int, int, int]]:
        """As the function of that name."""
        ...


def episode_spans(dataset: LeRobotDataset | HasEpisodes) -> list[tuple[int, int, int]]:
    """(episode, first position, length) of every selected episode, positions as the dataset is indexed."""
    if not isinstance(dataset, LeRobotDataset):
        return dataset.episode_spans()
    column = dataset.hf_dataset.data.column("episode_index").to_numpy()
    episodes, first, length = np.unique(column, return_index=True, return_counts=True)
    return sorted(zip(episodes.tolist(), first.tolist(), length.tolist(), strict=True), key=lambda span: span[1])


def check_dataset(dataset: LeRobotDataset, layout: SegmentLayout) -> None:
    """Refuse a dataset that has nothing to learn from under this layout; see `check_episodes`."""
    check_episodes(dataset.meta, dataset.episodes, layout)


def check_episodes(
    meta: LeRobotDatasetMetadata, episodes: Sequence[int] | None, layout: SegmentLayout, frame_stride: int = 1
) -> None:
    """Refuse episodes that have nothing to learn from under this layout, going by the metadata alone.

    Args:
        meta: of the dataset.
        episodes: that are read; None for all.
        layout: to read them at.
        frame_stride: recorded frames to one step of the layout.

    Raises:
        ValueError: no frames, a chunk longer than every episode, or no chunk with a recorded consequence.
    """
    if ACTION not in meta.features:
        raise ValueError(f"The dataset {meta.repo_id} has no {ACTION!r} feature, which a policy learns.")
    lengths = np.asarray(meta.episodes["length"])
    longest = int(-(-(lengths if episodes is None else lengths[list(episodes)]).max(initial=0) // frame_stride))
    if longest == 0:
        raise ValueError(f"The dataset {meta.repo_id} is empty: it has no frames to train on.")
    chunk = max(layout.action_steps) + 1
    if chunk > longest:
        raise ValueError(
            f"A chunk of {chunk} actions is longer than every episode of {meta.repo_id} (the longest has {longest} "
            f"frames): set chunk_size to at most {longest}."
        )
    if layout.consequence_offset is not None and layout.consequence_offset >= longest:
        raise ValueError(
            f"No chunk of {meta.repo_id} has a recorded consequence: consequence_offset={layout.consequence_offset} frames "
            f"reaches past the end of every episode (the longest has {longest} frames). Set consequence_offset below {longest}."
        )


def check_cameras(
    config: PreTrainedConfig,
    feature_keys: Iterable[str],
    rename_map: Mapping[str, str] | None = None,
    *,
    lacks_some: bool = False,
) -> None:
    """Refuse a dataset whose cameras, once renamed, are not the policy's.

    A policy may declare more cameras than the robot has only where it fills the missing ones itself (SmolVLA), or where the
    dataset is one of a mixture, which does (`lacks_some`); one has to be there.

    Raises:
        ValueError: naming the missing cameras and the ones there are.
    """
    renamed = {(rename_map or {}).get(key, key) for key in feature_keys}
    expected = [
        key
        for key, feature in (config.input_features or {}).items()
        if feature.type is FeatureType.VISUAL and not key.startswith(EMPTY_CAMERA)
    ]
    missing = [key for key in expected if key not in renamed]
    fills_missing = (lacks_some or config.type == "smolvla") and len(missing) < len(expected)
    if missing and not fills_missing:
        have = sorted(key for key in renamed if key.startswith("observation.image")) or ["none"]
        raise ValueError(
            f"The policy sees the camera {', '.join(missing)}, which the dataset lacks (it has {', '.join(have)}): map the names "
            "with rename_map={'dataset key': 'policy key'}, or choose a policy for these cameras."
        )
