"""Rows of an objective's output that are the same whichever process makes them."""

from collections.abc import Iterable

import torch

from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.method import ObjectiveOutput

NAMES = ("bench", "lab", "play")
TASKS = ("reach", "push")
TOTAL = 24


def config_of(preset: str) -> PTRHyperparameters:
    config = PTRHyperparameters(preset=preset)
    return config


def output_of(rows: Iterable[int], seed: int = 0) -> ObjectiveOutput:
    """Rows of a global batch of `TOTAL`; numbers are eighths, whose sums are exact."""
    random, chosen = torch.Generator().manual_seed(seed), list(rows)
    weight, score, loss = torch.randint(2, 33, (3, TOTAL), generator=random)[:, chosen] / 8
    source, task = torch.randint(3, (TOTAL,), generator=random)[chosen], torch.arange(TOTAL)[chosen] % 2
    target_valid = (torch.rand(TOTAL, generator=random) < 0.8)[chosen]
    filler, always = torch.zeros(len(chosen)), torch.ones(len(chosen), dtype=torch.bool)
    return ObjectiveOutput(
        loss=loss, weight=weight, score=score, identification=filler, ranking=filler, target_valid=target_valid,
        ranking_valid=always, chunk_valid=always, entropy=filler, diversity=filler, contrast=filler, correct=always,
        margin=filler, candidates=filler.long(), source=source, task=task,
    )  # fmt: skip
