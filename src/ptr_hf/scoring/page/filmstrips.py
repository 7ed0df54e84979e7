"""Small pictures of some frames of a dataset, as data URLs; nothing else is decoded."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lerobot.datasets import LeRobotDataset
from lerobot.utils.import_utils import get_safe_default_video_backend
from PIL import Image

from ptr_hf.data.datasets import dataset_metadata
from ptr_hf.data.pictures import pictures
from ptr_hf.scoring.recordings import single

HEIGHT, WIDTH = 132, 200
"""Pictures are made to fit, in pixels; smaller ones are enlarged twice at most."""
QUALITY = 72


def filmstrips(
    source: Any, wanted: Mapping[int, Sequence[int]], revision: str | None = None
) -> tuple[str, dict[tuple[int, int], str]]:
    """Pictures of the first camera that is no depth map.

    Args:
        source: Hub id, folder, open LeRobotDataset, or a mixture's source. Of a Hub dataset the videos of these episodes are
            fetched.
        wanted: frames by episode, as the dataset numbers them.
        revision: of the Hub repo.

    Returns:
        the camera's name ("" where there is none), and a WebP data URL by (episode, frame).

    Raises:
        ValueError, OSError: a video cannot be read.
    """
    source, _, revision = single(source, revision=revision)
    meta = dataset_metadata(source, revision)
    cameras = [key for key in meta.camera_keys if key not in set(getattr(meta, "depth_keys", ()))]
    if not cameras or not wanted:
        return "", {}
    camera = cameras[0]
    episodes = sorted(wanted)
    dataset = LeRobotDataset(
        meta.repo_id,
        root=meta.root,
        revision=revision,
        episodes=episodes,
        video_backend=get_safe_default_video_backend(),
    )
    numbers = np.asarray(dataset.hf_dataset.with_format("numpy")["episode_index"])
    found: dict[tuple[int, int], str] = {}
    for episode, frames in wanted.items():
        chosen = sorted(set(frames))
        first = int(np.flatnonzero(numbers == episode)[0])
        shown = pictures(dataset, camera, episode, [first + frame for frame in chosen])
        for frame, picture in zip(chosen, shown, strict=True):
            found[episode, frame] = data_url(picture)
    return camera.removeprefix("observation.images.").removeprefix("observation."), found


def data_url(picture: np.ndarray) -> str:
    """A picture (3, H, W) of uint8 made small, as WebP."""
    image = Image.fromarray(picture.transpose(1, 2, 0))
    scale = min(HEIGHT / image.height, WIDTH / image.width, 2.0)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
