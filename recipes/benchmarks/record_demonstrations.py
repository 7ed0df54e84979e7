"""Records the demonstrations that ship with ptr_hf: scripted Meta-World experts, a known third of the episodes corrupted.

    python recipes/benchmarks/record_demonstrations.py --output_dir out/demonstrations

writes `metaworld_uneven` (training: of 60 episodes 20 are corrupted, 5 of each kind, one per kind and task) and
`metaworld_heldout` (15 clean episodes in other scenes), each a LeRobotDataset with `<name>.truth.json` beside it. With
`--output_dir src/ptr_hf/data/bundled --overwrite` it replaces the bundled ones. Takes about five minutes on one CPU core.

Needs the extra `lerobot_policy_ptr[metaworld]` and a headless GL. On Debian or Ubuntu:
    apt install libegl1 libegl-mesa0 libgl1-mesa-dri libgles2      for MUJOCO_GL=egl, the default here
    apt install libosmesa6                                         for MUJOCO_GL=osmesa

The video runs at 80 frames per second: Meta-World's control rate, and that of LeRobot's environment and datasets for it.
Every control step is one frame, so `--env.type=metaworld` and these datasets mean the same by a step.
"""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import datasets
from lerobot.configs.video import RGBEncoderConfig
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the package `benchmarks` lies
from benchmarks.experts import Recording, record_demonstrations, similar_instructions
from episodes import Episode, write_demonstrations
from faults import CorruptionPlan
from ptr_hf.data.demonstrations import SPLITS, EpisodeSource, Truth, TruthRecord, save_truth, truth_path
from ptr_hf.envs.metaworld import FPS, MetaworldScene

CHANNELS = ["x", "y", "z", "gripper"]
HELDOUT_SEED_OFFSET = 10_000


@dataclass
class RecordingArguments:
    """Records uneven training demonstrations and clean held-out ones from Meta-World's scripted experts."""

    output_dir: Path = field(metadata={"help": "Folder for the two datasets and their truth sidecars."})
    tasks: list[str] = field(
        default_factory=lambda: ["reach-v3", "push-v3", "pick-place-v3", "faucet-open-v3", "faucet-close-v3"],
        metadata={"help": "Meta-World tasks. The first three share one scene, the last two another."},
    )
    episodes_per_task: int = field(default=12, metadata={"help": "Training episodes of each task."})
    heldout_per_task: int = field(default=3, metadata={"help": "Clean held-out episodes of each task."})
    corrupted_share: float = field(
        default=1 / 3, metadata={"help": "Share of the training episodes to corrupt, equally among the four kinds."}
    )
    noise_std: float = field(
        default=0.1, metadata={"help": "Standard deviation of the action noise; actions lie in [-1, 1]."}
    )
    image_size: int = field(default=84, metadata={"help": "Side of the square images in pixels."})
    steps_after_success: int = field(
        default=20,
        metadata={"help": "Frames recorded after success, at least a chunk, so that the last chunks have a future."},
    )
    crf: int = field(default=15, metadata={"help": "Quality of the H.264 video: lower is better and larger."})
    seed: int = field(default=0, metadata={"help": "Decides the scenes and the corruptions."})
    overwrite: bool = field(default=False, metadata={"help": "Replace datasets that exist."})


def record(arguments: RecordingArguments, count: int, first_seed: int, label: str) -> list[Recording]:
    """`count` successful episodes of every task, tasks taking turns. All tasks use the same seeds, hence alike scenes."""
    by_task: list[list[Recording]] = []
    for task in tqdm(arguments.tasks, desc=label, unit="task"):
        scene = MetaworldScene(task, image_size=arguments.image_size)
        try:
            by_task.append(
                record_demonstrations(scene, count, first_seed, steps_after_success=arguments.steps_after_success)
            )
        finally:
            scene.close()
    return [recording for turn in zip(*by_task, strict=True) for recording in turn]


def write(arguments: RecordingArguments, split: str, recordings: list[Recording], plan: CorruptionPlan) -> None:
    """Corrupts, writes the dataset, and puts the truth beside it."""
    path = arguments.output_dir / SPLITS[split]
    records: list[TruthRecord] = []

    def episodes() -> Iterator[Episode]:
        tasks = [recording.episode.task for recording in recordings]
        corrupted = plan.apply((recording.episode for recording in recordings), tasks)
        for episode, truth in tqdm(corrupted, total=len(tasks), desc=f"writing {path.name}", unit="episode"):
            records.extend(truth)
            yield episode

    count = write_demonstrations(
        path,
        episodes(),
        fps=FPS,
        names={"action": CHANNELS, "observation.state": CHANNELS},
        robot_type="sawyer",
        # Frames need no later ones to decode, and at most seven earlier ones: random access stays cheap.
        encoder=RGBEncoderConfig(vcodec="h264", g=8, crf=arguments.crf, preset="veryslow", extra_options={"bf": 0}),
        overwrite=arguments.overwrite,
    )
    sources = [
        EpisodeSource(index, item.environment, item.environment_seed, item.success_step, item.episode.length)
        for index, item in enumerate(recordings)
    ]
    save_truth(path, Truth(tuple(records), tuple(sources), provenance(arguments, plan)))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    logging.info("%s: %d episodes, %.2f MB, truth in %s", path.name, count, size / 1e6, truth_path(path).name)


def provenance(arguments: RecordingArguments, plan: CorruptionPlan) -> Mapping[str, Any]:
    """The settings, without the folder, and the versions that decide what the simulator shows."""
    settings = {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "overwrite")}
    versions = {name: version(name) for name in ("metaworld", "mujoco", "lerobot")}
    return {"shares": dict(plan.shares), "seed": plan.seed, "settings": settings, "versions": versions}


def main() -> None:
    (arguments,) = HfArgumentParser(RecordingArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()
    warnings.filterwarnings(
        "ignore", message="Constant"
    )  # the experts ask for more than the limits; we record what is executed
    existing = [name for name in (SPLITS["train"], SPLITS["heldout"]) if (arguments.output_dir / name).exists()]
    if existing and not arguments.overwrite:
        raise SystemExit(f"{', '.join(existing)} exist in {arguments.output_dir}; pass --overwrite to replace them.")
    kinds = ("noise", "truncation", "wrong_instruction", "wrong_convention")
    plan = CorruptionPlan(
        shares={kind: arguments.corrupted_share / len(kinds) for kind in kinds},
        seed=arguments.seed,
        parameters={"noise": {"std": arguments.noise_std, "bounds": (-1.0, 1.0)}},
        alternatives=similar_instructions(tuple(arguments.tasks)),
    )
    train = record(arguments, arguments.episodes_per_task, arguments.seed, "recording for training")
    write(arguments, "train", train, plan)
    heldout = record(arguments, arguments.heldout_per_task, arguments.seed + HELDOUT_SEED_OFFSET, "recording held-out")
    write(arguments, "heldout", heldout, CorruptionPlan(shares={}, seed=arguments.seed))


if __name__ == "__main__":
    main()
