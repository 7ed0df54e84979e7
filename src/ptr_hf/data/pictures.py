"""Frames of one camera of an open dataset, whether it keeps them as video or as image files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.import_utils import get_safe_default_video_backend

from ptr_hf.data.video_frames import frames_at


def pictures(
    dataset: LeRobotDataset, camera: str, episode: int, rows: Sequence[int]
) -> UInt8[np.ndarray, "frames 3 height width"]:
    """Decode frames of one episode.

    Args:
        dataset: open, with the videos of this episode.
        camera: a colour camera's feature.
        episode: as the dataset numbers them.
        rows: of the frames, as the dataset is indexed.

    Raises:
        ValueError, OSError, RuntimeError, IndexError, SyntaxError: a file cannot be read.
    """
    meta = dataset.meta
    if camera not in meta.video_keys:
        images = dataset.hf_dataset.with_format(None).select_columns([camera])
        return np.stack([np.asarray(images[row][camera].convert("RGB")).transpose(2, 0, 1) for row in rows])
    times = dataset.hf_dataset.data.column("timestamp").to_numpy()[list(rows)]
    begin = float(meta.episodes[episode][f"videos/{camera}/from_timestamp"])
    path = Path(meta.root) / meta.get_video_file_path(episode, camera)
    times = [begin + float(time) for time in times]
    backend = video_backend(dataset)
    if backend == "pyav":
        return frames_at(path, times, dataset.tolerance_s).numpy()
    return decode_video_frames(path, times, dataset.tolerance_s, backend, return_uint8=True).numpy()


def video_backend(dataset: LeRobotDataset) -> str:
    """What decodes a dataset's videos: LeRobot's default is torchcodec also where that does not load."""
    backend = dataset._video_backend
    return get_safe_default_video_backend() if backend == "torchcodec" else backend


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a camera measures distances, which LeRobot leaves in their unit."""
    return bool((feature.get("info") or {}).get("is_depth_map", False))
