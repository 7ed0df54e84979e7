"""Statistics of a camera's pictures, for a dataset that has none."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lerobot.datasets.compute_stats import RunningQuantileStats, auto_downsample_height_width, sample_indices
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm.auto import tqdm

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.segments import SegmentLayout

ONE_FRAME = SegmentLayout(None, (0,), 1, 1, None)


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a camera measures distances, which LeRobot leaves in their unit."""
    return bool((feature.get("info") or {}).get("is_depth_map", False))


def picture_statistics(dataset: LeRobotDataset, key: str) -> dict[str, np.ndarray]:
    """Per channel, each of shape (channels, 1, 1), over frames that are spread over the dataset, as many as LeRobot takes.

    Args:
        dataset: open; its image transforms are left out.
        key: of the camera.
    """
    plain = open_dataset(dataset, ONE_FRAME)
    plain.clear_image_transforms()
    running = RunningQuantileStats()
    places = sample_indices(len(plain))
    for place in tqdm(places, desc=f"statistics of {key}", unit="frame"):
        picture = plain[place][key]
        scaled = picture.float() / 255.0 if picture.dtype == torch.uint8 else picture.float()
        small = auto_downsample_height_width(scaled.numpy())
        running.update(small.reshape(len(small), -1).T.astype(np.float64))
    found = running.get_statistics()
    return {
        name: np.array([len(places)]) if name == "count" else np.asarray(value).reshape(-1, 1, 1)
        for name, value in found.items()
    }
