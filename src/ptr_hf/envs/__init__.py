"""What simulated environments need around them."""

import os
import sys

DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def draw_without_display() -> None:
    """Let MuJoCo draw by EGL where there is no display and `MUJOCO_GL` says nothing; call before `mujoco` is first imported."""
    settings = ("MUJOCO_GL", *DISPLAYS)
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in settings):
        os.environ["MUJOCO_GL"] = "egl"
