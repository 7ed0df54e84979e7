"""Episodes in memory, and writing them as a LeRobotDataset."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.constants import ACTION

Pictures = UInt8[np.ndarray, "steps height width 3"]
Actions = Float[np.ndarray, "steps action"]


@dataclass(frozen=True)
class Episode:
    """One demonstration: ``frames`` maps a feature's key to its array of shape (steps, ...), ``task`` is the instruction.

    Raises:
        ValueError: if there are no actions or the streams differ in length.
    """

    frames: Mapping[str, np.ndarray]
    task: str

    def __post_init__(self) -> None:
        if ACTION not in self.frames:
            raise ValueError(f"An episode needs an '{ACTION}' stream; it has {sorted(self.frames)}.")
        lengths = {key: len(value) for key, value in self.frames.items()}
        if len(set(lengths.values())) > 1 or self.length == 0:
            raise ValueError(f"Every stream of an episode needs the same number of steps, at least one; got {lengths}.")

    @property
    def length(self) -> int:
        return len(self.frames[ACTION])

    @property
    def actions(self) -> Actions:
        return self.frames[ACTION]

    @property
    def cameras(self) -> tuple[str, ...]:
        """The streams of colour pictures (steps, height, width, 3), 8 bits a value."""
        return tuple(
            sorted(key for key, value in self.frames.items() if value.dtype == np.uint8 and value.shape[3:] == (3,))
        )

    def with_actions(self, actions: Actions) -> "Episode":
        """The same episode with other action labels, in the recorded dtype."""
        return Episode({**self.frames, ACTION: actions.astype(self.actions.dtype)}, self.task)

    def with_pictures(self, camera: str, pictures: Pictures) -> "Episode":
        """The same episode with other pictures of one camera."""
        return Episode({**self.frames, camera: pictures}, self.task)


def write_demonstrations(
    path: Path,
    episodes: Iterable[Episode],
    fps: int,
    names: Mapping[str, Sequence[str]] | None = None,
    robot_type: str | None = None,
    encoder: RGBEncoderConfig | None = None,
    overwrite: bool = False,
) -> int:
    """Writes episodes as a LeRobotDataset in the folder ``path``; streams of shape (steps, H, W, 3) uint8 become videos.

    Args:
        path: the dataset's folder; its name is the dataset's.
        episodes: all with the same features.
        fps: control steps per second; every step is a frame.
        names: feature -> names of its channels.
        robot_type: stored in the metadata.
        encoder: of the videos; LeRobot's default otherwise.
        overwrite: replaces an existing folder.

    Returns:
        The number of episodes written.

    Raises:
        FileExistsError: if the folder exists and ``overwrite`` is False.
        ValueError: if there are no episodes.
    """
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; pass --overwrite to replace it or choose another folder.")
        shutil.rmtree(path)
    dataset: LeRobotDataset | None = None
    count = 0
    for episode in episodes:
        if dataset is None:
            features = {key: stream_feature(value, (names or {}).get(key)) for key, value in episode.frames.items()}
            dataset = LeRobotDataset.create(
                repo_id=path.name,
                fps=fps,
                features=features,
                root=path,
                robot_type=robot_type,
                video_backend="pyav",  # nothing is read back
                rgb_encoder=encoder,
                streaming_encoding=True,
                encoder_queue_maxsize=1_000_000,  # a full queue would drop frames
                encoder_threads=1,  # the same bytes whatever the machine's number of cores
            )
        for step in range(episode.length):
            dataset.add_frame({key: value[step] for key, value in episode.frames.items()} | {"task": episode.task})
        dataset.save_episode()
        count += 1
    if dataset is None:
        raise ValueError("There are no episodes to write.")
    dataset.finalize()
    for file in path.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # LeRobot moves videos out of a private temporary file, which nobody else could read
    return count


def stream_feature(stream: np.ndarray, names: Sequence[str] | None = None) -> dict[str, Any]:
    """LeRobot's description of a stream (steps, ...): images of 8 bits are videos."""
    if stream.dtype == np.uint8 and stream.ndim == 4:
        return {"dtype": "video", "shape": stream.shape[1:], "names": ["height", "width", "channels"]}
    return {"dtype": str(stream.dtype), "shape": stream.shape[1:], "names": None if names is None else list(names)}
