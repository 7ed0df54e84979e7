"""What lies in a checkpoint's folder: regular files alone, their checksums, and a `trainer_state.json` that makes sense."""

import json
import math
import os
import stat
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import TrainerState

from ptr_hf.files.reading import printable
from ptr_hf.files.regular import inside

BLOCK = 2**26
"""Bytes of a file that one thread sums up at a time."""
_PIECE = 2**20
_THREADS = 8
MAX_STATE_BYTES = 2**30
"""Of `trainer_state.json`, which holds every row of the log."""


def regular_files(folder: Path) -> dict[str, int]:
    """The files of a folder and of the folders in it.

    Returns:
        bytes by the path in the folder.

    Raises:
        ValueError: something there is neither a folder nor a regular file, or is a symlink that leads out.
    """
    paths = [path for path in sorted(folder.rglob("*")) if not stat.S_ISDIR(path.lstat().st_mode)]
    return {path.relative_to(folder).as_posix(): inside(path.parent, path.name).stat().st_size for path in paths}


def checksums(folder: Path, names: Collection[str]) -> dict[str, str]:
    """CRC-32 of files, block by block and in threads: about a second for every gigabyte and thread.

    It finds damage, not forgery: whoever can write the files can write their checksums too.

    Args:
        folder: of the checkpoint.
        names: paths of regular files in it.

    Returns:
        the CRC-32 of the blocks' CRC-32s, as hexadecimal digits, by name.
    """
    blocks = [(name, start) for name in names for start in range(0, max(1, (folder / name).stat().st_size), BLOCK)]
    found = dict.fromkeys(names, 0)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for (name, _), value in zip(
            blocks, pool.map(lambda block: _sum(folder / block[0], block[1]), blocks), strict=True
        ):
            found[name] = zlib.crc32(value.to_bytes(4), found[name])
    return {name: f"{value:08x}" for name, value in found.items()}


def _sum(path: Path, start: int) -> int:
    value, left = 0, BLOCK
    with path.open("rb") as file:
        file.seek(start)
        while left and (piece := file.read(min(left, _PIECE))):
            value, left = zlib.crc32(piece, value), left - len(piece)
    return value


# ---- trainer_state.json --------------------------------------------------------------------------------------------


_NONE = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    "global_step": (int,),
    "max_steps": (int,),
    "epoch": (int, float),
    "log_history": (list,),
    "total_flos": (int, float),
    "num_input_tokens_seen": (int,),
    "train_batch_size": (int, _NONE),
    "best_metric": (int, float, _NONE),
    "best_global_step": (int, _NONE),
    "best_model_checkpoint": (str, _NONE),
    "stateful_callbacks": (dict,),
}
"""What a resumed run goes by. transformers would take the default of a field that is missing, and any value of another type."""


def _can_be(name: str, value: Any) -> bool:
    """Whether a field is of its type; all numbers but the metric are counts or amounts."""
    if type(value) not in _FIELDS[name]:
        return False
    if isinstance(value, list):
        return all(isinstance(row, dict) for row in value)
    return name == "best_metric" or not isinstance(value, int | float) or (math.isfinite(value) and value >= 0)


def check_trainer_state(path: Path, step: int) -> None:
    """Check that a `trainer_state.json` is the one of a step.

    Args:
        path: of the file, a regular one.
        step: that the checkpoint's manifest names.

    Raises:
        ValueError: it does not parse, lacks a field, has one of another type, or is of another step.
    """
    size = path.stat().st_size
    if size > MAX_STATE_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {MAX_STATE_BYTES} that a log needs.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} does not parse as JSON, so it is damaged or was edited: {printable(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of an object.")
    for name in _FIELDS:
        if name not in content:
            raise ValueError(f"{path} is damaged or was edited: it lacks {name}.")
        if not _can_be(name, content[name]):
            raise ValueError(f"{path} is damaged or was edited: {name} cannot be {_short(content[name])}.")
    try:
        state = TrainerState(**content)
    except TypeError as error:
        raise ValueError(f"{path} is damaged, was edited, or is of another transformers: {printable(error)}") from error
    if state.global_step != step:
        raise ValueError(f"{path} is of step {_short(state.global_step)}, but its checkpoint is of step {step}.")
    for name in ("best_global_step", "max_steps"):
        value = vars(state)[name]
        if value is not None and (value > step if name == "best_global_step" else value < step):
            raise ValueError(f"{path} is damaged or was edited: {name} is {_short(value)}, but it is of step {step}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}…"


# ---- reading what transformers and torch wrote ---------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name a checkpoint's file in whatever is raised while the run's state is restored from it.

    Raises:
        ValueError: in place of any error of the block, but for a device that is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # torch, numpy and random raise whatever garbled bytes make them stumble over
    except Exception as error:
        unsafe = isinstance(error, UnpicklingError)
        reason = "it holds something else than tensors and plain values." if unsafe else printable(error)
        raise ValueError(
            f"{path} cannot be resumed from; it is damaged, or of a run with another policy or other settings: {reason} Resume "
            "from another checkpoint, or start without resume_from_checkpoint."
        ) from error
