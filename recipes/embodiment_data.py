"""The embodiment benchmark's data: demonstrations of every arm, and from them a mixture for every condition and seed."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from embodiment_arms import ARMS, EXPERT, FPS, SLOPPY, ArmScene, Demonstration, record
from lerobot.utils.constants import ACTION, OBS_STATE

from ptr_hf.data.corruption import Episode, TruthRecord
from ptr_hf.data.demonstrations import EpisodeSource, Truth, save_truth
from ptr_hf.data.fast_writer import write_frames
from ptr_hf.data.mixture_config import MixtureConfig, SourceConfig

FIRST_START, FIRST_TEST_START = 1_000, 100_000
"""First start of the demonstrations and of the held-out starts: they never meet."""
CONDITIONS: Mapping[str, Mapping[str, float]] = {"uneven": {"Panda": 0.5, "UR5e": 0.5}, "clean": {}}
"""Condition -> arm -> share of its episodes that operators of bad quality recorded; the other arms have experts alone."""


@dataclass(frozen=True)
class Pool:
    """How much is recorded of every arm.

    Args:
        arms: by name.
        recorded: demonstrations by experts, of which a run takes ``used``; as many by operators of bad quality as are used.
        used: demonstrations of every arm in a run.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    recorded: int = 60
    used: int = 40


def instruction(arm: str) -> str:
    """What a demonstration is called. It names the arm: the same motion is written in another convention for every one."""
    return f"lift the cube with the {arm}"


@cache
def shared_scene(arm: str) -> ArmScene:
    """This process's scene of an arm: building one takes a second."""
    return ArmScene(ARMS[arm])


def record_all(pool: Pool, workspace: Path, jobs: int = 1) -> None:
    """Record what is missing of every arm, in as many processes."""
    missing = [arm for arm in pool.arms if not _recordings(workspace, arm, pool).is_file()]
    if missing:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
            list(processes.map(record_arm, missing, [pool] * len(missing), [workspace] * len(missing)))


def record_arm(arm: str, pool: Pool, workspace: Path) -> None:
    """Record an arm's pool: starts on which the expert lifts the cube, and operators of bad quality in turns on the same.

    Raises:
        RuntimeError: if the expert fails in more than half of the starts.
    """
    scene = shared_scene(arm)
    experts: list[Demonstration] = []
    careless: list[Demonstration] = []
    for seed in range(FIRST_START, FIRST_START + 2 * pool.recorded):
        tried = record(scene, seed)
        if tried.success_step is None:
            continue
        if len(experts) < pool.used and any(arm in shares for shares in CONDITIONS.values()):
            careless.append(record(scene, seed, SLOPPY[len(experts) % len(SLOPPY)]))
        experts.append(tried)
        if len(experts) == pool.recorded:
            break
    else:
        raise RuntimeError(f"The expert lifted the cube with {arm} in {len(experts)} of {2 * pool.recorded} starts.")
    save_recordings(arm, pool, workspace, [*experts, *careless])


def save_recordings(arm: str, pool: Pool, workspace: Path, demonstrations: Sequence[Demonstration]) -> None:
    """Store an arm's demonstrations."""
    path = _recordings(workspace, arm, pool)
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = {f"states_{n}": item.states for n, item in enumerate(demonstrations)}
    streams |= {f"actions_{n}": item.actions for n, item in enumerate(demonstrations)}
    facts = [[item.quality, item.seed, item.success_step] for item in demonstrations]
    np.savez(path, facts=np.array(json.dumps(facts)), **streams)


def load_recordings(arm: str, pool: Pool, workspace: Path) -> tuple[list[Demonstration], list[Demonstration]]:
    """An arm's demonstrations: by experts, and by operators of bad quality."""
    with np.load(_recordings(workspace, arm, pool)) as file:
        found = [
            Demonstration(file[f"states_{n}"], file[f"actions_{n}"], quality, seed, success)
            for n, (quality, seed, success) in enumerate(json.loads(str(file["facts"])))
        ]
    return [item for item in found if item.quality == EXPERT], [item for item in found if item.quality != EXPERT]


def chosen(
    experts: Sequence[Demonstration], careless: Sequence[Demonstration], used: int, share: float, seed: int
) -> list[Demonstration]:
    """A run's demonstrations of an arm, in random order: ``share`` of them by operators of bad quality."""
    rng = np.random.default_rng(seed)
    bad = round(share * used)
    picked = [experts[n] for n in rng.permutation(len(experts))[: used - bad]]
    picked += [careless[n] for n in rng.permutation(len(careless))[:bad]]
    return [picked[n] for n in rng.permutation(used)]


def condition_mixture(pool: Pool, workspace: Path, condition: str, seed: int) -> MixtureConfig:
    """The mixture of a condition and a seed; every arm has the same share of the samples. Datasets are written at first use.

    What an operator did wrong lies beside each dataset, in its truth sidecar.
    """
    sources = []
    for number, arm in enumerate(pool.arms):
        folder = workspace / "datasets" / f"{condition}_{seed}_{pool.used}" / arm
        if not folder.with_suffix(".done").exists():
            share = CONDITIONS[condition].get(arm, 0.0)
            experts, careless = load_recordings(arm, pool, workspace)
            _write(folder, arm, chosen(experts, careless, pool.used, share, 100 * seed + number))
            folder.with_suffix(".done").touch()
        sources.append(SourceConfig(folder, name=arm, embodiment={"name": arm, **ARMS[arm].layout}, share=1.0))
    return MixtureConfig(sources, action_space="compact")


def _write(folder: Path, arm: str, demonstrations: Sequence[Demonstration]) -> None:
    task = instruction(arm)
    episodes = [Episode({OBS_STATE: item.states, ACTION: item.actions}, task) for item in demonstrations]
    names = {OBS_STATE: ARMS[arm].state_names, ACTION: ARMS[arm].action_names}
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_frames(folder, episodes, FPS, names, robot_type=arm.lower(), overwrite=True)
    records = [TruthRecord(n, item.quality, task, task, seed=item.seed) for n, item in enumerate(demonstrations)]
    sources = [
        EpisodeSource(
            n, f"Lift/{arm}", item.seed, -1 if item.success_step is None else item.success_step, len(item.states)
        )
        for n, item in enumerate(demonstrations)
    ]
    save_truth(folder, Truth(tuple(records), tuple(sources), {"action": ARMS[arm].convention.description}))


def _recordings(workspace: Path, arm: str, pool: Pool) -> Path:
    return workspace / "recordings" / f"{arm}_{pool.recorded}_{pool.used}.npz"
