"""The LIBERO benchmark's data: demonstrations recorded once, and from them a dataset for every condition and seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE

from benchmarks.fast_writer import VideoSource, write_frames
from benchmarks.libero.experts import Kind
from benchmarks.libero.record_libero import RecordingArguments, write
from benchmarks.libero.scene import ACTION_NAMES, FPS, STATE_NAMES, Starts, Suite
from episodes import Episode
from faults import PAPER_SHARES, CorruptionPlan
from ptr_hf.data.demonstrations import CLEAN, Truth, TruthRecord, load_truth, save_truth, truth_path

type Track = Literal["states", "pixels"]

OPERATORS: tuple[Kind, ...] = ("failed_attempt", "hesitation", "recovery")
"""Who does not do it straight on."""
FIRST_PRETRAINING_START, FIRST_START, FIRST_TEST_START = 1_000, 2_000, 100_000
"""First start of the demonstrations to pretrain on, to post-train on, and of the held-out starts: they never meet."""


@dataclass(frozen=True)
class Condition:
    """What a run's demonstrations are like.

    Args:
        description: one line for a table.
        operators: who records a share of the episodes of every task in the expert's place -> that share.
        faults: kind of fault -> share of all episodes, drawn independently.
        parameters: kind of fault -> its severity.
    """

    description: str
    operators: Mapping[Kind, float] = field(default_factory=dict)
    faults: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _noise(std: float) -> Mapping[str, Mapping[str, Any]]:
    """On the hand's steps and the gripper; a fortieth of it on the hand's turns, of which the experts make hardly any.

    With as much on the turns their noise would be all that a policy learns: 20 times as wide as what they do.
    """
    return {"noise": {"std": (std, std, std, std / 40, std / 40, std / 40, std), "bounds": (-1.0, 1.0)}}


CONDITIONS: Mapping[str, Condition] = {
    "clean": Condition("nothing is wrong"),
    "combined": Condition(
        "30 % noise of std 0.4, 25 % cut to 40-70 %, 20 % wrong instruction",
        faults=PAPER_SHARES,
        parameters=_noise(0.4),
    ),
    "failed_attempts": Condition("40 %: the object slips, the arm goes on", {"failed_attempt": 0.4}),
    "paper_combined": Condition("as combined, noise of std 0.1", faults=PAPER_SHARES, parameters=_noise(0.1)),
    "noise": Condition("30 %: noise of std 0.4", faults={"noise": 0.30}, parameters=_noise(0.4)),
    "truncation": Condition("25 %: cut to 40-70 %", faults={"truncation": 0.25}),
    "instruction": Condition("20 %: another task's instruction", faults={"wrong_instruction": 0.20}),
    "convention": Condition("25 %: x and y with the wrong sign", faults={"wrong_convention": 0.25}),
    "hesitation": Condition("40 %: pauses and wanders off, then succeeds", {"hesitation": 0.4}),
    "recovery": Condition("40 %: misses at first, then succeeds", {"recovery": 0.4}),
}


@dataclass(frozen=True)
class Pool:
    """What is recorded, once for all runs.

    Args:
        suite: of LIBERO.
        tasks: their numbers.
        track: whether policies read the objects' poses, or two cameras.
        starts: of all demonstrations, and of the held-out starts.
        pretraining: expert demonstrations of every task from other such starts, for the policy that every run starts from.
        recorded: demonstrations of every task to post-train on, half of them by the expert.
        operators: who records the other half, in turns.
        used: of every task in a run.
        image_size: side of the pictures.
    """

    suite: Suite = "libero_object"
    tasks: tuple[int, ...] = (0, 1, 6, 8)
    track: Track = "states"
    starts: Starts = "sampled"
    pretraining: int = 12
    recorded: int = 80
    operators: tuple[Kind, ...] = OPERATORS
    used: int = 30
    image_size: int = 84


def record_pool(pool: Pool, workspace: Path) -> None:
    """Record what is missing."""
    common: dict[str, Any] = {"suite": pool.suite, "tasks": list(pool.tasks), "track": pool.track}
    common |= {"starts": pool.starts, "image_size": pool.image_size, "overwrite": True}
    parts: Mapping[str, dict[str, Any]] = {
        "pretraining": {"per_task": pool.pretraining, "first_start": FIRST_PRETRAINING_START},
        "training": {
            "per_task": pool.recorded,
            "first_start": FIRST_START,
            "kinds": list(pool.operators),
            "share": 0.5,
        },
    }
    for name, settings in parts.items():
        folder = workspace / "pool" / name
        if not truth_path(folder).is_file():
            write(RecordingArguments(folder, **common, **settings))


def load_episodes(folder: Path) -> list[Episode]:
    """The episodes of a recorded dataset, without their pictures."""
    meta = LeRobotDatasetMetadata(folder.name, root=folder)
    table = pq.read_table(folder / "data", columns=["index", "episode_index", "task_index", ACTION, OBS_STATE])
    table = table.sort_by("index")
    ends = np.flatnonzero(np.diff(table["episode_index"].to_numpy())) + 1
    streams = {key: np.split(np.stack(table[key].to_numpy()), ends) for key in (OBS_STATE, ACTION)}
    tasks = [meta.tasks.index[own[0]] for own in np.split(table["task_index"].to_numpy(), ends)]
    return [
        Episode({OBS_STATE: state, ACTION: action}, task)
        for state, action, task in zip(streams[OBS_STATE], streams[ACTION], tasks, strict=True)
    ]


def condition_dataset(pool: Pool, workspace: Path, condition: str, seed: int, blind: bool = False) -> Path:
    """The dataset of a condition and a seed, written at first use; what was done to it lies in its truth sidecar.

    Args:
        pool: recorded in the workspace.
        workspace: of the benchmark.
        condition: a name in :data:`CONDITIONS`.
        seed: decides which demonstrations a run gets, who recorded them, and every fault.
        blind: leave out where the objects are.
    """
    folder = workspace / "datasets" / f"{condition}_{seed}{'_blind' if blind else ''}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.with_suffix(".done").exists():
            _write(folder, pool, workspace / "pool" / "training", CONDITIONS[condition], seed, blind)
            folder.with_suffix(".done").touch()
    return folder


def pretraining_dataset(workspace: Path, blind: bool = False) -> Path:
    """The dataset that the policy learns from which every run starts from."""
    source = workspace / "pool" / "pretraining"
    if not blind:
        return source
    folder = workspace / "datasets" / "pretraining_blind"
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_frames(folder, map(without_objects, load_episodes(source)), FPS, _names(), "panda", overwrite=True)
    return folder


def without_objects(episode: Episode) -> Episode:
    """The same episode with the robot's own state alone."""
    return Episode({**episode.frames, OBS_STATE: episode.frames[OBS_STATE][:, : len(STATE_NAMES)]}, episode.task)


def chosen(truth: Truth, condition: Condition, used: int, seed: int) -> list[int]:
    """The recorded episodes of a run, in random order: of every task ``used``, a share of them by the condition's operators."""
    rng = np.random.default_rng(seed)
    kinds = truth.kinds()
    picked: list[int] = []
    for task in dict.fromkeys(source.environment for source in truth.sources):
        own = [source.episode_index for source in truth.sources if source.environment == task]
        counts: dict[str, int] = {kind: round(share * used) for kind, share in condition.operators.items()}
        counts[CLEAN] = used - sum(counts.values())
        for kind, count in counts.items():
            there = [episode for episode in own if kinds[episode] == kind]
            if len(there) < count:
                raise ValueError(f"{count} episodes of kind '{kind}' are needed of {task}; {len(there)} are recorded.")
            picked += rng.permutation(there)[:count].tolist()
    return rng.permutation(picked).tolist()


def _write(folder: Path, pool: Pool, source: Path, condition: Condition, seed: int, blind: bool) -> None:
    truth, recorded = load_truth(source), load_episodes(source)
    numbers = chosen(truth, condition, pool.used, seed)
    plan = CorruptionPlan(condition.faults, seed, condition.parameters, overlapping=True)
    kinds = truth.kinds()
    episodes: list[Episode] = []
    records: list[TruthRecord] = []
    clean = [recorded[number] for number in numbers]
    for place, (episode, done) in enumerate(plan.apply(clean, [item.task for item in clean])):
        kind = kinds[numbers[place]]
        own = [record for record in done if record.kind != CLEAN]
        if kind != CLEAN or not own:
            own.append(TruthRecord(place, kind, clean[place].task, episode.task))
        episodes.append(without_objects(episode) if blind else episode)
        records += own
    videos = VideoSource(source, numbers) if pool.track == "pixels" else None
    write_frames(folder, episodes, FPS, _names(), "panda", videos, overwrite=True)
    save_truth(folder, Truth(tuple(records), plan={"condition": condition.description, "seed": seed}))


def _names() -> dict[str, list[str]]:
    return {ACTION: list(ACTION_NAMES)}
