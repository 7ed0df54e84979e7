"""Records the second bundled data set: a UR5e lifts a cube in robosuite, with other cameras, rate and schema than Meta-World's.

    MUJOCO_GL=egl python recipes/benchmarks/embodiment/record_lift.py --output_dir out

writes `robosuite_lift`, eight episodes by a scripted expert, with its truth (all clean) beside it; with
`--output_dir src/ptr_hf/data/bundled --overwrite true` it replaces the bundled one. It needs robosuite in an environment of its
own (docs/embodiment.md) and a headless GL (`recipes/benchmarks/record_demonstrations.py` says which).
"""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import av
from lerobot.configs.video import RGBEncoderConfig
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.embodiment.arms import ARMS, EXPERT, FPS, TASK, ArmScene, Demonstration, record
from benchmarks.embodiment.cameras import Camera
from episodes import Episode, write_demonstrations
from ptr_hf.data.demonstrations import EpisodeSource, Truth, TruthRecord, save_truth

NAME = "robosuite_lift"
CAMERA = "observation.images.front"


@dataclass
class RecordingArguments:
    """Records a UR5e that lifts a cube."""

    output_dir: Path = field(metadata={"help": "Folder for the dataset and its truth sidecar."})
    episodes: int = field(default=8, metadata={"help": "Episodes to record."})
    image_size: int = field(default=64, metadata={"help": "Side of the square images in pixels."})
    seed: int = field(default=0, metadata={"help": "First start; then counting on."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a dataset that exists."})


def main() -> None:
    """Record before the camera, write."""
    av.logging.set_libav_level(av.logging.ERROR)
    (arguments,) = HfArgumentParser(RecordingArguments, description=__doc__).parse_args_into_dataclasses()
    arm = ARMS["UR5e"]
    scene = ArmScene(arm)
    taken: list[Demonstration] = []
    seed = arguments.seed
    with Camera(scene, "frontview", arguments.image_size, plain=False) as camera:
        while len(taken) < arguments.episodes:
            tried = record(scene, seed, EXPERT, camera=camera.picture)
            taken += [tried] if tried.success_step is not None else []
            seed += 1
    # what the arm knows of itself: the cube is for the camera to see
    own = [name for name in arm.state_names if not name.startswith("environment")]

    def episodes() -> Iterator[Episode]:
        for item in tqdm(taken, desc="writing", unit="episode"):
            assert item.pictures is not None
            frames = {
                "observation.state": item.states[:, : len(own)],
                "action": item.actions,
                CAMERA: item.pictures,
            }
            yield Episode(frames, TASK)

    path = arguments.output_dir / NAME
    write_demonstrations(
        path,
        episodes(),
        fps=FPS,
        names={"action": list(arm.action_names), "observation.state": own},
        robot_type="ur5e",
        encoder=RGBEncoderConfig(vcodec="h264", g=8, crf=15, preset="veryslow", extra_options={"bf": 0}),
        overwrite=arguments.overwrite,
    )
    records = [TruthRecord(number, "clean", TASK, TASK) for number in range(len(taken))]
    sources = [
        EpisodeSource(number, "Lift", item.seed, int(item.success_step or 0), len(item.actions))
        for number, item in enumerate(taken)
    ]
    settings = {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "overwrite")}
    versions = {name: version(name) for name in ("robosuite", "mujoco", "lerobot")}
    save_truth(path, Truth(tuple(records), tuple(sources), {"settings": settings, "versions": versions}))


if __name__ == "__main__":
    main()
