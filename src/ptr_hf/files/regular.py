"""Which files of a folder that others wrote may be opened: regular ones that lie in it, no larger than their kind needs.

A named pipe would wait for ever, `/dev/zero` would fill the disk, and a symlink could lead to any file of the reader's.
"""

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

MAX_FILE_BYTES = 2**38
"""256 GiB: more than the weights of any policy."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def quoted(value: object) -> str:
    """A name from an untrusted file, made short and printable for an error message."""
    text = repr(str(value))
    return text if len(text) <= 160 else f"{text[:150]}…'"


def regular_file(
    folder: str | Path, name: object, *, limit: int = MAX_FILE_BYTES, named_in: Path | None = None
) -> Path | None:
    """The path of a folder's file that is safe to open, or None where there is none of that name.

    Args:
        folder: that someone else may have written, or a snapshot in the Hub's cache.
        name: a file's plain name.
        limit: bytes that a file of this kind needs at most.
        named_in: the file that names it, for the error message.

    Raises:
        ValueError: the name leads elsewhere, or what stands there is no regular file, is a symlink that leads out of the
            folder or nowhere, or is too large.
    """
    path = inside(Path(folder), name, named_in)
    if not os.path.exists(path):
        return None
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size} bytes, more than the {limit} that a file of its kind needs.")
    return path


def inside(folder: Path, name: object, named_in: Path | None = None) -> Path:
    """The path of a file that belongs to a folder, whether it is there or not; what is there is a regular file.

    The symlinks of a Hub snapshot lead to the cache's blobs, which is where its files are.

    Args:
        folder: of the checkpoint.
        name: a file's plain name.
        named_in: the file that names it, for the error message.

    Raises:
        ValueError: the name leads elsewhere, the file is a symlink that does, or it is no regular file.
    """
    where = "" if named_in is None else f"{named_in} names it, but "
    plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
    if not plain or PurePosixPath(str(name)).name != name or PureWindowsPath(str(name)).name != name:
        raise ValueError(f"{where}{quoted(name)} is no plain file name: a checkpoint's files lie in {folder} itself.")
    path = folder / str(name)
    if not os.path.lexists(path):  # false, too, of a name that is too long
        return path
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is a symlink that leads nowhere: replace it by the file.") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ValueError(
            f"{path} is a symlink that leads out of the checkpoint's folder: replace it by the file itself."
        )
    kind = stat.S_IFMT(target.stat().st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(
            f"{path} is {_KINDS.get(kind, 'something else')} where a file should be: replace it by the file."
        )
    return path


def _roots(folder: Path) -> list[Path]:
    """Where a folder's files may lie: in it, or in huggingface_hub's cache if it is (in) one of its snapshots."""
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots":
            repo = place.parent.parent
            return [folder, repo / "blobs", repo.parent / "blobs"]
    return [folder]
