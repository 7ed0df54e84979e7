"""Copies a LeRobotDataset with a known share of its episodes corrupted, as the paper does to its training data.

    python recipes/corrupt_dataset.py --dataset lerobot/libero --output_dir data/libero_combined \
        --noise 0.3 --truncation 0.25 --wrong_instruction 0.2 --seed 0

writes a LeRobotDataset in `--output_dir` and, beside it, `<output_dir>.truth.json`: what was done to which episode. Training
never reads the truth. Without any share the copy is clean.

Every copy is encoded anew, which costs a little image quality: compare a corrupted copy with a clean copy made by the same
tool, not with the original. Cameras stored as images come out as videos. Episodes are spread evenly over the tasks, and a
share of 0.3 corrupts exactly 30 % of them; the same seed gives the same copy.
"""

import os

# One progress bar: the video encoder would print its settings for every episode, and LeRobot a bar of its own.
os.environ.setdefault("SVT_LOG", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.constants import DEFAULT_FEATURES
from lerobot.utils.import_utils import get_safe_default_video_backend
from tqdm import tqdm

from episodes import Episode, write_demonstrations
from faults import IMAGE_KINDS, KINDS, CorruptionPlan
from ptr_hf.cli import interrupts
from ptr_hf.cli.parser import OptionParser
from ptr_hf.cli.refusals import refusals
from ptr_hf.data.bookkeeping import mend_dataset
from ptr_hf.data.datasets import dataset_metadata, episode_spans
from ptr_hf.data.demonstrations import Truth, TruthRecord, save_truth, truth_path

PROGRAM = "corrupt_dataset.py"
NUMBERS = ("float", "int", "uint", "bool")


@dataclass
class CorruptionArguments:
    """Which dataset to copy where, and the share of its episodes that gets each corruption."""

    dataset: str = field(metadata={"help": "Hub id or folder of the LeRobotDataset to copy."})
    output_dir: Path = field(metadata={"help": "Folder of the copy; the truth goes beside it."})
    noise: float = field(default=0.0, metadata={"help": "Share with noise on every action channel (paper: ANI, 0.3)."})
    truncation: float = field(
        default=0.0, metadata={"help": "Share cut to the first 40 to 70 %% of their frames (paper: TT, 0.25)."}
    )
    wrong_instruction: float = field(
        default=0.0, metadata={"help": "Share with the instruction of another task (paper: LN, 0.2)."}
    )
    wrong_convention: float = field(default=0.0, metadata={"help": "Share with the first two action channels negated."})
    delay: float = field(default=0.0, metadata={"help": "Share whose actions are written down 8 frames late."})
    scaled: float = field(default=0.0, metadata={"help": "Share with all actions halved."})
    zeroed: float = field(default=0.0, metadata={"help": "Share with all actions zero."})
    noise_in_part: float = field(
        default=0.0,
        metadata={"help": "Share with noise on a quarter of the frames, of --noise_std and --noise_bounds."},
    )
    camera_moved: float = field(
        default=0.0, metadata={"help": "Share with one camera's pictures shifted by 15 %% of their shorter side."}
    )
    wrong_camera: float = field(
        default=0.0,
        metadata={
            "help": "Share with one camera showing another of its size, or else the pictures of the episode before."
        },
    )
    frozen_frames: float = field(
        default=0.0, metadata={"help": "Share with one camera's picture standing still for 30 %% of the frames."}
    )
    overlapping: bool = field(
        default=False, metadata={"help": "Draw every kind on its own, so that an episode may get several."}
    )
    noise_std: float = field(
        default=0.1, metadata={"help": "Standard deviation of the noise, in the units of the recorded actions."}
    )
    noise_bounds: list[float] | None = field(
        default=None, metadata={"help": "Clip noisy actions to the action space, e.g. -1 1. None: do not clip."}
    )
    seed: int = field(default=0, metadata={"help": "Decides which episodes, and every draw inside a corruption."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a copy that exists."})

    def plan(self) -> CorruptionPlan:
        """The shares that are not zero as a plan."""
        if self.noise_bounds is not None and len(self.noise_bounds) != 2:
            raise ValueError(
                f"noise_bounds={self.noise_bounds} must be two numbers, the lowest and the highest action."
            )
        noise = {"std": self.noise_std, "bounds": self.noise_bounds}
        return CorruptionPlan(
            shares={kind: vars(self)[kind] for kind in KINDS if vars(self)[kind]},
            seed=self.seed,
            parameters={kind: noise for kind in ("noise", "noise_in_part") if vars(self)[kind]},
            overlapping=self.overlapping,
        )


class Recorded:
    """A LeRobotDataset as whole episodes: every camera and every numeric feature, in the recorded order.

    Raises:
        ValueError: the dataset has a depth camera, or an episode has several instructions.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        self.meta: LeRobotDatasetMetadata = dataset_metadata(source, revision)
        features = self.meta.features
        self.cameras = list(self.meta.camera_keys)
        recorded = [key for key in features if key not in DEFAULT_FEATURES and key not in self.cameras]
        self.columns = [key for key in recorded if features[key]["dtype"].startswith(NUMBERS)]
        self.left_out = sorted(set(recorded) - set(self.columns))
        depth = [key for key in self.cameras if 3 not in (features[key]["shape"][0], features[key]["shape"][-1])]
        if depth:
            raise ValueError(
                f"The camera {', '.join(depth)} of {source} is no colour camera; only cameras of 3 channels can be copied."
            )
        self.dataset = LeRobotDataset(
            self.meta.repo_id, root=self.meta.root, revision=revision, video_backend=get_safe_default_video_backend()
        )
        for sentence in mend_dataset(self.dataset):
            logging.warning("%s", sentence)
        self.spans = episode_spans(self.dataset)
        self.tasks = [self._task(*span) for span in self.spans]

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of the channels, of the features that name all of theirs."""
        named = {key: self.meta.features[key]["names"] for key in self.columns}
        return {
            key: names
            for key, names in named.items()
            if isinstance(names, list) and [len(names)] == list(self.meta.features[key]["shape"])
        }

    def episodes(self) -> Iterator[Episode]:
        """Every episode, decoded one at a time."""
        for (episode, first, length), task in zip(self.spans, self.tasks, strict=True):
            frames = {key: self._column(key, first, length) for key in self.columns}
            frames |= {key: self._images(key, episode, first, length) for key in self.cameras}
            yield Episode(frames, task)

    def _task(self, episode: int, first: int, length: int) -> str:
        indices = set(self._column("task_index", first, length).ravel().tolist())
        if len(indices) > 1:
            raise ValueError(
                f"Episode {episode} changes its instruction on the way (task_index {sorted(indices)}); the corruptions apply to "
                "episodes with one instruction."
            )
        return str(self.meta.tasks.iloc[indices.pop()].name)

    def _column(self, key: str, first: int, length: int) -> np.ndarray:
        feature = self.meta.features[key]
        values = self.dataset.hf_dataset.data.column(key).slice(first, length).to_pylist()
        return np.asarray(values, dtype=feature["dtype"]).reshape(length, *feature["shape"])

    def _images(self, key: str, episode: int, first: int, length: int) -> np.ndarray:
        if key in self.meta.video_keys:
            start = self.meta.episodes[episode][f"videos/{key}/from_timestamp"]
            stamps = start + self._column("timestamp", first, length).ravel().astype(float)
            frames = decode_video_frames(
                self.meta.root / self.meta.get_video_file_path(episode, key),
                stamps.tolist(),
                self.dataset.tolerance_s,
                get_safe_default_video_backend(),
                return_uint8=True,
            )
            return frames.permute(0, 2, 3, 1).numpy()
        images = self.dataset.hf_dataset.with_format(None).select_columns([key])
        return np.stack([np.asarray(images[i][key].convert("RGB")) for i in range(first, first + length)])


def check(arguments: CorruptionArguments, plan: CorruptionPlan, recorded: Recorded) -> None:
    """What would fail in the middle of the copy is refused before it starts."""
    output, source = arguments.output_dir.resolve(), Path(recorded.meta.root).resolve()
    if output == source or output in source.parents:
        raise ValueError(f"output_dir={arguments.output_dir} holds the dataset itself; choose another folder.")
    if arguments.output_dir.exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output_dir} exists; pass --overwrite to replace it or choose another folder.")
    if "wrong_instruction" in plan.shares and len(set(recorded.tasks)) < 2:
        raise ValueError(
            f"{arguments.dataset} has one instruction only ('{recorded.tasks[0]}'), so that none can be wrong; leave "
            "--wrong_instruction out."
        )
    pictures = [kind for kind in IMAGE_KINDS if kind in plan.shares]
    if pictures and not recorded.cameras:
        raise ValueError(
            f"{arguments.dataset} has no camera to change pictures of; leave --{' and --'.join(pictures)} out."
        )
    if recorded.meta.fps != int(recorded.meta.fps):
        raise ValueError(
            f"{arguments.dataset} runs at {recorded.meta.fps} frames per second; LeRobot writes whole rates."
        )


def copy(arguments: CorruptionArguments) -> Truth:
    """Read, corrupt, write, and put the truth beside the copy."""
    plan = arguments.plan()
    recorded = Recorded(arguments.dataset, arguments.revision)
    check(arguments, plan, recorded)
    if recorded.left_out:
        logging.warning("Left out, since only numbers and cameras are copied: %s.", ", ".join(recorded.left_out))
    records: list[TruthRecord] = []

    def episodes() -> Iterator[Episode]:
        corrupted = plan.apply(recorded.episodes(), recorded.tasks)
        for episode, truth in tqdm(corrupted, total=len(recorded.tasks), desc="copying", unit="episode"):
            records.extend(truth)
            yield episode

    write_demonstrations(
        arguments.output_dir,
        episodes(),
        fps=int(recorded.meta.fps),
        names=recorded.names,
        robot_type=recorded.meta.robot_type,
        overwrite=arguments.overwrite,
    )
    truth = Truth(
        tuple(records),
        plan={
            "dataset": arguments.dataset,
            "revision": arguments.revision,
            "shares": dict(plan.shares),
            "seed": plan.seed,
            "overlapping": plan.overlapping,
            "parameters": {kind: dict(values) for kind, values in plan.parameters.items()},
        },
    )
    save_truth(arguments.output_dir, truth)
    return truth


def main(argv: list[str]) -> None:
    """Parse, copy, say what was done."""
    (arguments,) = OptionParser(CorruptionArguments, prog=PROGRAM, description=__doc__).parse(argv)
    av.logging.set_libav_level(av.logging.ERROR)
    warnings.filterwarnings("ignore", message="Cannot enable progress bars")
    with refusals(PROGRAM, vars(arguments)):
        truth = copy(arguments)
    counts = Counter(record.kind for record in truth.records)
    made = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in sorted(counts.items()))
    print(
        f"{arguments.output_dir}: {truth.num_episodes} episodes ({made}); truth in {truth_path(arguments.output_dir)}"
    )


if __name__ == "__main__":
    interrupts.end_quietly(PROGRAM)
    main(sys.argv[1:])
