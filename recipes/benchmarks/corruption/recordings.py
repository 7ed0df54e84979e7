"""Expert recordings of the benchmark: made once, stored as a LeRobotDataset, and read back without their images."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float32
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets import LeRobotDatasetMetadata
from tqdm import tqdm

from benchmarks.experts import Recording, record_expert
from benchmarks.fast_writer import write_frames
from episodes import Episode, write_demonstrations
from ptr_hf.data.demonstrations import CLEAN, EpisodeSource, Truth, TruthRecord, load_truth, save_truth
from ptr_hf.envs.metaworld import FPS, MetaworldScene
from ptr_hf.envs.metaworld_tasks import PUCK_TASKS, BenchmarkScene, Goals, Track, task_instruction

EXPERT, SLOPPY = "expert", "sloppy"
CHANNELS = {"action": ["x", "y", "z", "gripper"]}
ENCODER = RGBEncoderConfig(vcodec="h264", g=8, crf=15, preset="medium", extra_options={"bf": 0})
SLOPPY_STEPS = 250  # a sloppy operator takes longer


class SloppyOperator:
    """The scripted expert with an unsteady hand: correlated noise on x, y and z, each in proportion to its speed, and
    pauses.

    Args:
        seed: of the noise and the pauses.
        std: of the noise, relative to the action.
        correlation: steps after which the noise has forgotten itself to 1/e.
        pause: probability that a pause begins at a step.
        pause_steps: shortest and longest pause.
    """

    def __init__(
        self,
        seed: Sequence[int],
        std: float = 0.8,
        correlation: float = 10.0,
        pause: float = 0.02,
        pause_steps: tuple[int, int] = (5, 15),
    ) -> None:
        self.settings = {"std": std, "correlation": correlation, "pause": pause, "pause_steps": list(pause_steps)}
        self._rng = np.random.default_rng(seed)
        self._drift, self._keep, self._std = np.zeros(3), float(np.exp(-1.0 / correlation)), std
        self._pause, self._pause_steps, self._waiting = pause, pause_steps, 0

    def __call__(self, scene: MetaworldScene) -> Float32[np.ndarray, "4"]:
        action = scene.expert_action()
        step = np.sqrt(1.0 - self._keep**2) * self._rng.normal(0.0, self._std, 3)
        self._drift = self._keep * self._drift + step
        if self._waiting == 0 and self._rng.random() < self._pause:
            self._waiting = int(self._rng.integers(*self._pause_steps, endpoint=True))
        if self._waiting:
            self._waiting -= 1
            action[:3] = 0.0
        else:
            # A careless hand is still careful where precision counts, that is, along axes that the expert holds still.
            action[:3] += self._drift * np.abs(action[:3])
        return np.clip(action, -1.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Recordings:
    """Demonstrations in the order of their dataset: tasks take turns, operators one after the other.

    Without images in the episodes, ``folder`` is the LeRobotDataset that holds the videos.
    """

    track: Track
    items: tuple[Recording, ...]
    operators: tuple[str, ...]
    folder: Path | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of their first demonstrations."""
        return tuple(dict.fromkeys(item.environment for item in self.items))

    def start(self, index: int) -> tuple[str, int]:
        """The task of a recording and the seed of its start."""
        return self.items[index].environment, self.items[index].environment_seed

    def of(self, operator: str, count: int | None = None, counts: Mapping[str, int] | None = None) -> list[int]:
        """Indices of an operator's recordings.

        Args:
            operator: ``expert`` or ``sloppy``.
            count: of every task; all of them if None.
            counts: of single tasks.

        Raises:
            ValueError: if there are fewer.
        """
        chosen, seen = [], dict.fromkeys(self.tasks, 0)
        wanted = {task: (counts or {}).get(task, count) for task in self.tasks}
        for index, (item, recorded_by) in enumerate(zip(self.items, self.operators, strict=True)):
            limit = wanted[item.environment]
            if recorded_by == operator and (limit is None or seen[item.environment] < limit):
                chosen.append(index)
                seen[item.environment] += 1
        short = {task: number for task, number in seen.items() if number < (wanted[task] or 1)}
        if short:
            raise ValueError(f"Too few recordings by the {operator} operator: {short}; {wanted} were asked for.")
        return chosen


def record_benchmark(
    track: Track,
    tasks: Sequence[str],
    per_task: int,
    first_seed: int,
    goals: Goals = "train",
    operators: Sequence[str] = (EXPERT,),
    steps_after_success: int = 20,
    progress: bool = True,
) -> Recordings:
    """``per_task`` demonstrations of every task by every operator, on the starts from ``first_seed`` on.

    A start on which an operator fails is left out for all of them. Recording goes on past success, so that the last chunks
    have a future too.

    Args:
        track: what is recorded; ``pixels`` renders every frame.
        tasks: of the benchmark, or of Meta-World.
        per_task: demonstrations of each task by each operator.
        first_seed: of the starts; two sets are disjoint if their seeds are.
        goals: where the goals of the six tasks lie.
        operators: ``expert``, ``sloppy`` or both.
        steps_after_success: frames recorded after the one whose action solved the task.
        progress: shows a bar.

    Raises:
        ValueError: for an unknown operator.
        RuntimeError: if more than half of the starts of a task fail.
    """
    if unknown := sorted(set(operators) - {EXPERT, SLOPPY}):
        raise ValueError(f"Unknown operators {unknown}; there are '{EXPERT}' and '{SLOPPY}'.")
    by_task: list[list[dict[str, Recording]]] = []
    scenes: dict[str, BenchmarkScene] = {}
    bar = tqdm(total=len(tasks) * per_task, desc="recording", unit="start", disable=not progress)
    with warnings.catch_warnings(), bar:
        warnings.filterwarnings("ignore", message="Constant")  # experts ask for more than the limits
        for task in tasks:
            name = PUCK_TASKS[0] if task in PUCK_TASKS else task
            if name not in scenes:
                scenes[name] = BenchmarkScene(task, track, goals)
            scene = scenes[name]
            scene.select(task)
            found: list[dict[str, Recording]] = []
            for seed in range(first_seed, first_seed + 2 * per_task):
                recordings = _record_start(scene, seed, operators, steps_after_success)
                if recordings is not None:
                    found.append(recordings)
                    bar.update()
                if len(found) == per_task:
                    break
            else:
                raise RuntimeError(f"Only {len(found)} of {2 * per_task} starts of '{task}' were solved.")
            by_task.append(found)
    for scene in scenes.values():
        scene.close()
    turns = [start for turn in zip(*by_task, strict=True) for start in turn]
    items = tuple(start[operator] for operator in operators for start in turns)
    return Recordings(track, items, tuple(operator for operator in operators for _ in turns))


def _record_start(
    scene: BenchmarkScene, seed: int, operators: Sequence[str], steps_after_success: int
) -> dict[str, Recording] | None:
    recordings: dict[str, Recording] = {}
    for operator in operators:
        recording = record_expert(
            scene,
            seed,
            steps_after_success=steps_after_success,
            max_steps=SLOPPY_STEPS if operator == SLOPPY else scene._max_episode_steps,
            images=scene.track == "pixels",
            must_stay=False,
            operator=SloppyOperator([seed, scene.tasks.index(scene.task)]) if operator == SLOPPY else None,
        )
        if recording is None:
            return None
        recordings[operator] = recording
    return recordings


def save_recordings(folder: Path, recordings: Recordings, overwrite: bool = False) -> Recordings:
    """Stores the recordings as a LeRobotDataset with its sidecar; the ones returned leave their images there."""
    episodes = [item.episode for item in recordings.items]
    settings: dict[str, Any] = {"fps": FPS, "names": CHANNELS, "robot_type": "sawyer", "overwrite": overwrite}
    if recordings.track == "pixels":
        write_demonstrations(folder, episodes, encoder=ENCODER, **settings)
    else:
        write_frames(folder, episodes, **settings)
    records = [
        operator_record(index, item, operator)
        for index, (item, operator) in enumerate(zip(recordings.items, recordings.operators, strict=True))
    ]
    plan = {"track": recordings.track, "operators": list(recordings.operators), "versions": simulator_versions()}
    save_truth(folder, Truth(tuple(records), episode_sources(recordings.items), plan))
    return load_recordings(folder)


def load_recordings(folder: Path) -> Recordings:
    """Reads what :func:`save_recordings` wrote; images stay in the dataset's videos."""
    truth = load_truth(folder)
    meta = LeRobotDatasetMetadata(folder.name, root=folder)
    keys = [key for key in ("observation.state", "action") if key in meta.features]
    table = pq.read_table(folder / "data", columns=[*keys, "episode_index"])
    streams = {key: np.stack(table[key].to_numpy()) for key in keys}
    bounds = np.flatnonzero(np.diff(table["episode_index"].to_numpy(), prepend=-1, append=-1))
    items = []
    for source, first, last in zip(truth.sources, bounds[:-1], bounds[1:], strict=True):
        frames = {key: stream[first:last] for key, stream in streams.items()}
        episode = Episode(frames, task_instruction(source.environment))
        items.append(Recording(episode, source.environment, source.environment_seed, source.success_step))
    return Recordings(truth.plan["track"], tuple(items), tuple(truth.plan["operators"]), folder)


def operator_record(index: int, item: Recording, operator: str) -> TruthRecord:
    """The truth about an episode whose labels nobody touched: ``clean``, or the operator who recorded it."""
    kind = CLEAN if operator == EXPERT else operator
    return TruthRecord(index, kind, item.episode.task, item.episode.task)


def episode_sources(items: Sequence[Recording]) -> tuple[EpisodeSource, ...]:
    """Where the episodes of a dataset come from, in its order."""
    return tuple(
        EpisodeSource(index, item.environment, item.environment_seed, item.success_step, item.episode.length)
        for index, item in enumerate(items)
    )


def simulator_versions() -> dict[str, str]:
    """The versions that decide what the simulator shows."""
    return {name: version(name) for name in ("metaworld", "mujoco", "lerobot")}
