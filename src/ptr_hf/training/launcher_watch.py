"""A rank whose launcher was killed ends too, instead of going on to write beside the run that takes its place.

torchrun and `accelerate launch` end their processes when they are told to end; with SIGKILL they cannot.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import psutil  # type: ignore[import-untyped]

INTERVAL = 1.0
"""Seconds between two looks."""
ELASTIC = "TORCHELASTIC_RUN_ID"
"""What torchrun, and `accelerate launch` of several processes, leave in the environment of theirs."""


@cache
def watch_launcher(is_launcher: Callable[[Sequence[str]], bool]) -> None:
    """End this process as soon as its launcher has ended; once a process, and not at all where there is no launcher.

    A shell, nohup, cron or a cluster's scheduler is none: those may end before what they have started.

    Args:
        is_launcher: whether a command line is a launcher's.
    """
    ancestors = psutil.Process().parents()
    # torchrun under another name, or a notebook that launches its processes itself: then it is the parent
    parent = ancestors[0] if ancestors and ELASTIC in os.environ else None
    launcher = next((process for process in ancestors if is_launcher(_command(process))), parent)
    if launcher is not None:
        threading.Thread(target=_end_with, args=(launcher,), name="launcher watch", daemon=True).start()


def _end_with(launcher: psutil.Process) -> None:
    """A thread, since a rank that waits for others in a collective runs nothing else."""
    while _runs(launcher):
        time.sleep(INTERVAL)
    rank = os.environ.get("RANK", "0")
    with suppress(OSError):
        sys.stderr.write(
            f"The launcher of this run (process {launcher.pid}) was killed: rank {rank} (process {os.getpid()}) ends without "
            "writing anything more. Start the run again with --resume_from_checkpoint last.\n"
        )
        sys.stderr.flush()
    os._exit(1)


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended, as one has that its own parent has not yet waited for."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
