"""The demonstrations shipped with the package, and the truth about what was corrupted in demonstrations.

The truth lives in a sidecar *beside* the dataset's folder, ``<folder>.truth.json``. Training never reads it: it is there
for the oracle control and for judging scores afterwards.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

CLEAN = "clean"
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
class TruthRecord:
    """What was done to one episode: the sidecar holds one per corruption, and one of kind ``clean`` for the others."""

    episode_index: int
    kind: str
    source_task: str
    task: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
