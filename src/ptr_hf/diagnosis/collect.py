"""One pass of a frozen policy over a dataset: what its scores would read of every chunk."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.data.covering import covering, segments_at_once
from ptr_hf.data.datasets import check_dataset, open_dataset
from ptr_hf.data.fit import check_fit
from ptr_hf.data.in_memory import collate_segments
from ptr_hf.data.masked_segments import saying_masked
from ptr_hf.data.screening import Screen
from ptr_hf.method.draws import Draws
from ptr_hf.method.evidence import Evidence, Weigher, Weighing
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.processor_ptr import preprocess


class Recorder(Weigher):
    """Keeps the evidence that a weigher is given, and weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Evidence] = []

    def weigh(self, evidence: Evidence, beta: Float[Tensor, ""], warm: bool, draws: Draws) -> Weighing:
        """Weights of 1."""
        self.seen.append(evidence)
        nothing = torch.zeros_like(evidence.loss)
        return Weighing(nothing + 1.0, nothing[:, None], nothing[:, None], nothing, nothing)

    def after_step(self, step: int, warm: bool) -> None:
        """Nothing to remember."""


def frozen_policy(base: nn.Module, **hyperparameters: Any) -> PTRPolicy:
    """A policy for `collect`: the base does not learn, and its own vision tower embeds the consequences.

    Args:
        base: a LeRobot policy; changed in place.
        hyperparameters: of `PTRConfig`, such as segment_length.
    """
    base.requires_grad_(False)
    device = next(base.parameters()).device.type
    policy = PTRPolicy(PTRConfig(device=device, preset="ptr_consequence_loss", **hyperparameters), base_policy=base)
    assert policy.objective is not None
    policy.objective.weigher = Recorder()
    return policy.eval()


def collect(
    policy: PTRPolicy,
    dataset: LeRobotDataset | str | Path,
    preprocessor: PolicyProcessorPipeline,
    *,
    revision: str | None = None,
    renames: dict[str, str] | None = None,
    max_segments: int | None = None,
    batch_size: int = 8,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    """What the scores would read of a dataset's chunks, on the CPU, ordered by dataset index.

    Args:
        policy: from `frozen_policy`.
        dataset: a LeRobotDataset, its folder or its Hub id.
        preprocessor: the policy's own.
        revision: of the dataset on the Hub.
        renames: dataset key -> policy key of cameras and states.
        max_segments: of a larger dataset, so many segments are read, spread evenly over it.
        batch_size: segments per forward pass; fewer where their pictures are large.
        workers: processes that read the dataset.
        seed: of the policy's noise.
        progress: show a progress bar.

    Raises:
        ValueError: the dataset does not fit the policy, or holds nothing to score.
    """
    layout, objective = policy.config.layout, policy.objective
    assert objective is not None
    assert isinstance(objective.weigher, Recorder)
    opened = open_dataset(dataset, layout, revision=revision)
    check_fit(policy.config.base_config, opened.meta.features, renames or {}, opened.meta.repo_id)
    check_dataset(opened, layout)
    cover = covering(opened, layout)
    count = len(cover.anchors)
    chosen = list(range(count))
    if max_segments is not None and count > max_segments:
        chosen = np.linspace(0, count - 1, max_segments).round().astype(np.int64).tolist()
    loader: DataLoader[dict[str, Any]] = DataLoader(
        Subset(opened, [cover.anchors[place] for place in chosen]),
        batch_size=segments_at_once(opened.meta.features, layout, batch_size),
        collate_fn=collate_segments,
        num_workers=workers,
    )
    screen = Screen(layout, policy.config.input_features or {}, renames)
    total = sum(cover.chunks[place] for place in chosen)
    objective.weigher.seen.clear()
    bar = tqdm(total=total, desc="reading consequences", unit="chunk", disable=not progress)
    with bar, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for batch in saying_masked(loader, screen):
            on_device = {k: v.to(policy.config.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            policy.compute(preprocess(on_device, preprocessor, policy.config.layout))
            bar.update(int(objective.weigher.seen[-1].chunk_valid.sum()))
    parts = objective.weigher.seen
    whole: dict[str, Any] = {name: torch.cat([vars(part)[name].cpu() for part in parts]) for name in _columns()}
    objective.weigher.seen = []
    evidence = Evidence(**whole)
    evidence = rows_of(evidence, evidence.chunk_valid.nonzero()[:, 0])
    return rows_of(evidence, evidence.index.argsort())


def rows_of(evidence: Evidence, rows: Int[Tensor, " rows"] | Bool[Tensor, " rows"]) -> Evidence:
    """Some of the chunks."""
    return replace(evidence, **{name: vars(evidence)[name][rows] for name in _columns()})


def _columns() -> list[str]:
    return [item.name for item in fields(Evidence) if item.name != "among"]
