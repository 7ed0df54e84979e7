"""One run at a time in an `output_dir`: a lock that the kernel gives up when its process ends, however it ends.

Two runs in one folder would delete each other's unfinished checkpoints and leave files of both.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from ptr_hf.files.regular import quoted

LOCK_NAME = ".run.lock"
_MAX_BYTES = 4096
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_descriptors: set[int] = set()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """Who writes into a folder, for the message of the run that is refused.

    Attributes:
        pid: process id, on its host.
        host: name of the machine.
        started: date and time when the run took the folder, with the offset from UTC.
        born: seconds since 1970 when the process itself started, which tells it from a later one of the same id.
    """

    pid: int
    host: str
    started: str
    born: float

    def __str__(self) -> str:
        return f"process {self.pid} on {quoted(self.host)}, started {quoted(self.started)}"

    @classmethod
    def own(cls) -> "RunRecord":
        """Of this process."""
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), started, psutil.Process().create_time())

    @classmethod
    def parse(cls, text: bytes) -> "RunRecord | None":
        """Of a lock file; None where it says nothing, e.g. because its disk was full."""
        try:
            record = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        return record if type(record.pid) is int and type(record.born) is float else None

    @property
    def is_alive_here(self) -> bool:
        """Whether it is a process of this machine that still runs; where that cannot be told, False."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.born) < 1.0
        except (psutil.Error, ValueError, OverflowError):
            return False


class RunLock:
    """The lock of a run's folder.

    Processes that this one forks (those of a DataLoader) do not keep it. It holds between machines where the file system's
    locks do, as NFS's; on one without locks only another run of the same machine is noticed.

    Args:
        folder: `output_dir`; it is made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Take the folder.

        Returns:
            None, or a sentence that says which run has it. A folder that cannot be locked at all (read-only, a full disk) is
            not refused but warned about: saving has its own errors.
        """
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while self._descriptor is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                self._descriptor = os.open(self._path, flags, 0o666)
                supported, free = _try_lock(self._descriptor)
                before = RunRecord.parse(os.pread(self._descriptor, _MAX_BYTES, 0))
                if not free or (not supported and before is not None and before.is_alive_here):
                    self._close()
                    return _refusal(folder, before)
                if not _is_at(self._path, self._descriptor):
                    # the run before has just ended and removed the file that was locked here
                    self._close()
            _descriptors.add(self._descriptor)
            if before is not None:
                logger.warning(f"{folder} was being written by {before}, which ended early: its lock is taken over.")
            if not supported:
                logger.warning(f"The disk of {folder} has no locks: a run on another machine would not be noticed.")
            # the lock stands without its note
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps(asdict(RunRecord.own())).encode(), 0)
        except OSError as error:
            if self._descriptor is not None:
                self._close()
            logger.warning(f"{folder} cannot be locked ({error}): another run in it would not be noticed.")
        return None

    def release(self) -> None:
        """Give the folder free; nothing to do where it is not held, as in a forked process."""
        if self._descriptor is None or self._descriptor not in _descriptors:
            return
        with suppress(OSError):
            if _is_at(self._path, self._descriptor):
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        assert self._descriptor is not None
        _descriptors.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None


def _try_lock(descriptor: int) -> tuple[bool, bool]:
    """Whether the file system has locks, and whether this one was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return True, False
        if error.errno not in _UNSUPPORTED:
            raise
        return False, True
    return True, True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refusal(folder: Path, holder: RunRecord | None) -> str:
    own = holder is not None and (holder.pid, holder.host) == (os.getpid(), socket.gethostname())
    who = "another process" if holder is None else f"another trainer of this process ({holder})" if own else str(holder)
    return f"{folder} is being written by another run: {who}. Wait until it ends, or give this run another output_dir."


def _forget() -> None:
    """In a forked process: an open copy of a lock would keep it after its owner was killed."""
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_forget)
