"""The cameras of the embodiment benchmark: every arm is seen from elsewhere. Needs robosuite and a headless GL.

    python recipes/benchmarks/embodiment/cameras.py results/figures/embodiment_views.png

draws a demonstration of every arm, as its camera sees it.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.embodiment.arms import ARMS, ArmScene, record

KEY = "observation.images.scene"
"""What every arm calls its camera in its dataset."""
SIZE = 64
"""Side of a picture in pixels."""

Picture = UInt8[np.ndarray, "size size 3"]


@dataclass(frozen=True)
class Viewpoint:
    """Where a camera stands: on a sphere around the middle of the table.

    Args:
        azimuth: of its line of sight, in degrees; at 180 it faces the robot, at 90 it looks to the robot's left.
        elevation: of its line of sight, in degrees; negative looks down.
        distance: in metres.
        centre: where it looks, in metres in robosuite's world; the table's top is at 0.8.
    """

    azimuth: float
    elevation: float
    distance: float = 0.65
    centre: tuple[float, float, float] = (0.0, 0.0, 0.88)


WRIST = "robot0_eye_in_hand"
VIEWS: Mapping[str, Viewpoint | str] = {
    "Panda": Viewpoint(180, -20),
    "Sawyer": Viewpoint(-90, -15),
    "UR5e": Viewpoint(125, -35),
    "IIWA": Viewpoint(-135, -60),
    "Kinova3": WRIST,
}
"""By the name of the arm; a text names a camera of robosuite's own."""


class Camera:
    """Draws a scene as it stands, without shadows and reflections, which cost time; a context manager.

    Args:
        scene: of an arm.
        view: where the camera stands, or what robosuite calls it.
        size: side of a picture in pixels.
        plain: False draws shadows and reflections too.
    """

    def __init__(self, scene: ArmScene, view: Viewpoint | str, size: int = SIZE, plain: bool = True) -> None:
        import mujoco

        self.scene = scene
        self.view: Any = view
        if isinstance(view, Viewpoint):
            self.view = mujoco.MjvCamera()
            self.view.azimuth, self.view.elevation, self.view.distance = view.azimuth, view.elevation, view.distance
            self.view.lookat[:] = view.centre
        self._renderer = mujoco.Renderer(scene.model, size, size)
        if plain:
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = False

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *_: object) -> None:
        self._renderer.close()

    def picture(self) -> Picture:
        """What it sees now."""
        self._renderer.update_scene(self.scene.data, camera=self.view)
        return self._renderer.render()


def film_strips(frames: int = 8, seed: int = 1001, enlarged: int = 2) -> Image.Image:
    """A row an arm: frames of one demonstration from its first to its last, each enlarged so many times."""
    rows = []
    for name, view in VIEWS.items():
        scene = ArmScene(ARMS[name])
        with Camera(scene, view) as camera:
            pictures = record(scene, seed, camera=camera.picture).pictures
        assert pictures is not None
        rows.append(np.concatenate(pictures[np.linspace(0, len(pictures) - 1, frames).round().astype(int)], axis=1))
    board = Image.fromarray(np.concatenate(rows))
    return board.resize((board.width * enlarged, board.height * enlarged), Image.Resampling.NEAREST)


if __name__ == "__main__":
    film_strips().save(sys.argv[1])
