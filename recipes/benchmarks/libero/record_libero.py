"""Records LIBERO demonstrations by scripted operators as a LeRobotDataset, with the truth about them beside it.

    python recipes/benchmarks/libero/record_libero.py --output_dir data/libero_object --suite libero_object --per_task 50

writes the schema of the public LIBERO datasets: two cameras, a state of 8, an action of 7 and an instruction, at the 20 Hz that
the simulator runs at. `--track states` leaves the cameras out and adds the objects' poses to the state, which takes a tenth of
the time. `--kinds failed_attempt hesitation --share 0.4` gives 40 % of every task's episodes to these operators, in turns. It
needs LIBERO in an environment of its own (docs/libero.md), and with cameras a headless GL.
"""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import av
import numpy as np
from lerobot.configs.video import RGBEncoderConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.fast_writer import write_frames
from benchmarks.libero.cameras import POSITIONS, SIZE, Cameras
from benchmarks.libero.experts import KINDS, Kind
from benchmarks.libero.recordings import Demonstration, record
from benchmarks.libero.scene import (
    ACTION_NAMES,
    FPS,
    SLOT_NAMES,
    STATE_NAMES,
    LiberoScene,
    NoStartError,
    Suite,
    instruction,
    num_tasks,
    slots,
)
from episodes import Episode, write_demonstrations
from ptr_hf.data.demonstrations import EpisodeSource, Truth, TruthRecord, save_truth

LIMIT = 400
"""Steps after which an operator has failed: who hesitates takes longer than policies may."""
ENCODER = RGBEncoderConfig(vcodec="h264", g=2, crf=18, preset="fast")


@dataclass
class RecordingArguments:
    """Records LIBERO demonstrations by scripted operators."""

    output_dir: Path = field(metadata={"help": "Folder of the dataset; its truth lies beside it."})
    suite: Literal["libero_object", "libero_spatial", "libero_goal"] = field(
        default="libero_object", metadata={"help": "LIBERO's suite."}
    )
    tasks: list[int] | None = field(default=None, metadata={"help": "Numbers of the tasks; all by default."})
    per_task: int = field(default=50, metadata={"help": "Demonstrations of every task."})
    track: Literal["pixels", "states"] = field(
        default="pixels", metadata={"help": "Two cameras, or the objects' poses as a part of the state."}
    )
    starts: Literal["sampled", "wide", "official"] = field(
        default="sampled",
        metadata={
            "help": "Drawn as LIBERO's are, drawn and spread over the table, or the 50 that policies are tested on."
        },
    )
    first_start: int = field(default=1000, metadata={"help": "First start; then counting on."})
    kinds: list[str] = field(
        default_factory=list,
        metadata={"choices": KINDS[1:], "help": "Operators of the share of the episodes, in turns."},
    )
    share: float = field(
        default=0.3, metadata={"help": "Share of these operators where any are named; the others are clean."}
    )
    image_size: int = field(default=SIZE, metadata={"help": "Side of the square pictures."})
    exact: bool = field(
        default=False, metadata={"help": "Draw as LeRobot's environment does; slower (docs/libero.md)."}
    )
    looks: int | None = field(
        default=None,
        metadata={
            "help": "Pictures drawn of an episode, evenly, each standing until the next: those that ptr-score looks at. Not for "
            "training; takes less than half of the time. Every step by default."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a dataset that exists."})


def kinds_of(per_task: int, kinds: Sequence[Kind], share: float) -> list[Kind]:
    """Who records each of a task's episodes: the named operators in turns, spread evenly among the clean ones."""
    bad = round(share * per_task) if kinds else 0
    places = set(np.linspace(0, per_task - 1, bad).round().astype(int).tolist()) if bad else set()
    turns = iter(range(per_task))
    return [kinds[next(turns) % len(kinds)] if number in places else KINDS[0] for number in range(per_task)]


def demonstrations(arguments: RecordingArguments) -> Iterator[tuple[int, Demonstration]]:
    """What is recorded, with the number of its task; an episode that does not go as its operator meant is left out.

    Raises:
        RuntimeError: if more than half of the starts of a task fail.
    """
    suite: Suite = arguments.suite
    tasks = range(num_tasks(suite)) if arguments.tasks is None else arguments.tasks
    wanted = kinds_of(arguments.per_task, cast(list[Kind], arguments.kinds), arguments.share)
    bar = tqdm(total=len(tasks) * len(wanted), desc="recording", unit="episode")
    for task in tasks:
        scene = LiberoScene(suite, task)
        cameras = Cameras(scene, arguments.image_size, not arguments.exact) if arguments.track == "pixels" else None
        start, left_out = arguments.first_start, 0
        for kind in wanted:
            while True:
                film = None
                if cameras is not None:
                    film = cameras.pictures if arguments.looks is None else cameras.positions
                start += 1
                try:
                    tried = record(scene, start - 1, arguments.starts, kind, film=film, limit=LIMIT)
                    if tried.is_as_meant:
                        break
                    why = f"from start {start - 1} the operator '{kind}' did not do what it is to do"
                except NoStartError as error:
                    why = str(error).rstrip(".")
                left_out += 1
                if left_out > len(wanted):
                    raise RuntimeError(
                        f"{left_out} starts of '{instruction(suite, task)}' went wrong, the last because {why}: leave task "
                        f"{task} out of --tasks, or record it from --starts official."
                    )
            if cameras is not None and arguments.looks is not None:
                tried = replace(tried, pictures=cameras.looks(tried.pictures[POSITIONS], arguments.looks))
            yield task, tried
            bar.update()
        if cameras is not None:
            cameras.close()
    bar.close()


def write(arguments: RecordingArguments) -> None:
    """Record and write at once: pictures of all episodes would not fit into memory."""
    av.logging.set_libav_level(av.logging.ERROR)
    path = arguments.output_dir
    records: list[TruthRecord] = []
    sources: list[EpisodeSource] = []
    states = arguments.track == "states"
    names = {OBS_STATE: list(STATE_NAMES), ACTION: list(ACTION_NAMES)}
    if states:
        names[OBS_STATE] += [f"{name}_{axis}" for name in slots(arguments.suite) for axis in SLOT_NAMES]

    def episodes() -> Iterator[Episode]:
        for number, (task, item) in enumerate(demonstrations(arguments)):
            text = instruction(arguments.suite, task)
            records.append(TruthRecord(number, item.kind, text, text, seed=item.start))
            success = -1 if item.success_step is None else item.success_step
            place = f"{arguments.suite}/{task}"
            sources.append(EpisodeSource(number, place, item.start, success, len(item.actions)))
            observed = np.concatenate([item.states, item.objects], 1) if states else item.states
            yield Episode({OBS_STATE: observed, ACTION: item.actions, **item.pictures}, text)

    path.parent.mkdir(parents=True, exist_ok=True)
    if states:
        write_frames(path, episodes(), FPS, names, "panda", overwrite=arguments.overwrite)
    else:
        write_demonstrations(path, episodes(), FPS, names, "panda", ENCODER, overwrite=arguments.overwrite)
    settings = {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "overwrite")}
    versions = {name: version(name) for name in ("hf-libero", "robosuite", "mujoco", "lerobot")}
    save_truth(path, Truth(tuple(records), tuple(sources), {"settings": settings, "versions": versions}))


if __name__ == "__main__":
    write(*HfArgumentParser(RecordingArguments, description=__doc__).parse_args_into_dataclasses())
