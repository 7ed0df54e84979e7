"""What every run of a benchmark's grid begins with."""

import logging
import warnings

import av
import datasets
import torch
import transformers


def be_quiet() -> None:
    """One thread and no chatter: the runs are what is parallel."""
    torch.set_num_threads(1)
    av.logging.set_libav_level(av.logging.ERROR)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
