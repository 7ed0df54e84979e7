"""Arrays with a row a frame, in temporary files: memory holds what of them is being read, however long a dataset is."""

import math
import os
import tempfile

import numpy as np
from numpy.typing import DTypeLike


def on_disk(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros in a temporary file, which goes with the array; TMPDIR says in which folder.

    Args:
        shape: of the array.
        dtype: of the array.

    Raises:
        OSError: the folder has no room for it; the sentence names it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(prefix="ptr_") as file:
        if size and hasattr(os, "posix_fallocate"):
            # without room now, a later write would end the process
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise OSError(
                    f"{tempfile.gettempdir()} has no room for {size / 1e6:.0f} MB of what an inspection knows of every frame "
                    f"({error}): make room, or set TMPDIR to another folder."
                ) from error
        return np.memmap(file, dtype, "w+", shape=shape).view(np.ndarray)
