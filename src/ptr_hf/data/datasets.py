"""Open LeRobot datasets at a segment layout, and refuse the ones a run could not learn from before it starts."""

import copy
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import CompatibilityError
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from lerobot.utils.import_utils import get_safe_default_video_backend

from ptr_hf.data.bookkeeping import mend_dataset, mend_metadata
from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.frame_times import check_rate, wrong_times
from ptr_hf.data.given_datasets import check_given, check_unedited
from ptr_hf.data.pictures import video_backend
from ptr_hf.data.segment_dataset import SegmentDataset, episode_runs
from ptr_hf.data.segments import ACTION, OBSERVATION_PREFIX, SegmentLayout
from ptr_hf.files.hub_access import asking_the_hub

FRAMES_AT_ONCE = 64 * 10**6
"""Bytes that the frames of one piece of a pass over a dataset may take as floats; a policy's copies and its vision tower take
several times that."""

logger = logging.getLogger(__name__)


@cache
def is_dataset_folder(source: str | Path) -> bool:
    """Whether a path is a local LeRobotDataset."""
    return (Path(source) / "meta" / "info.json").is_file()


def dataset_metadata(
    source: Any, revision: str | None = None, episodes: Sequence[int] | None = None
) -> LeRobotDatasetMetadata:
    """Metadata of a dataset by Hub id or folder, or of one that is open, as its data files have them (`mend_metadata`).

    Args:
        source: Hub id, local folder, or an open LeRobotDataset.
        revision: of the Hub repo.
        episodes: those that are read; None for all, or those of the open dataset.

    Raises:
        ValueError: the folder is no dataset, an empty or damaged one or one of an older format, there is no such folder and no
            repo of that name, the source is something else (`check_given`), or the metadata contradict the data.
    """
    return _mended_metadata(source, revision, episodes)[0]


def without_unreadable(meta: LeRobotDatasetMetadata) -> LeRobotDatasetMetadata:
    """Metadata without the observations that no policy reads: texts, and flags other than the state.

    LeRobot would read them at a segment's offsets, normalise them, or fail to.
    """
    unread = [
        key
        for key, feature in meta.features.items()
        if key.startswith(OBSERVATION_PREFIX)
        and (feature["dtype"] == "string" or (feature["dtype"] == "bool" and key not in (OBS_STATE, OBS_ENV_STATE)))
    ]
    if unread:
        meta = copy.copy(meta)
        kept = {key: feature for key, feature in meta.features.items() if key not in unread}
        meta.info = dataclasses.replace(meta.info, features=kept)
    return meta


def _mended_metadata(
    source: Any, revision: str | None, episodes: Sequence[int] | None
) -> tuple[LeRobotDatasetMetadata, list[str]]:
    """The metadata, and a sentence for everything that was set right in them."""
    check_given(source, revision)
    if isinstance(source, LeRobotDataset):
        source.meta.ensure_readable()
        said = mend_metadata(source.meta, source.episodes if episodes is None else episodes)
        return without_unreadable(source.meta), said
    folder = Path(source) if is_dataset_folder(source) else None
    if folder is None and Path(source).exists():
        raise ValueError(
            f"{source} is no LeRobotDataset: it has no meta/info.json. Give a dataset's folder or its Hub id."
        )
    name = str(source) if folder is None else folder.resolve().name
    try:
        if folder is not None:
            _check_folder(folder)
        with asking_the_hub("dataset", source) if folder is None else nullcontext():
            meta = LeRobotDatasetMetadata(name, root=folder, revision=revision)
    except (CompatibilityError, NotImplementedError) as error:
        raise ValueError(f"The dataset {source} has another format than LeRobot reads. {str(error).strip()}") from error
    except (ValueError, KeyError, TypeError, OSError, DatasetsError, pa.ArrowException) as error:
        damage = None if folder is None else _damaged_file(folder)
        if damage is None:
            raise
        raise ValueError(f"The dataset {source} cannot be read: {damage}. Copy it anew.") from error
    said = mend_metadata(meta, episodes, complete=folder is not None)
    return without_unreadable(meta), said


def _check_folder(folder: Path) -> None:
    """What a folder lacks, LeRobot would look for on the Hub."""
    info = json.loads((folder / "meta" / "info.json").read_text())
    if info["total_frames"] == 0:
        raise ValueError(f"The dataset {folder} is empty: it has no frames to train on.")
    if str(info["codebase_version"]).startswith("v3"):
        for path in (folder / "meta" / "tasks.parquet", folder / "meta" / "episodes"):
            if not path.exists():
                raise ValueError(f"The dataset {folder} cannot be read: {path} is missing. Copy it anew.")


def _damaged_file(root: Path, thorough: bool = False) -> str | None:
    """The first file of a dataset's metadata and data that cannot be read, in words; None where all can.

    Args:
        root: of the dataset.
        thorough: read all of the data files, not only what says what is in them.
    """
    for path in sorted((root / "meta").glob("*.json")):
        try:
            json.loads(path.read_text())
        except (OSError, ValueError) as error:
            return f"{path} is damaged ({error})"
    tables = [root / "meta" / "tasks.parquet", *sorted((root / "meta" / "episodes").glob("*/*.parquet"))]
    for path in [*tables, *sorted((root / "data").glob("*/*.parquet"))]:
        try:
            if path.is_file():
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups if thorough else 0):
                        file.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            return f"{path} is damaged or cut off ({str(error).strip().splitlines()[0]})"
    return None


def files_digest(dataset: LeRobotDataset) -> str:
    """A digest of a dataset's frames: its data and video files by name, size and time, its revision and its episodes."""
    root = Path(dataset.root)
    digest = hashlib.sha256(f"{dataset.revision} {dataset.episodes}".encode())
    files = [path for part in ("data", "videos") for path in sorted((root / part).rglob("*")) if path.is_file()]
    for path in files:
        about = path.stat()
        digest.update(f"{path.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def open_dataset(
    source: Any,
    layout: SegmentLayout,
    *,
    episodes: Sequence[int] | None = None,
    revision: str | None = None,
    root: Path | None = None,
    download_videos: bool = True,
    announce: Callable[[str], None] = logger.warning,
) -> SegmentDataset:
    """A dataset that reads segments, with frames as uint8, or as floats in [0, 1] where the dataset transforms its images.

    Its bookkeeping agrees with its data (`mend_dataset`).

    Args:
        source: Hub id, local folder, or an open LeRobotDataset, which is opened anew with its episodes, revision, metadata,
            image transforms, tolerance, video decoder and unit of depth; its `delta_timestamps` give way to the layout's.
        layout: the offsets to read.
        episodes: a subset; None takes all, or those of the open dataset.
        revision: of the Hub repo.
        root: folder for what is fetched from the Hub; None takes LeRobot's cache.
        download_videos: whether a Hub dataset's videos are fetched; without them no video is looked at.
        announce: is given a sentence for everything that was set right in memory.

    Raises:
        ValueError: the folder is no dataset, lacks some of its files or has a damaged one, an episode does not exist, the open
            dataset cannot be opened anew as it is (`check_given`, `check_unedited`), or the metadata contradict the data.
    """
    meta, said = _mended_metadata(source, revision, episodes)
    settings: dict[str, Any] = {"video_backend": get_safe_default_video_backend(), "return_uint8": True}
    if isinstance(source, LeRobotDataset):
        episodes = source.episodes if episodes is None else episodes
        settings = _settings_of(source)
    if episodes is not None and not len(episodes):
        raise ValueError("episodes is empty: name at least one episode, or leave episodes out to take all.")
    unknown = sorted(set(episodes or ()) - set(range(meta.total_episodes)))
    if unknown:
        raise ValueError(
            f"{meta.repo_id} has episodes 0 to {meta.total_episodes - 1}; episodes {unknown[:5]} do not exist."
        )
    settings = {
        "layout": layout,
        "root": root or meta.root,
        "episodes": None if episodes is None else list(episodes),
        "delta_timestamps": layout.delta_timestamps(list(meta.features), meta.fps),
        "revision": revision,
        "download_videos": download_videos,
        **settings,
    }
    try:
        try:
            dataset = SegmentDataset(meta.repo_id, **settings)
        except ValueError as error:
            if "corresponds to no data" not in str(error):
                raise
            # LeRobot found files, of other episodes alone, and does not think of fetching these
            dataset = SegmentDataset(meta.repo_id, force_cache_sync=True, **settings)
    except (OSError, HFValidationError, DatasetsError, pa.ArrowException) as error:
        damage = _damaged_file(Path(root or meta.root), thorough=True)
        if damage is not None:
            raise ValueError(f"The dataset {meta.repo_id} cannot be read: {damage}. Copy it anew.") from error
        # LeRobot asks the Hub for what a local folder lacks.
        raise ValueError(
            f"The dataset {meta.repo_id} cannot be read: files are missing in {meta.root} and the Hub gave none ({error})."
        ) from error
    if isinstance(source, LeRobotDataset):
        check_unedited(source)
        dataset.use_metadata(meta)
    dataset.meta.info.features = meta.features
    dataset.drop([key for key in dataset.hf_dataset.column_names if key not in meta.features])
    # the files of a folder have just been compared, those of a Hub dataset are here only now
    is_folder = not isinstance(source, LeRobotDataset) and is_dataset_folder(source)
    said += mend_dataset(dataset, known=meta if is_folder else None)
    if download_videos:
        dataset.wrong_times = frozenset(wrong_times(dataset).tolist())
    for sentence in dict.fromkeys(filter(None, [*said, check_rate(dataset)])):
        announce(sentence)
    return dataset


def _settings_of(dataset: LeRobotDataset) -> dict[str, Any]:
    """The arguments of an open dataset that decide what is read, but for its episodes and offsets."""
    transforms = dataset.image_transforms
    return {
        "revision": dataset.revision,
        "image_transforms": transforms,
        "tolerance_s": dataset.tolerance_s,
        "depth_output_unit": dataset.depth_output_unit,
        "video_backend": video_backend(dataset),
        # transforms get what they get in the user's dataset; else 8-bit frames, which are scaled on the device
        "return_uint8": transforms is None or dataset._return_uint8,
    }


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
    runs = episode_runs(dataset)
    return list(zip(runs.episode.tolist(), runs.start.tolist(), runs.length.tolist(), strict=True))


def check_dataset(dataset: LeRobotDataset, layout: SegmentLayout) -> None:
    """Refuse a dataset that has nothing to learn from under this layout; see `check_episodes`."""
    check_episodes(dataset.meta, dataset.episodes, layout)


def check_episodes(meta: LeRobotDatasetMetadata, episodes: Sequence[int] | None, layout: SegmentLayout) -> None:
    """Refuse episodes that have nothing to learn from under this layout, going by the metadata alone.

    Args:
        meta: of the dataset.
        episodes: that are read; None for all.
        layout: to read them at.

    Raises:
        ValueError: no frames, a chunk or a segment longer than every episode, or no chunk with a recorded consequence.
    """
    if ACTION not in meta.features:
        raise ValueError(f"The dataset {meta.repo_id} has no {ACTION!r} feature, which a policy learns.")
    lengths = episode_column(meta, "length").to_numpy()
    longest = int((lengths if episodes is None else lengths[list(episodes)]).max(initial=0))
    if longest == 0:
        raise ValueError(f"The dataset {meta.repo_id} is empty: it has no frames to train on.")
    chunk = max(layout.action_steps) + 1
    if chunk > longest:
        raise ValueError(
            f"A chunk of {chunk} actions is longer than every episode of {meta.repo_id} (the longest has {longest} "
            f"frames): set chunk_size to at most {longest}."
        )
    if layout.chunk_starts[-1] >= longest:
        raise ValueError(
            f"A segment of {layout.segment_length} chunks, {layout.chunk_stride} frames apart, is longer than every episode of "
            f"{meta.repo_id} (the longest has {longest} frames), so that its last chunk would always be padding: set "
            f"segment_length to at most {(longest - 1) // layout.chunk_stride + 1}."
        )
    if layout.consequence_offset is not None and layout.consequence_offset >= longest:
        raise ValueError(
            f"No chunk of {meta.repo_id} has a recorded consequence: consequence_offset={layout.consequence_offset} frames "
            f"reaches past the end of every episode (the longest has {longest} frames). Set consequence_offset below {longest}."
        )


def check_one_instruction(meta: LeRobotDatasetMetadata, layout: SegmentLayout) -> None:
    """Refuse, in LeRobot's own training loop, episodes that change their instruction: it reads that of the anchor frame alone.

    Raises:
        ValueError: a segment has several chunks, and an episode several instructions.
    """
    if layout.segment_length == 1:
        return
    several = [
        episode for episode, tasks in enumerate(episode_column(meta, "tasks").to_pylist()) if len(set(tasks)) > 1
    ]
    if several:
        raise ValueError(
            f"{len(several)} episodes of {meta.repo_id} change their instruction on the way (the first is episode {several[0]}), "
            f"and LeRobot's training loop would give all {layout.segment_length} chunks of a segment that of its first frame: "
            "set --policy.segment_length=1, or train with PTRTrainer (ptr-train), which reads each chunk's own."
        )


class Covering(NamedTuple):
    """Segments that cover the chosen episodes from their first frames on, without overlap.

    Attributes:
        anchors: position of each segment's first frame.
        chunks: how many chunks of each begin inside its episode.
    """

    anchors: list[int]
    chunks: list[int]


def covering(
    dataset: LeRobotDataset | HasEpisodes, layout: SegmentLayout, episodes: Sequence[int] | None = None
) -> Covering:
    """The segments that cover a dataset, or some of its episodes."""
    step = layout.segment_length * layout.chunk_stride
    found = Covering([], [])
    for episode, first, length in episode_spans(dataset):
        if episodes is not None and episode not in episodes:
            continue
        for start in range(0, length, step):
            found.anchors.append(first + start)
            found.chunks.append(min(layout.segment_length, -(-(length - start) // layout.chunk_stride)))
    return found


def segments_at_once(features: Mapping[str, Mapping[str, Any]], layout: SegmentLayout, most: int) -> int:
    """How many segments are read at once, so that their frames take a bounded memory; at least one.

    Args:
        features: of the dataset.
        layout: to read it at.
        most: segments that may be read.
    """
    shapes = [feature["shape"] for feature in features.values() if feature["dtype"] in ("image", "video")]
    frames = len(layout.observation_offsets or [0])
    segment = 4 * frames * sum(math.prod(shape) for shape in shapes)
    return max(1, min(most, FRAMES_AT_ONCE // max(1, segment)))
