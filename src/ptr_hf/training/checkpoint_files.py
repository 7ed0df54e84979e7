"""Checkpoints that are whole or not there: written aside, listed in a manifest, and moved into place at once.

    checkpoint-40/                  complete; `ptr_checkpoint.json` in it lists every file with its size and checksum
    .checkpoint-40.partial/         being written; transformers' Trainer does not see it, and the next run removes it
    .checkpoint-40.discarded/       being deleted

Nothing here knows a Trainer: `Checkpoints` and `Resume` write and read through these functions.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ptr_hf.artifacts.checks import check_artifact
from ptr_hf.files.reading import read_json
from ptr_hf.training.checkpoint_contents import check_trainer_state, checksums, regular_files

MANIFEST_NAME = "ptr_checkpoint.json"
PARTIAL, DISCARDED = ".partial", ".discarded"
UNFINISHED = ".unfinished"
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What the writers of a checkpoint's files raise; see `write_failure`."""
_OF_TORCH = ("PytorchStreamWriter", "inline_container", "iostream error", "Parent directory")
_COMPLETE = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class SaveError(OSError):
    """A model that could not be written, while nothing that stood there before is lost.

    Attributes:
        reason: in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, and how the run that wrote it was laid out.

    Attributes:
        step: optimiser steps taken.
        world_size: processes.
        batch_size: segments of a process in a forward pass.
        accumulation: forward passes of a step.
        global_batch: segments of a step, over all processes.
        resumable: False where `save_only_model` left optimiser and random streams out.
        files: bytes of every other file, by its path in the folder.
        checksums: of every other file, by its path; empty in checkpoints of earlier versions.
    """

    step: int
    world_size: int
    batch_size: int
    accumulation: int
    global_batch: int
    resumable: bool
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> tuple[int, int, int]:
        """Processes, segments of a process, accumulation: with another layout a run is not continued to the bit."""
        return self.world_size, self.batch_size, self.accumulation

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Of a checkpoint.

        Raises:
            FileNotFoundError: it has none, since something else than `PTRTrainer` wrote it.
            ValueError: it is damaged.
        """
        path = folder / MANIFEST_NAME
        content = read_json(path)
        try:
            manifest = cls(**content)
        except TypeError as error:
            raise ValueError(f"{path} is no manifest of a checkpoint: {error}.") from error
        numbers = (manifest.step, *manifest.layout, manifest.global_batch)
        sizes = manifest.files.values() if isinstance(manifest.files, dict) else ("no sizes",)
        if not all(type(number) is int and number >= 0 for number in (*numbers, *sizes)):
            raise ValueError(f"{path} is no manifest of a checkpoint: it has numbers that are no counts.")
        if not isinstance(manifest.checksums, dict) or manifest.checksums.keys() - manifest.files:
            raise ValueError(f"{path} is no manifest of a checkpoint: it has checksums of files that it does not list.")
        return manifest


# ---- writing -------------------------------------------------------------------------------------------------------


def partial_folder(target: Path) -> Path:
    """Where `checkpoint-<step>` is written until it is complete."""
    return target.with_name(f".{target.name}{PARTIAL}")


def commit(target: Path, manifest: Manifest) -> None:
    """Bring what `partial_folder(target)` holds to the disk, list it, and move it into place.

    An older checkpoint of the same name gives way. One process calls this, after all have written their files.

    Args:
        target: `checkpoint-<step>`.
        manifest: its `files` and `checksums` are filled in here.

    Raises:
        OSError: the disk is full; the older checkpoint, if there is one, still stands.
    """
    partial = partial_folder(target)
    files = regular_files(partial)
    listed = partial / MANIFEST_NAME
    whole = replace(manifest, files=files, checksums=checksums(partial, files))
    listed.write_text(json.dumps(asdict(whole), indent=1) + "\n")
    for path in [
        *(partial / name for name in files),
        listed,
        *(path for path in partial.rglob("*") if path.is_dir()),
        partial,
    ]:
        _sync(path)
    older = target.with_name(f".{target.name}{DISCARDED}")
    if target.exists():
        discard(older)
        os.replace(target, older)
    try:
        os.replace(partial, target)
    except OSError:
        if older.exists():
            os.replace(older, target)
        raise
    _sync(target.parent)
    discard(older)


def discard(folder: Path) -> None:
    """Delete a folder; a complete checkpoint first loses its name, so that no half of it is ever taken for one."""
    if _COMPLETE.fullmatch(folder.name):
        hidden = folder.with_name(f".{folder.name}{DISCARDED}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        folder = hidden
    shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Delete what killed runs have left unfinished in a run's folder."""
    for pattern in (f".{PREFIX_CHECKPOINT_DIR}-*{PARTIAL}", f".{PREFIX_CHECKPOINT_DIR}-*{DISCARDED}", UNFINISHED):
        for folder in output.glob(pattern):
            discard(folder)
    # of `replacing`
    for file in output.glob(".ptr_*"):
        with suppress(OSError):
            file.unlink()


def rotate(output: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left.

    Args:
        output: folder of the run.
        limit: None or 0 deletes nothing.
        keep: never deleted, wherever they stand in the order: the newest and the best.
    """
    found = [Path(path) for path in sort_checkpoints(str(output), use_mtime=True)] if limit else []
    excess = len(found) - max(limit or 0, len(keep & set(found)))
    for folder in [folder for folder in found if folder not in keep][: max(0, excess)]:
        discard(folder)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield a folder for files that replace those of the same name in `folder` once the block has ended.

    Every file is the old one or the new one; if the block raises, all are the old ones.
    """
    aside = folder / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        for path in files:
            _sync(path)
        for path in files:
            target = folder / path.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_failure(error: BaseException) -> str | None:
    """Why a file could not be written, in a few words; None for an error of another kind."""
    if isinstance(error, SaveError):
        return error.reason
    text = str(error).split("\n", 1)[0]
    if isinstance(error, OSError | SafetensorError):
        return text
    # torch.save has no exception of its own; of a full disk it says "unexpected pos 64 vs 0" or "basic_ios::clear"
    if any(part in text for part in _OF_TORCH):
        return "torch.save could not write its file to the end"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- choosing ------------------------------------------------------------------------------------------------------


def checkpoints(output: Path) -> list[Path]:
    """The folders named checkpoint-<step> in a run's folder, last step first; whether they are sound, `fault` says."""
    found = [path for path in output.glob("*") if _COMPLETE.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _COMPLETE.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def fault(folder: Path, *, contents: bool = True, to_resume: bool = True) -> str | None:
    """Why a run cannot be resumed from a folder, as a sentence; None if it can.

    Args:
        folder: of the checkpoint.
        contents: whether checksums are compared too, which reads every byte; without, only sizes, JSON and headers are read.
        to_resume: False for the policy alone, which a checkpoint of `save_only_model` holds too.
    """
    try:
        found = regular_files(folder)
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, so PTRTrainer did not write it, or only in part."
    except (OSError, ValueError) as error:
        return str(error)
    if to_resume and not manifest.resumable:
        return "it was written with save_only_model=True and holds no state of the optimiser."
    if TRAINER_STATE_NAME not in manifest.files:
        return f"{MANIFEST_NAME} does not list {TRAINER_STATE_NAME}."
    for name, size in manifest.files.items():
        if name not in found:
            return f"{name} is missing."
        if size != found[name]:
            return f"{name} has {found[name]} bytes instead of {size}."
    if _COMPLETE.fullmatch(folder.name) and step_of(folder) != manifest.step:
        return f"{MANIFEST_NAME} says that it is of step {manifest.step}."
    try:
        check_trainer_state(folder / TRAINER_STATE_NAME, manifest.step)
        check_artifact(folder)
        sums = checksums(folder, manifest.checksums) if contents else manifest.checksums
    except (OSError, ValueError) as error:
        return str(error)
    damaged = [name for name, value in sums.items() if value != manifest.checksums[name]]
    return f"{' and '.join(damaged)}: damaged since it was written (another checksum)." if damaged else None


def last_complete(output: Path, *, contents: bool = True) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can be resumed from.

    Args:
        output: folder of the run.
        contents: as for `fault`.

    Returns:
        the checkpoint, None where there is none, and a sentence about each newer one that was passed over.
    """
    skipped: list[str] = []
    for folder in checkpoints(output):
        reason = fault(folder, contents=contents)
        if reason is None:
            return folder, skipped
        skipped.append(f"{folder} is skipped: {reason}")
    return None, skipped
