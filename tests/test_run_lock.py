"""`RunLock`: one run at a time in a folder, between real processes that are killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ptr_hf.training.run_lock import LOCK_NAME, RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from ptr_hf.training.run_lock import RunLock

assert RunLock(Path(sys.argv[1])).acquire() is None
if not os.fork():
    print(os.getpid(), flush=True)  # by now it has let the lock go
time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a folder's lock, and one that it has forked, as a DataLoader does."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            yield process, worker
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


def test_of_another_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Refused while it lives, with who it is; free as soon as it is killed, though a process that it forked lives on."""
    lock = RunLock(tmp_path / "run")
    with holder(tmp_path / "run") as (process, worker):
        refusal = str(lock.acquire())
        assert refusal.startswith(f"{tmp_path / 'run'} is being written by another run: process {process.pid} on '")
        record = json.loads((tmp_path / "run" / LOCK_NAME).read_text())
        assert f"on {record['host']!r}, started {record['started']!r}. Wait until it ends" in refusal
        process.kill()
        process.wait()
        assert lock.acquire() is None
        os.kill(worker, 0)
    assert f"was being written by process {process.pid} on {record['host']!r}, started" in caplog.text
    assert "which ended early: its lock is taken over" in caplog.text
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_of_the_same_process(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire() is None
    assert f"another trainer of this process (process {os.getpid()}" in str(second.acquire())
    # which does not give the first one's lock free
    second.release()
    assert second.acquire() is not None
    first.release()
    assert second.acquire() is None
    second.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 5000, '{"pid": "x", "host": 1, "started": 2, "born": 3}'])
def test_a_lock_file_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire() is None
    assert f"process {os.getpid()}" in str(second.acquire())
    (tmp_path / LOCK_NAME).write_text(text)
    assert "another process" in str(second.acquire())
    first.release()


def test_a_folder_that_cannot_be_locked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that saves nothing may train in it."""
    (tmp_path / "target").touch()
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "target")
    lock = RunLock(tmp_path)
    assert lock.acquire() is None
    assert f"{tmp_path} cannot be locked" in caplog.text
    lock.release()
    assert (tmp_path / "target").read_text() == ""
