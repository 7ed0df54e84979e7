"""Callbacks of the runs in `killed_runs`: full disks of two kinds, grades for the best model, and the step they are at."""

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

PAGE = 4096
MS_NONE = 0


class Steps(TrainerCallback):
    """Writes down which step the main process has come to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._path.write_text(str(state.global_step))


class Grades(TrainerCallback):
    """Gives every evaluation a grade, so that a test can say which checkpoint is the best."""

    def __init__(self, grades: dict[int, float]) -> None:
        self._grades = grades

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        metrics["eval_grade"] = self._grades[state.global_step]


class FileLimits(TrainerCallback):
    """From given steps on, files that this process writes can have so many bytes and no more: the kernel says EFBIG."""

    def __init__(self, limits: dict[int, int]) -> None:
        self._limits = limits

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        limit = self._limits.get(state.global_step)
        if limit is not None:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit >= 0 else most, most))


class FullDisk(TrainerCallback):
    """At every save but the first, leaves so much room that the first i files of a checkpoint fit and the next one does not."""

    def __init__(self, disk: Path) -> None:
        self._disk, self._filler = disk, disk / "filler"
        self._fits = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._filler.unlink(missing_ok=True)
        first = self._disk / f"checkpoint-{int(args.save_steps)}"
        if not control.should_save or not first.is_dir():
            return
        written = sorted(first.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        pages = [-(-path.stat().st_size // PAGE) for path in written]
        place = self._fits % len(pages)
        self._fits += 1
        room = PAGE * (sum(pages[:place]) + pages[place] // 2)
        free = os.statvfs(self._disk)
        with self._filler.open("wb") as file:
            file.write(bytes(free.f_bavail * free.f_frsize - room))
        print(f"full disk: {written[place].name} does not fit at step {state.global_step}", flush=True)


def mount_small_disk(folder: str, size: int) -> None:
    """Mount an empty disk of some bytes on a folder, for this process alone.

    Raises:
        OSError: the kernel does not let an ordinary process do so.
    """
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    Path(folder).mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", MS_NONE, f"size={size}".encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
