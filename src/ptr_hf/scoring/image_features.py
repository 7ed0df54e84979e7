"""What an inspection sees: a few frames of every episode through an encoder and as thumbnails, kept on disk so that they are
decoded once."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import cached_assets_path
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from ptr_hf.data.datasets import dataset_metadata, episode_spans, files_digest, open_dataset
from ptr_hf.data.normalization import ONE_FRAME
from ptr_hf.data.pictures import is_depth, pictures
from ptr_hf.report.files import replacing
from ptr_hf.scoring.image_encoders import ImageEncoder, Thumbnails
from ptr_hf.scoring.recordings import Recordings, single
from ptr_hf.scoring.seen import ImageFeatures

logger = logging.getLogger(__name__)

VALUES, ROWS = "values", "rows"
LARGEST = float(np.finfo(np.float16).max)


def colour_cameras(source: Any, revision: str | None = None) -> list[str]:
    """The cameras of a dataset that are no depth maps.

    Raises:
        ValueError: there is none.
    """
    source, _, revision = single(source, revision=revision)
    meta = dataset_metadata(source, revision)
    found = [key for key in meta.camera_keys if not is_depth(meta.features[key])]
    if not found:
        raise ValueError(
            f"The dataset {meta.repo_id} has no camera, so there are no pictures to look at: leave policy out."
        )
    return found


def looked_at(recordings: Recordings, per_episode: int) -> np.ndarray:
    """(looked,) rows of at most so many frames of every episode, evenly from its first to its last."""
    share = np.linspace(0, 1, per_episode)
    spread = np.rint(share * (recordings.length[:, None] - 1)).astype(np.int64)
    return np.unique(recordings.first[:, None] + spread)


def read_image_features(
    source: Any,
    recordings: Recordings,
    encoder: ImageEncoder,
    *,
    per_episode: int,
    episodes: Sequence[int] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> ImageFeatures:
    """Encode some frames of every camera, or read what an earlier call has left in the Hugging Face cache.

    Kept are float16 values a camera and frame, the encoder's and those of a thumbnail, under a key of the dataset's files, the
    encoder and the frames. A Hub dataset's videos are fetched.

    Args:
        source: what `recordings` were read from.
        recordings: of the dataset.
        encoder: of pictures.
        per_episode: frames of an episode that are looked at.
        episodes: the subset that `recordings` hold.
        revision: of the Hub repo.
        progress: show a progress bar.

    Raises:
        ValueError: the dataset has no colour camera.
    """
    source, episodes, revision = single(source, episodes, revision)
    cameras = colour_cameras(source, revision)
    dataset = open_dataset(source, ONE_FRAME, episodes=episodes, revision=revision, announce=logger.debug)
    rows = looked_at(recordings, per_episode)
    path = _folder() / f"{_key(dataset, cameras, encoder, rows)}.safetensors"
    names = tuple(camera.removeprefix("observation.").removeprefix("images.") for camera in cameras)
    values = _kept(path, rows, len(cameras))
    if values is None:
        values = _encoded(dataset, cameras, encoder, rows, progress)
        _keep(path, values, rows)
    values = values.astype(np.float32)
    thumbnails = values[:, :, -Thumbnails.width :].reshape(len(rows), len(cameras), 3, -1)
    return ImageFeatures(rows, values[:, :, : encoder.width], names, encoder.name, thumbnails)


def _encoded(
    dataset: LeRobotDataset, cameras: Sequence[str], encoder: ImageEncoder, rows: np.ndarray, progress: bool
) -> np.ndarray:
    """(looked, cameras, numbers) float16, an episode at a time: the encoder's and those of thumbnails, once if it is they."""
    encoders = [encoder] if isinstance(encoder, Thumbnails) else [encoder, Thumbnails()]
    width = sum(one.width for one in encoders)
    found = np.full((len(rows), len(cameras), width), np.nan, np.float16)
    bar = tqdm(total=found.shape[0] * found.shape[1], desc="looking at pictures", unit="picture", disable=not progress)
    for episode, first, length in episode_spans(dataset):
        span = slice(*np.searchsorted(rows, [first, first + length]))
        own = rows[span].tolist()
        for number, camera in enumerate(cameras):
            try:
                shown = pictures(dataset, camera, episode, own)
            except Exception as error:
                logger.warning("The pictures of %s in episode %d cannot be read: %s", camera, episode, error)
            else:
                numbers = np.concatenate([one.encode(camera, number, shown) for one in encoders], axis=1)
                found[span, number] = np.clip(numbers, -LARGEST, LARGEST)
            bar.update(len(own))
    bar.close()
    return found


def _folder() -> Path:
    return cached_assets_path("ptr_hf", namespace="inspection", subfolder="image_features")


def _key(dataset: LeRobotDataset, cameras: Sequence[str], encoder: ImageEncoder, rows: np.ndarray) -> str:
    """A digest of what is encoded: the dataset's files, the frames' places in them, cameras and encoder."""
    digest = hashlib.sha256(f"{encoder.digest} {Thumbnails.digest} {list(cameras)} {files_digest(dataset)}".encode())
    digest.update(rows.tobytes())
    return digest.hexdigest()


def _kept(path: Path, rows: np.ndarray, cameras: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            values = file.get_tensor(VALUES)
            same = np.array_equal(file.get_tensor(ROWS), rows)
    except (SafetensorError, OSError, ValueError):
        return None
    return values if same and values.shape[:2] == (len(rows), cameras) else None


def _keep(path: Path, values: np.ndarray, rows: np.ndarray) -> None:
    try:
        with replacing(path) as temporary:
            save_file({VALUES: values, ROWS: rows}, temporary)
    except OSError as error:
        logger.warning(
            "The image features could not be kept, so the next inspection decodes the videos again: %s", error
        )
