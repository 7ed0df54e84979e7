"""The embodiment benchmark's data: demonstrations of every arm, and from them a mixture for every condition and seed."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from lerobot.configs.video import RGBEncoderConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from tqdm import tqdm

from benchmarks.embodiment.arms import ARMS, EXPERT, FPS, SLOPPY, ArmScene, Demonstration, record
from benchmarks.embodiment.cameras import KEY, VIEWS, Camera
from benchmarks.fast_writer import write_frames
from episodes import Episode, write_demonstrations
from ptr_hf.data.demonstrations import EpisodeSource, Truth, TruthRecord, save_truth
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig

ENCODER = RGBEncoderConfig(vcodec="h264", g=2, crf=15, preset="fast")
FIRST_START, FIRST_TEST_START = 1_000, 100_000
"""First start of the demonstrations and of the held-out starts: they never meet."""


@dataclass(frozen=True)
class Condition:
    """What a run's demonstrations are like.

    Args:
        bad: arm -> share of its episodes that operators of bad quality recorded; the other arms have experts alone.
        cameras: whether every arm also sees the scene, each from elsewhere.
    """

    bad: Mapping[str, float]
    cameras: bool = False


UNEVEN = {"Panda": 0.5, "UR5e": 0.5}
CONDITIONS: Mapping[str, Condition] = {
    "uneven": Condition(UNEVEN),
    "clean": Condition({}),
    "uneven_cameras": Condition(UNEVEN, cameras=True),
}


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


@cache
def shared_camera(arm: str) -> Camera:
    """This process's camera of an arm."""
    return Camera(shared_scene(arm), VIEWS[arm])


def record_all(pool: Pool, workspace: Path, jobs: int = 1, cameras: bool = False) -> None:
    """Record what is missing of every arm, in as many processes; with cameras, film it too."""
    missing = [arm for arm in pool.arms if not _recordings(workspace, arm, pool).is_file()]
    unseen = [arm for arm in pool.arms if cameras and not _pictures(workspace, arm, pool).is_file()]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        for what, arms in ((record_arm, missing), (film_arm, unseen)):
            tasks = [processes.submit(what, arm, pool, workspace) for arm in arms]
            for task in tqdm(as_completed(tasks), what.__name__, len(tasks), unit="arm", disable=not tasks):
                task.result()


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
        if len(experts) < pool.used and any(arm in condition.bad for condition in CONDITIONS.values()):
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
    np.savez(path, allow_pickle=False, facts=np.array(json.dumps(facts)), **streams)


def film_arm(arm: str, pool: Pool, workspace: Path) -> None:
    """Record an arm's pool once more, now before its camera.

    Raises:
        RuntimeError: an episode went another way than the recorded one, whose pictures it would not be.
    """
    scene, camera = shared_scene(arm), shared_camera(arm)
    films: dict[int, np.ndarray] = {}
    for n, item in enumerate(_all_recordings(arm, pool, workspace)):
        filmed = record(scene, item.seed, item.quality, camera=camera.picture)
        if not np.array_equal(filmed.states, item.states) or filmed.pictures is None:
            raise RuntimeError(
                f"Start {item.seed} of {arm} goes another way than in {_recordings(workspace, arm, pool)}: "
                "delete that file, it is of another version of the benchmark or of MuJoCo."
            )
        films[n] = filmed.pictures
    save_pictures(arm, pool, workspace, films)


def save_pictures(arm: str, pool: Pool, workspace: Path, films: Mapping[int, np.ndarray]) -> None:
    """Store what an arm's camera saw, by the number of the demonstration."""
    streams = {f"pictures_{n}": film for n, film in films.items()}
    np.savez_compressed(_pictures(workspace, arm, pool), allow_pickle=False, **streams)


def load_recordings(
    arm: str, pool: Pool, workspace: Path, cameras: bool = False
) -> tuple[list[Demonstration], list[Demonstration]]:
    """An arm's demonstrations: by experts, and by operators of bad quality; with their pictures where asked for."""
    found = _all_recordings(arm, pool, workspace)
    if cameras:
        with np.load(_pictures(workspace, arm, pool)) as file:
            found = [replace(item, pictures=file[f"pictures_{n}"]) for n, item in enumerate(found)]
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
            share = CONDITIONS[condition].bad.get(arm, 0.0)
            experts, careless = load_recordings(arm, pool, workspace, CONDITIONS[condition].cameras)
            _write(folder, arm, chosen(experts, careless, pool.used, share, 100 * seed + number))
            folder.with_suffix(".done").touch()
        sources.append(SourceConfig(folder, name=arm, embodiment={"name": arm, **ARMS[arm].layout}, share=1.0))
    return MixtureConfig(sources, action_space="compact")


def _write(folder: Path, arm: str, demonstrations: Sequence[Demonstration]) -> None:
    task = instruction(arm)
    episodes = [
        Episode(
            {OBS_STATE: item.states, ACTION: item.actions} | ({} if item.pictures is None else {KEY: item.pictures}),
            task,
        )
        for item in demonstrations
    ]
    names = {OBS_STATE: ARMS[arm].state_names, ACTION: ARMS[arm].action_names}
    folder.parent.mkdir(parents=True, exist_ok=True)
    if demonstrations[0].pictures is None:
        write_frames(folder, episodes, FPS, names, robot_type=arm.lower(), overwrite=True)
    else:
        av.logging.set_libav_level(av.logging.ERROR)
        write_demonstrations(folder, episodes, FPS, names, arm.lower(), ENCODER, overwrite=True)
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


def _pictures(workspace: Path, arm: str, pool: Pool) -> Path:
    path = _recordings(workspace, arm, pool)
    return path.with_stem(f"{path.stem}_pictures")


def _all_recordings(arm: str, pool: Pool, workspace: Path) -> list[Demonstration]:
    with np.load(_recordings(workspace, arm, pool)) as file:
        return [
            Demonstration(file[f"states_{n}"], file[f"actions_{n}"], quality, seed, success)
            for n, (quality, seed, success) in enumerate(json.loads(str(file["facts"])))
        ]
