"""Numbers of every frame on disk, computed once and read by every run: memory-mapped shards, each checked and whole."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptr_hf.report.files import replacing

FRAMES_PER_SHARD = 1024
DTYPES = {"bfloat16": np.uint16, "float32": np.float32}
"""How the numbers of a dtype are kept; NumPy has no bfloat16."""


@dataclass(frozen=True)
class Field:
    """One of a frame's features.

    Attributes:
        shape: of a frame's.
        dtype: that they are kept in, a key of `DTYPES`.
        computed: that they were computed in, and are read as.
    """

    shape: tuple[int, ...]
    dtype: str
    computed: str

    @property
    def bytes(self) -> int:
        """Of a frame."""
        return int(np.prod(self.shape)) * np.dtype(DTYPES[self.dtype]).itemsize


class FeatureStore:
    """Features of a dataset's frames in a folder.

    A shard holds the features of `FRAMES_PER_SHARD` frames: one `.npy` file a feature, then a `.json` with their checksums, which
    says that it is whole. Processes may write different shards at the same time. Files are mapped when they are first read, in
    each process for itself.

    Args:
        folder: made if it is missing.
        frames: of the dataset.
        fields: what is kept of a frame, by name.
    """

    def __init__(self, folder: Path, frames: int, fields: Mapping[str, Field]) -> None:
        self.folder, self.frames, self.fields = folder, frames, dict(fields)
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.frames // FRAMES_PER_SHARD))

    @property
    def bytes(self) -> int:
        """Of all frames together."""
        return self.frames * sum(field.bytes for field in self.fields.values())

    def rows(self, shard: int) -> range:
        """The frames of a shard."""
        return range(shard * FRAMES_PER_SHARD, min((shard + 1) * FRAMES_PER_SHARD, self.frames))

    def missing(self) -> list[int]:
        """Shards that are not there, or not what was written: these are computed again."""
        return [shard for shard in self.shards if not self._is_whole(shard)]

    def write(self, shard: int, values: Mapping[str, Tensor]) -> None:
        """Keep a shard.

        Args:
            shard: its number.
            values: (frames of the shard, *shape) of every field.
        """
        sums = {}
        for name, field in self.fields.items():
            kept = values[name].to(getattr(torch, field.dtype)).contiguous().cpu()
            if field.dtype == "bfloat16":
                kept = kept.view(torch.int16)
            array = kept.numpy().view(DTYPES[field.dtype])
            with replacing(self._path(shard, name)) as temporary:
                np.save(temporary, array, allow_pickle=False)
            sums[name] = zlib.crc32(array)
        with replacing(self._note(shard)) as temporary:
            temporary.write_text(json.dumps(self._facts(shard) | {"crc32": sums}))

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """(rows, *shape) of every field, copied out of the files."""
        return {name: self._read(name, rows) for name in self.fields}

    def __getstate__(self) -> dict[str, object]:
        """A process that is started anew maps the files itself."""
        return {**self.__dict__, "_maps": {}}

    def _read(self, name: str, rows: Sequence[int]) -> Tensor:
        field = self.fields[name]
        found = np.empty((len(rows), *field.shape), DTYPES[field.dtype])
        for place, row in enumerate(rows):
            shard = row // FRAMES_PER_SHARD
            if (name, shard) not in self._maps:
                self._maps[name, shard] = np.load(self._path(shard, name), mmap_mode="r", allow_pickle=False)
            found[place] = self._maps[name, shard][row - shard * FRAMES_PER_SHARD]
        kept = (
            torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
            if field.dtype == "bfloat16"
            else torch.from_numpy(found)
        )
        return kept.to(getattr(torch, field.computed))

    def _is_whole(self, shard: int) -> bool:
        try:
            note = json.loads(self._note(shard).read_text())
            sums = note.pop("crc32")
            if note != self._facts(shard):
                return False
            for name, field in self.fields.items():
                kept = np.load(self._path(shard, name), mmap_mode="r", allow_pickle=False)
                if kept.shape != (len(self.rows(shard)), *field.shape) or kept.dtype != DTYPES[field.dtype]:
                    return False
                if zlib.crc32(kept) != sums[name]:
                    return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def _facts(self, shard: int) -> dict[str, object]:
        """What a shard holds, as JSON reads it back."""
        fields = {name: {**asdict(field), "shape": list(field.shape)} for name, field in self.fields.items()}
        return {"frames": len(self.rows(shard)), "fields": fields}

    def _path(self, shard: int, name: str) -> Path:
        return self.folder / f"{shard:06d}.{name}.npy"

    def _note(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.json"
