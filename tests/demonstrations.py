"""Small real LeRobotDatasets and policies for the tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

TASKS = ("push the puck to the goal", "reach the goal")
ENCODER = RGBEncoderConfig(vcodec="h264")
"""LeRobot's default, SVT-AV1, gives a process of root real-time priority for good, which starves all else on the machine."""


def write_dataset(
    root: Path,
    lengths: Sequence[int] = (30, 24, 40, 18),
    *,
    cameras: Sequence[str] = ("observation.image",),
    use_videos: bool = False,
    size: int = 32,
    fps: int = 10,
    seed: int = 0,
    vivid: bool = False,
    file_an_episode: bool = False,
    encoder: RGBEncoderConfig = ENCODER,
) -> Path:
    """A LeRobotDataset of a point that follows its actions; every frame shows where the point is and which frame it is.

    State is (x, y, frame / 100, episode), action the step (dx, dy); episodes alternate between two tasks. `vivid` frames take
    their background's colour from the point and the episode, so that even an untrained vision tower tells them apart.
    `file_an_episode` starts a data file with every episode, as LeRobot does with every hundred megabytes.
    """
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "frame", "episode"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
    }
    kind = "video" if use_videos else "image"
    for camera in cameras:
        features[camera] = {"dtype": kind, "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create(
        "tests/points", fps, features, root=root, use_videos=use_videos, rgb_encoder=encoder
    )
    if file_an_episode:
        dataset.meta.update_chunk_settings(data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6)
    random = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        point, goal = random.uniform(0.2, 0.8, 2), random.uniform(0.2, 0.8, 2)
        for frame in range(length):
            action = np.clip(goal - point, -0.05, 0.05) + random.normal(0, 0.01, 2)
            item = {
                "observation.state": np.array([*point, frame / 100, episode], dtype=np.float32),
                "action": action.astype(np.float32),
                "task": TASKS[episode % 2],
            }
            for camera in cameras:
                background = np.array([*point, (0.37 * episode) % 1.0]) if vivid else np.full(3, 40 / 255)
                item[camera] = _picture(point, goal, size, background)
            dataset.add_frame(item)
            point = point + action
        dataset.save_episode()
    dataset.finalize()
    return root


def _picture(point: np.ndarray, goal: np.ndarray, size: int, background: np.ndarray) -> np.ndarray:
    picture = np.tile(np.clip(255 * background, 0, 255).astype(np.uint8), (size, size, 1))
    for centre, colour in ((goal, (40, 200, 40)), (point, (220, 60, 40))):
        x, y = (np.clip(centre, 0, 1) * (size - 5)).astype(int)
        picture[y : y + 5, x : x + 5] = colour
    return picture
