"""Files that others wrote, read within limits: names that stay in their folder, JSON, and headers of safetensors.

Nothing here allocates a tensor. Every error is a ValueError or FileNotFoundError that names the file.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ptr_hf.files.regular import quoted, regular_file

MAX_JSON_BYTES = 2**19
MAX_JSON_DEPTH = 24
MAX_HEADER_BYTES = 2**22
"""About 30,000 tensors; a policy has a few thousand at most."""
MAX_RANK = 8
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that can hold pickled objects, which run code when they are opened: none of them ever is."""
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header.

    Attributes:
        shape: of the tensor.
        dtype: safetensors' name of its element type, e.g. "F32".
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return "F" in self.dtype


@dataclass(frozen=True)
class StoredFile:
    """What the header of a safetensors file declares; the file was found to hold exactly that.

    Attributes:
        path: of the file.
        tensors: by name.
        metadata: the file's own notes.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def printable(error: BaseException) -> str:
    """The message of an error that an untrusted file has caused, on one line and not too long."""
    text = "".join(
        character if character.isprintable() else " " for character in (str(error) or type(error).__name__)[:2000]
    )
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:490]}…"


def missing(folder: Path, name: str) -> str:
    """What to say of a file that is not there: which pickled, sharded or misnamed one stands in its place, if any."""
    stem = name.rpartition(".")[0]
    stems = {stem, f"pytorch_{stem}"}
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLED and path.stem in stems:
            return (
                f"{folder} holds {path.name} in place of {name}: pickled weights can run code and are never opened; "
                "convert them to safetensors."
            )
        if path.name == f"{name}.index.json":
            return f"{folder} holds {name} in shards: save it as one file, which is what LeRobot's policies read."
    return f"it lacks {name}."


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds one object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file of its folder, no JSON object, too large or too deep, repeats a key, or holds a number
            that is not finite.
    """
    if regular_file(path.parent, path.name, limit=MAX_JSON_BYTES) is None:
        raise FileNotFoundError(f"{path} is missing.")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        if _depth(content) > MAX_JSON_DEPTH + 1:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{path} does not parse: it is nested deeper than {MAX_JSON_DEPTH} levels.") from None
    except ValueError as error:
        raise ValueError(
            f"{path} does not parse as JSON, so it is damaged or was edited: {printable(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of an object.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the key {quoted(repeated)} occurs twice.")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number, or too large a one.")
    return value


def _depth(content: Any) -> int:
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def read_header(path: Path) -> StoredFile:
    """Read what a safetensors file declares; its tensors are mapped at most, never loaded.

    safetensors' own reader refuses a header longer than the file, offsets with gaps or overlaps, sizes that are not
    shape × element size, and tensors that do not fill the file exactly.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file of its folder, truncated, damaged or no safetensors, or declares what no policy holds.
    """
    if regular_file(path.parent, path.name) is None:
        raise FileNotFoundError(f"{path} is missing.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder.")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 2 <= length <= size - 8:
        raise ValueError(
            f"{path} is damaged: it is truncated or no safetensors file ({size} bytes, of which its header should take "
            f"{length}); fetch it again."
        )
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a header of {length} bytes; that of a policy is below {MAX_HEADER_BYTES}.")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            tensors = {name: StoredTensor(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, ValueError) as error:
        # a message of the parser can repeat what the file holds
        raise ValueError(
            f"{path} is damaged: its header does not describe its {size} bytes, so it is truncated or was changed; fetch it "
            f"again ({printable(error)})."
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {quoted(name)} has the type {tensor.dtype}; policies hold {', '.join(DTYPES)}.")
        if len(tensor.shape) > MAX_RANK:
            raise ValueError(f"{path}: {quoted(name)} has {len(tensor.shape)} dimensions, more than {MAX_RANK}.")
    return StoredFile(path, tensors, metadata)
