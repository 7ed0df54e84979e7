"""Stand-ins for the assets of the paper's experiments: datasets of the same schema, small and short, and a tiny smolvla_base."""

from pathlib import Path
from typing import Any

import numpy as np
from demonstrations import ENCODER
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm

SIZE = 32
INSTRUCTIONS = ("put the bowl on the plate", "open the top drawer", "turn on the stove")
LIBERO: dict[str, Any] = {
    "fps": 10,
    "cameras": ("observation.images.image", "observation.images.image2"),
    "state": 8,
    "action": 7,
    "extra": {},
}
ROBOCASA: dict[str, Any] = {
    "fps": 20,
    "cameras": tuple(
        f"observation.images.robot0_{name}" for name in ("agentview_left", "agentview_right", "eye_in_hand")
    ),
    "state": 16,
    "action": 12,
    "extra": {
        "annotation.human.task_description": "int64",
        "next.reward": "float32",
        "next.done": "bool",
    },
}
SCHEMAS = {"libero": LIBERO, "robocasa": ROBOCASA}


def write_stand_in(
    root: Path,
    suite: str,
    lengths: tuple[int, ...] = (90, 70, 80, 75, 60, 85),
    *,
    videos: bool = True,
    tasks: tuple[str, ...] = INSTRUCTIONS,
    seed: int = 0,
) -> Path:
    """A LeRobotDataset with a suite's keys, sizes and rate, small frames and smooth random motion."""
    schema = SCHEMAS[suite]
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (schema["state"],), "names": ["state"]},
        "action": {
            "dtype": "float32",
            "shape": (schema["action"],),
            "names": [f"a{i}" for i in range(schema["action"])],
        },
    }
    features |= {key: {"dtype": dtype, "shape": (1,), "names": None} for key, dtype in schema["extra"].items()}
    kind = "video" if videos else "image"
    for camera in schema["cameras"]:
        features[camera] = {"dtype": kind, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create(
        f"stand-ins/{suite}",
        schema["fps"],
        features,
        root=root,
        robot_type="panda",
        use_videos=videos,
        rgb_encoder=ENCODER,
    )
    random = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        actions = np.clip(np.cumsum(random.normal(0, 0.05, (length, schema["action"])), axis=0), -1, 1)
        states = np.cumsum(np.resize(actions, (length, schema["state"])), axis=0) / 10
        for frame in range(length):
            item: dict[str, Any] = {
                "observation.state": states[frame].astype(np.float32),
                "action": actions[frame].astype(np.float32),
                "task": tasks[episode % len(tasks)],
            }
            item |= {key: np.array([frame == length - 1], dtype=dtype) for key, dtype in schema["extra"].items()}
            for number, camera in enumerate(schema["cameras"]):
                item[camera] = _view(states[frame], number)
            dataset.add_frame(item)
        dataset.save_episode()
    dataset.finalize()
    return root


def _view(state: np.ndarray, camera: int) -> np.ndarray:
    """A square at a place that two state channels decide, in the camera's own colour."""
    picture = np.full((SIZE, SIZE, 3), 30, dtype=np.uint8)
    row, column = (np.clip(state[camera : camera + 2] + 0.5, 0, 1) * (SIZE - 8)).astype(int)
    picture[row : row + 8, column : column + 8, camera] = 220
    return picture


def write_smolvla_base(folder: Path) -> Path:
    """A tiny SmolVLA saved as lerobot/smolvla_base is: three cameras, another robot's sizes, chunks of 50, frozen backbone."""
    vlm = write_tiny_vlm(
        folder / "vlm",
        image_size=32,
        patch_size=8,
        vision_dim=32,
        vision_layers=2,
        vision_heads=2,
        text_dim=32,
        text_layers=2,
        text_heads=2,
        texts=INSTRUCTIONS,
    )
    inputs = {
        f"observation.images.camera{number}": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for number in (1, 2, 3)
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (6,))
    policy = tiny_smolvla(
        (inputs, {"action": PolicyFeature(FeatureType.ACTION, (6,))}),
        vlm.resolve(),
        chunk_size=50,
        num_steps=10,
        freeze_vision_encoder=True,
        train_expert_only=True,
    )
    policy.save_pretrained(folder)
    return folder
