"""`cache_features`: what a frozen vision tower makes of every frame, computed once, so that training decodes and encodes none."""

import copy
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer

from ptr_hf.constants import ACTION
from ptr_hf.data.datasets import files_digest, open_dataset
from ptr_hf.data.feature_store import FeatureStore, Field
from ptr_hf.data.in_memory import collate_segments
from ptr_hf.data.segment_dataset import SegmentDataset
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.policies.base import features_key, view_key
from ptr_hf.processor_ptr import preprocess
from ptr_hf.report.console import PlainConsole
from ptr_hf.training.arguments import PTRTrainingArguments

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

AUTO = "auto"
"""The folder of `cache_features` that stands for the Hugging Face cache."""
PROBED = 8
"""Frames whose features name the tower, and say whether it is frozen and draws nothing at random."""
BATCH = 32
"""Frames that go through the tower at once, or a training batch if that is larger."""
FRAME = SegmentLayout(None, (0,), 1, 1, None)
"""A frame a sample."""
GIGABYTE = 1e9

logger = logging.getLogger(__name__)


def check_cacheable(policy: PTRPolicy, data: Any, args: PTRTrainingArguments) -> None:
    """Refuse what cannot be trained from stored features, by name.

    Args:
        policy: to train.
        data: the training data.
        args: of the run.

    Raises:
        ValueError: the policy's family cannot read features, its tower trains, it sees no pictures; the data are a mixture, a
            stream or in memory, or transform their pictures.
    """
    why = None
    config = policy.config.base_config
    if not isinstance(data, SegmentDataset):
        why = "it takes a single dataset that is read from disk, and no mixture, stream or in_memory"
    elif not config.image_features or not data.meta.camera_keys:
        why = f"the {config.type} policy and its data have no camera"
    elif not policy.adapter.reads_features:
        why = f"the {config.type} policy cannot be trained from features of its pictures"
    elif not policy.adapter.tower_is_frozen():
        why = "the policy's vision tower trains, so that what it sees changes with every step"
    elif data.image_transforms is not None:
        why = "the dataset transforms its pictures at random"
    elif data.meta.depth_keys:
        why = f"the dataset has depth maps ({', '.join(data.meta.depth_keys)})"
    if why is not None:
        raise ValueError(f"cache_features={args.cache_features!r} was asked for, but {why}: leave cache_features out.")


class FeatureCache:
    """Fills a store with the features of a run's frames, and gives it to the training data.

    Args:
        trainer: whose run it is; its own preprocessing and precision compute the features.
    """

    def __init__(self, trainer: "PTRTrainer") -> None:
        self._trainer = trainer
        self._screen = copy.copy(trainer.screen)
        self._screen.layout = FRAME

    def begin(self) -> None:
        """Compute what is missing, each process its share, and read features in the place of pictures from now on.

        Raises:
            ValueError: features change with training, or the disk is too small.
        """
        data = self._trainer.train_dataset
        assert isinstance(data, SegmentDataset)  # check_cacheable lets nothing else through
        self._trainer.policy.train()
        # the run draws the numbers that it would draw without a cache
        with torch.random.fork_rng():
            data.use_features(self._complete(data))

    def _complete(self, data: SegmentDataset) -> FeatureStore:
        frames = open_dataset(data, self._screen.layout, announce=logger.debug)
        probe = np.unique(np.linspace(0, len(frames) - 1, PROBED).astype(int)).tolist()
        values = self._probed(frames, probe)
        fields = {
            name: Field(tuple(value.shape[1:]), self._kept_in(name), str(value.dtype).removeprefix("torch."))
            for name, value in values.items()
        }
        folder = self._folder() / self._key(frames, values, fields)
        store = FeatureStore(folder, len(frames), fields)
        missing = store.missing()
        self._announce(store, missing)
        state = self._trainer.accelerator
        # by number: another process may have written some of them before this one looked
        self._fill(store, frames, [n for n in missing if n % state.num_processes == state.process_index])
        state.wait_for_everyone()
        if state.num_processes > 1 and (left := store.missing()):
            raise ValueError(
                f"{folder} lacks {len(left)} of {len(store.shards)} files that other processes have computed: every process has "
                "to see one folder, so name one on a shared disk with cache_features."
            )
        return store

    def _probed(self, frames: SegmentDataset, rows: list[int]) -> dict[str, Tensor]:
        """The features of a few frames.

        Raises:
            ValueError: they depend on what trains, or on chance.
        """
        batch = collate_segments([frames[row] for row in rows])
        first, second = (self._features(dict(batch)) for _ in range(2))
        what = None
        if any(value.requires_grad for value in first.values()):
            what = "what the policy makes of pictures changes in training, though its vision tower is frozen"
        elif any(not torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first):
            what = "the policy makes something else of the same picture each time"
        if what is not None:
            asked = self._trainer.args.cache_features
            raise ValueError(f"cache_features={asked!r} was asked for, but {what}: leave cache_features out.")
        return first

    def _features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What a batch of frames holds in training in the place of its pictures; NaN where a frame could not be read."""
        trainer, policy = self._trainer, self._trainer.policy
        unread = ~torch.as_tensor(batch[ACTION]).reshape(len(batch[ACTION]), -1).isfinite().all(dim=1)
        layer = policy.target_layer if policy.target_encoder is not None else None
        with trainer.compute_loss_context_manager():
            screened, _ = self._screen.before(Trainer._prepare_inputs(trainer, batch))
            rows = policy.adapter.arrange(preprocess(screened, trainer.preprocessor, self._screen.layout))
            views = policy.adapter.encode_views(rows, layer)
        found = {features_key(key): value for key, value in views.features.items() if key in rows}
        found |= {view_key(key): value.float().mean(dim=1) for key, value in views.tower.items()}
        bad = unread.to(next(iter(found.values())).device)
        return {
            name: value.masked_fill(bad.view(-1, *[1] * (value.ndim - 1)), torch.nan) for name, value in found.items()
        }

    def _fill(self, store: FeatureStore, frames: SegmentDataset, shards: list[int]) -> None:
        args = self._trainer.args
        total = sum(len(store.rows(shard)) for shard in shards)
        bar = tqdm(total=total, desc="features", unit="frame", disable=args.disable_tqdm or not total)
        for shard in shards:
            parts: dict[str, list[Tensor]] = {name: [] for name in store.fields}
            for batch in self._batches(frames, store.rows(shard)):
                with torch.no_grad():
                    values = self._features(batch)
                for name in parts:
                    parts[name].append(values[name].to(getattr(torch, store.fields[name].dtype)).cpu())
                bar.update(len(batch["index"]))
            store.write(shard, {name: torch.cat(values) for name, values in parts.items()})
        bar.close()

    def _batches(self, frames: SegmentDataset, rows: range) -> Iterator[dict[str, Any]]:
        args = self._trainer.args
        size, workers = max(BATCH, args.per_device_train_batch_size), args.dataloader_num_workers
        return iter(DataLoader(Subset(frames, rows), size, collate_fn=collate_segments, num_workers=workers))

    def _kept_in(self, name: str) -> str:
        return self._trainer.args.cache_dtype if name.startswith(features_key("observation.")) else "float32"

    def _folder(self) -> Path:
        asked = self._trainer.args.cache_features or AUTO
        if asked == AUTO:
            return Path(cached_assets_path("ptr_hf", namespace="training", subfolder="features"))
        return Path(asked)

    def _key(self, frames: SegmentDataset, probed: Mapping[str, Tensor], fields: Mapping[str, Field]) -> str:
        """A digest of the dataset's files and episodes, and of what the tower makes of a few frames."""
        digest = hashlib.sha256(files_digest(frames).encode())
        digest.update(repr(sorted(fields.items())).encode())
        for name in sorted(probed):
            digest.update(probed[name].detach().float().nan_to_num().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def _announce(self, store: FeatureStore, missing: list[int]) -> None:
        """Say what will be computed and how large it is.

        Raises:
            ValueError: the disk is too small.
        """
        folder = store.folder
        folder.mkdir(parents=True, exist_ok=True)
        frames = sum(len(store.rows(shard)) for shard in missing)
        needed = frames * store.bytes / max(store.frames, 1)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"The features of {frames:,} frames take {needed / GIGABYTE:.3g} GB and {folder} has {free / GIGABYTE:.3g} GB "
                "free: name a larger disk with cache_features, or leave it out."
            )
        args = self._trainer.args
        if args.process_index or args.disable_tqdm:
            return
        left = (
            f"{needed / GIGABYTE:.3g} GB of them to compute, {free / GIGABYTE:.3g} GB free" if missing else "all there"
        )
        PlainConsole().print(
            f"{'features':13}{store.frames:,} frames, {store.bytes / GIGABYTE:.3g} GB in {folder}: {left}",
            soft_wrap=True,
        )
