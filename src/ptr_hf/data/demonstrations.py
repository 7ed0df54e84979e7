"""The demonstrations shipped with the package, writing new ones, and the truth about what was corrupted in them.

The truth lives in a sidecar *beside* the dataset's folder, ``<folder>.truth.json``. Training never reads it: it is there
for the oracle control and for judging scores afterwards.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.corruption import CLEAN, Episode, TruthRecord

BUNDLED = Path(__file__).parent / "bundled"
SPLITS = {
    "train": "metaworld_uneven",
    "heldout": "metaworld_heldout",
    "lift": "robosuite_lift",
    "states": "metaworld_combined",
}


def bundled_demonstrations(split: Literal["train", "heldout", "lift", "states"] = "train") -> Path:
    """The folder of a LeRobotDataset shipped with the package: use it as ``LeRobotDataset(path.name, root=path)``.

    ``train`` holds scripted Meta-World demonstrations of which a known third is corrupted (``load_truth`` knows which);
    ``heldout`` holds clean ones of the same tasks in other scenes. ``lift`` is of another robot with another schema, camera
    and rate (a UR5e in robosuite), for mixtures. The recording scripts lie in ``recipes/benchmarks/``.
    ``states`` is the benchmark's condition *combined* (docs/corruption.md): eight Meta-World tasks on states without a camera,
    more than half of the episodes noisy, cut short or wrongly instructed, some of them several at once.

    Raises:
        ValueError: for another split.
        FileNotFoundError: if the installation lacks the data.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no bundled split '{split}'; choose one of {sorted(SPLITS)}.")
    path = BUNDLED / SPLITS[split]
    if not (path / "meta" / "info.json").is_file():
        raise FileNotFoundError(
            f"The bundled demonstrations are missing from {path.name}; reinstall the package or record them with "
            "`python recipes/benchmarks/record_demonstrations.py`."
        )
    return path


@dataclass(frozen=True)
class EpisodeSource:
    """Where an episode comes from; ``success_step`` and ``recorded_steps`` are counted before any truncation."""

    episode_index: int
    environment: str
    environment_seed: int
    success_step: int
    recorded_steps: int


@dataclass(frozen=True)
class Truth:
    """The sidecar: what was done to every episode, and where it comes from."""

    records: tuple[TruthRecord, ...]
    sources: tuple[EpisodeSource, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_episodes(self) -> int:
        return len({record.episode_index for record in self.records})

    @property
    def corrupted(self) -> Bool[np.ndarray, "episodes"]:
        """True where something was done to the episode."""
        flags = np.zeros(self.num_episodes, dtype=bool)
        flags[[record.episode_index for record in self.records if record.kind != CLEAN]] = True
        return flags

    def kinds(self) -> dict[int, str]:
        """What was done to every episode, several things joined by +."""
        found: dict[int, list[str]] = {}
        for record in self.records:
            found.setdefault(record.episode_index, []).append(record.kind)
        return {episode: "+".join(done) for episode, done in found.items()}

    def of_kind(self, kind: str) -> list[TruthRecord]:
        """The records of one kind, in the order of the episodes; ``clean`` gives the untouched ones."""
        return [record for record in self.records if record.kind == kind]


def truth_path(dataset: Path) -> Path:
    """Where the sidecar of the dataset folder ``dataset`` lies: beside it, where training never looks."""
    return dataset.with_name(f"{dataset.name}.truth.json")


def load_truth(path: Path) -> Truth:
    """Reads the truth of a dataset folder, or of the sidecar file itself. Training never calls this.

    Raises:
        FileNotFoundError: if there is no sidecar.
        ValueError: if the episodes are not numbered 0, 1, ... without a gap.
    """
    file = path if path.suffix == ".json" else truth_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no truth sidecar {file.name}: what is corrupted in this dataset is not known."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    truth = Truth(
        tuple(TruthRecord(**record) for record in content["records"]),
        tuple(EpisodeSource(**source) for source in content["sources"]),
        content["plan"],
    )
    if {record.episode_index for record in truth.records} != set(range(truth.num_episodes)):
        raise ValueError(f"{file.name} leaves out episodes; write one record for every episode, clean ones included.")
    return truth


def save_truth(dataset: Path, truth: Truth) -> Path:
    """Writes the sidecar beside the dataset folder and returns its path."""
    content = {
        "plan": dict(truth.plan),
        "records": [record.as_dict() for record in truth.records],
        "sources": [asdict(source) for source in truth.sources],
    }
    file = truth_path(dataset)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


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
