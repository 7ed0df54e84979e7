"""Starting weights that depend on the seed alone, whatever was drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import set_seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from streams that begin at `seed`; afterwards Python, NumPy and PyTorch go on where they were.

    Args:
        seed: of the run.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
