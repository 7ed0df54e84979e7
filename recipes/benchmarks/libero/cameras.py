"""LIBERO's two cameras, drawn as LeRobot's environment shows them, or faster. Needs LIBERO and a headless GL.

    python recipes/benchmarks/libero/cameras.py results/figures/libero_operators.png

draws an expert's demonstration and a failed attempt from the same start, as the first camera sees them.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.libero.experts import Kind
from benchmarks.libero.recordings import record
from benchmarks.libero.scene import LiberoScene

CAMERAS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}
"""Key of the public datasets -> LIBERO's name."""
SIZE = 128
"""Side of a picture in pixels."""

POSITIONS = "positions"
Picture = UInt8[np.ndarray, "size size 3"]


class Cameras:
    """Draws a scene as it stands; a context manager.

    Args:
        scene: of a task.
        size: side of a picture in pixels.
        fast: without anti-aliasing, shadows and reflections, which cost half of the time or more.
    """

    def __init__(self, scene: LiberoScene, size: int = SIZE, fast: bool = True) -> None:
        import mujoco

        self.scene = scene
        quality = scene.model.vis.quality
        samples = int(quality.offsamples)
        if fast:
            quality.offsamples = 0
        self._renderer = mujoco.Renderer(scene.model, size, size)
        quality.offsamples = samples  # other cameras of the scene have their own
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # what collides, which is not to be seen
        if fast:
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = False

    def __enter__(self) -> "Cameras":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the renderer back."""
        self._renderer.close()

    def pictures(self, data: Any = None) -> dict[str, Picture]:
        """What both cameras see now, turned by 180° as LeRobot's datasets and environment have it.

        Args:
            data: MuJoCo's state of the scene to draw in place of the present one.
        """
        found = {}
        for key, camera in CAMERAS.items():
            self._renderer.update_scene(data or self.scene.data, camera=camera, scene_option=self._option)
            found[key] = self._renderer.render()[:, ::-1].copy()
        return found

    def positions(self) -> dict[str, np.ndarray]:
        """Where everything is now, in place of pictures: `looks` draws them later."""
        return {POSITIONS: self.scene.data.qpos.copy()}

    def looks(self, positions: np.ndarray, number: int) -> dict[str, UInt8[np.ndarray, "steps size size 3"]]:
        """Pictures of so many steps, evenly from first to last; each stands until the next.

        Args:
            positions: (steps, numbers) of one episode, the scene's last one.
            number: of the steps that are drawn.
        """
        import mujoco

        data = mujoco.MjData(self.scene.model)
        drawn = np.unique(np.rint(np.linspace(0, 1, number) * (len(positions) - 1)).astype(int))
        shown = []
        for step in drawn:
            data.qpos[:] = positions[step]
            mujoco.mj_forward(self.scene.model, data)
            shown.append(self.pictures(data))
        latest = np.searchsorted(drawn, np.arange(len(positions)), "right") - 1
        return {key: np.stack([picture[key] for picture in shown])[latest] for key in CAMERAS}


def film_strips(frames: int = 8, start: int = 1000, size: int = 112) -> Image.Image:
    """A row an operator: frames of a demonstration from its first to its last."""
    scene = LiberoScene("libero_spatial", 2)
    rows = []
    kinds: tuple[Kind, ...] = ("clean", "failed_attempt")
    with Cameras(scene, size, fast=False) as cameras:
        for kind in kinds:
            shown = record(scene, start, "wide", kind, film=cameras.pictures).pictures[next(iter(CAMERAS))]
            rows.append(np.concatenate(shown[np.linspace(0, len(shown) - 1, frames).round().astype(int)], axis=1))
    return Image.fromarray(np.concatenate(rows))


if __name__ == "__main__":
    film_strips().convert("P", palette=Image.Palette.ADAPTIVE, colors=200).save(sys.argv[1], optimize=True)
