"""Look at a dataset through a trained scorer: T, weight and policy loss of every chunk; and the action loss of a policy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ptr_hf.artifacts.checkpoint import widest_vector
from ptr_hf.data.datasets import Covering, check_dataset, covering, open_dataset, segments_at_once
from ptr_hf.data.fit import check_fit, check_vectors, renamed_features
from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.in_memory import InMemorySegments, collate_segments
from ptr_hf.data.masked_segments import saying_masked
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.processor import check_robots
from ptr_hf.data.normalizers import check_normalizers, renames_in, warn_if_far, with_renames
from ptr_hf.data.screening import Screen
from ptr_hf.data.segments import Segment, SegmentLayout
from ptr_hf.method.chunks import ChunkBatch, in_time_order, joined
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.processor_ptr import preprocess, saved_processors
from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.scores import EpisodeTable, ScoreWeigher, SlotMemory

type ScoredSource = str | Path | LeRobotDataset | InMemorySegments | Mixture | MixtureConfig | Mapping | Sequence
"""A dataset as `score_dataset` takes it."""


def score_dataset(
    policy: PTRPolicy | str | Path,
    dataset: ScoredSource,
    *,
    preprocessor: PolicyProcessorPipeline | None = None,
    rename_map: Mapping[str, str] | None = None,
    episodes: Sequence[int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> ChunkScores:
    """Score every chunk of a dataset: the episodes are cut into segments from their first frame on, without overlap.

    Candidates are the other chunks of the batch (segments are drawn in random order, so that they come from the whole
    dataset) and the scorer's queue, if it is filled. Nothing of the policy changes.

    Args:
        policy: a trained `PTRPolicy`, or the folder or Hub id of one.
        dataset: a LeRobotDataset, its folder or its Hub id, or one that a trainer has read into memory; or the mixture that the
            policy was trained on, or one of the same sources.
        preprocessor: the policy's own; by default the one saved with the checkpoint, which then must be named. Its statistics
            are those of the training data, and so they are here.
        rename_map: dataset key -> policy key, where cameras or states are called otherwise than in the training data.
        episodes: a subset of episodes; of a mixture they are chosen source by source instead.
        batch_size: segments per batch; the number of candidates grows with it. Large pictures do not fill the memory: the
            segments of a batch are then read a few at a time.
        seed: of the order, the policy's noise and the queue draws.
        progress: show a progress bar, which moves by the chunks that were read.

    Returns:
        one row per chunk that begins inside its episode, ordered by dataset index.

    Raises:
        ValueError: the policy has no scorer, a preprocessor is needed, or the dataset does not fit the policy.

    Example:
        >>> scores = score_dataset("me/my_policy", "me/my_demos")
        >>> scores.score, scores.weight, scores.episode_index
    """
    policy, preprocessor = _load(policy, preprocessor)
    if policy.objective is None:
        raise ValueError("This policy has no scorer (preset='sft'), so it cannot score data; train with preset='ptr'.")
    layout = policy.config.layout
    opened, segments = _opened(dataset, policy, layout, episodes)
    if rename_map:
        preprocessor = with_renames(preprocessor, rename_map)
    _check(policy, preprocessor, opened, rename_map)
    if isinstance(opened, LeRobotDataset):
        check_dataset(opened, layout)
    cover = covering(opened, layout, episodes)
    first_frame = episode_column(opened.meta, "dataset_from_index").to_numpy()
    columns: dict[str, list[np.ndarray]] = {}
    verdicts: list[Tensor] = []
    at_once = segments_at_once(opened.meta.features, layout, batch_size)
    bar = tqdm(total=sum(cover.chunks), desc="scoring", unit="chunk", disable=not progress)
    with bar, _evaluating(policy, seed):
        for pieces in _batches(policy, preprocessor, segments, cover, layout, batch_size, at_once, seed):
            parts: list[ChunkBatch] = []
            places: list[Tensor] = []
            for segment in pieces:
                parts.append(policy.read(segment))
                places.append(torch.stack([segment.index, segment.episode, segment.task], dim=1))
                bar.update(int(segment.chunk_valid.sum()))
            chunks = joined(parts)
            output, valid = policy.objective(chunks), chunks.chunk_valid
            index, episode, task = in_time_order(places, layout.segment_length).unbind(1)
            kept = {"index": index, "episode_index": episode, "task": task}
            kept |= {name: vars(output)[name] for name in ("target_valid", "score", "weight", "loss")}
            if output.weighing is not None:
                verdicts.append(output.weighing.verdicts[valid].cpu())
            for name, value in kept.items():
                columns.setdefault(name, []).append(value[valid].detach().cpu().numpy())
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.argsort(table["index"])
    by_score: dict[str, np.ndarray] = {}
    weigher = policy.objective.weigher
    if isinstance(weigher, ScoreWeigher):
        known = torch.cat(verdicts)
        # where the scores said something, with or without a future
        table["target_valid"] = known.isfinite().any(dim=1).numpy()
        by_score = {name: known[order, column].double().numpy() for column, name in enumerate(weigher.names)}
        if weigher.memory is not None:
            of_episodes = EpisodeTable.from_metadata(opened.meta, policy.config.standardize_by)
            table["weight"] = _weights_by_slot(weigher, policy.config.slot_frames, of_episodes, table, known)
            table["score"] = known.nansum(dim=1).numpy()
    table = {name: values[order] for name, values in table.items()}
    names = np.asarray(opened.meta.tasks.index, dtype=object)
    source = np.full(len(order), opened.meta.repo_id, dtype=object)
    frame = table["index"] - first_frame[table["episode_index"]]
    if isinstance(opened, Mixture):
        source, table["episode_index"], table["index"] = opened.meta.located(table["episode_index"], frame)
    return ChunkScores(**table | {"task": names[table["task"]]}, frame_index=frame, source=source, verdicts=by_score)


def _opened(
    dataset: ScoredSource, policy: PTRPolicy, layout: SegmentLayout, episodes: Sequence[int] | None = None
) -> tuple[LeRobotDataset | Mixture, Dataset]:
    """The data set, and what reads its segments."""
    if isinstance(dataset, InMemorySegments):
        return dataset.dataset, dataset
    config = None if isinstance(dataset, Mixture) else MixtureConfig.of(dataset)
    if episodes is not None and (config is not None or isinstance(dataset, Mixture)):
        raise ValueError("episodes is of a single dataset: give each source of the mixture its own `episodes`.")
    if isinstance(dataset, Mixture):
        return dataset, dataset
    if config is not None:
        mixture = Mixture(MixtureMetadata.read(config, widest=widest_vector(policy)), layout)
        return mixture, mixture
    opened = open_dataset(dataset, layout, episodes=episodes)
    return opened, opened


def _weights_by_slot(
    weigher: ScoreWeigher, window: int, episodes: EpisodeTable, table: dict[str, np.ndarray], verdicts: Tensor
) -> np.ndarray:
    """The weights that the verdicts of one pass over a dataset give, as training would give them."""
    slots, scores = episodes.num_slots(window), len(weigher.names)
    memory = SlotMemory(episodes.num_episodes, slots, scores, window, horizon=max(2, len(verdicts)))
    memory.fill(episodes)
    slot = memory.slot(torch.from_numpy(table["episode_index"]), torch.from_numpy(table["index"]))
    memory.remember(slot, verdicts)
    return weigher.slot_weights(memory.mean, memory.group)[slot].numpy()


def action_loss(
    policy: PTRPolicy,
    dataset: ScoredSource,
    preprocessor: PolicyProcessorPipeline,
    *,
    layout: SegmentLayout | None = None,
    episodes: Sequence[int] | None = None,
    batch_size: int = 16,
    repeats: int = 4,
    seed: int = 0,
) -> float:
    """Mean action loss over a dataset's chunks, the figure by which two policies are compared.

    Every policy is given the same chunks in the same order with the same noise, whatever layout it was trained with.

    Args:
        policy: any `PTRPolicy`, also one without a scorer.
        dataset: held-out demonstrations.
        preprocessor: the policy's own.
        layout: the segments to read; by default the policy's own.
        episodes: a subset of episodes, by their places in the dataset.
        batch_size: segments per batch.
        repeats: passes with fresh noise.
        seed: of the noise.

    Returns:
        The policy's own loss, in the units of its training loss; lower is better.

    Raises:
        ValueError: the dataset does not fit the policy, or its statistics are not the preprocessor's.

    Example:
        >>> action_loss(trainer.policy, "me/held_out", trainer.preprocessor)
    """
    layout = layout or policy.config.layout
    opened, segments = _opened(dataset, policy, layout)
    _check(policy, preprocessor, opened)
    cover = covering(opened, layout, episodes)
    at_once = segments_at_once(opened.meta.features, layout, batch_size)
    total, count = 0.0, 0
    with _evaluating(policy, seed):
        for _ in range(repeats):
            batches = _batches(policy, preprocessor, segments, cover, layout, batch_size, at_once, seed)
            for segment in chain.from_iterable(batches):
                loss = policy.chunk_losses(segment)[segment.chunk_valid]
                total += float(loss.double().sum())
                count += len(loss)
    return total / count


def action_loss_by_source(
    policy: PTRPolicy, mixture: Mixture, preprocessor: PolicyProcessorPipeline, **settings: Any
) -> dict[str, float]:
    """Measure the `action_loss` of every source of a mixture by itself.

    Args:
        policy: any `PTRPolicy` of the mixture's robots.
        mixture: held-out demonstrations, opened.
        preprocessor: the policy's own.
        settings: layout, batch_size, repeats and seed of `action_loss`.

    Returns:
        The loss by the source's name.
    """
    losses = {}
    for source in mixture.meta.sources:
        own = range(source.first_episode, source.first_episode + source.meta.total_episodes)
        losses[source.name] = action_loss(policy, mixture, preprocessor, episodes=own, **settings)
    return losses


@contextmanager
def _evaluating(policy: PTRPolicy, seed: int) -> Iterator[None]:
    """Eval mode, no gradients, and a random stream of its own; everything is put back afterwards."""
    training = policy.training
    policy.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        policy.train(training)


def _batches(
    policy: PTRPolicy,
    preprocessor: PolicyProcessorPipeline,
    dataset: Dataset,
    cover: Covering,
    layout: SegmentLayout,
    batch_size: int,
    at_once: int,
    seed: int,
) -> Iterator[Iterator[Segment]]:
    """Batches of segments in random order, each as pieces of at most `at_once` segments, which are read one by one."""
    order = torch.randperm(len(cover.anchors), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [
        [batch[first : first + at_once] for first in range(0, len(batch), at_once)]
        for batch in (order[first : first + batch_size] for first in range(0, len(order), batch_size))
    ]
    loader: DataLoader[dict[str, Any]] = DataLoader(
        Subset(dataset, cover.anchors), batch_sampler=list(chain.from_iterable(batches)), collate_fn=collate_segments
    )
    screen = Screen(layout, policy.config.input_features or {}, renames_in(preprocessor))
    pieces = (
        policy.split(preprocess(_to_device(piece, policy), preprocessor, layout), layout)
        for piece in saying_masked(loader, screen)
    )
    for batch in batches:
        yield islice(pieces, len(batch))
    # which says what it has seen at its end
    next(pieces, None)


def _load(
    policy: PTRPolicy | str | Path, preprocessor: PolicyProcessorPipeline | None
) -> tuple[PTRPolicy, PolicyProcessorPipeline]:
    if isinstance(policy, PTRPolicy):
        if preprocessor is None:
            raise ValueError(
                "Give the policy's preprocessor too (trainer.preprocessor), or name the checkpoint to load both."
            )
        return policy, preprocessor
    loaded = PTRPolicy.from_pretrained(policy)
    if preprocessor is None:
        preprocessor, _ = saved_processors(loaded.config, policy)
    return loaded, preprocessor


def _check(
    policy: PTRPolicy,
    preprocessor: PolicyProcessorPipeline,
    opened: LeRobotDataset | Mixture,
    asked: Mapping[str, str] | None = None,
) -> None:
    """Refuse data that do not fit the policy, and say where they lie far from what it was trained on."""
    check_robots(preprocessor, opened.meta)
    config = policy.config.base_config
    if isinstance(opened, Mixture):
        check_vectors(config, opened.meta.features, opened.meta.repo_id)
        return
    features = opened.meta.features
    renames = {key: name for key, name in renames_in(preprocessor).items() if key in features or key in (asked or {})}
    check_fit(config, features, renames, opened.meta.repo_id, given=bool(asked))
    check_normalizers(preprocessor, renamed_features(features, renames), padded=config.type == "evo1")
    warn_if_far(preprocessor, opened, renames)


def _to_device(batch: dict[str, Any], policy: PTRPolicy) -> dict[str, Any]:
    device = policy.config.device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
