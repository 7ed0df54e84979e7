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
def watch_launcher(is_launcher: Callable[[Sequence[str]], bool]) -> bool:
    """End this process as soon as its launcher has ended; once a process, and not at all where there is no launcher.

    A shell, nohup, cron or a cluster's scheduler is none: those may end before what they have started.

    Args:
        is_launcher: whether a command line is a launcher's.

    Returns:
        whether there is one, which is watched from now on.
    """
    ancestors = _ancestors()
    launchers = [place for place, process in enumerate(ancestors) if is_launcher(_command(process))]
    # torchrun under another name, or a notebook that launches its processes itself: then it is the parent
    length = launchers[0] + 1 if launchers else int(ELASTIC in os.environ)
    chain = [process.pid for process in ancestors[:length]]
    if chain:
        threading.Thread(target=_watch, args=(chain,), name="launcher watch", daemon=True).start()
    return bool(chain)


def _watch(chain: list[int]) -> None:
    """A thread, since a rank that waits for others in a collective runs nothing else."""
    looks = 0
    # twice, because a process table that changes may be misread
    while looks < 2:
        time.sleep(INTERVAL)
        # whoever loses its parent gets another one
        looks = looks + 1 if [process.pid for process in _ancestors()[: len(chain)]] != chain else 0
    rank = os.environ.get("RANK", "0")
    with suppress(OSError):
        sys.stderr.write(
            f"The launcher of this run (process {chain[-1]}) was killed: rank {rank} (process {os.getpid()}) ends without "
            "writing anything more. Start the run again with --resume_from_checkpoint last.\n"
        )
        sys.stderr.flush()
    os._exit(1)


def _ancestors() -> list[psutil.Process]:
    try:
        return list(psutil.Process().parents())
    except psutil.Error:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
