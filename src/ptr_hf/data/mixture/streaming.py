"""A mixture read a few episodes at a time: training starts at once, and data need not fit the disk.

LeRobot's own stream tells the first frame after an episode's end from a recorded one only by rounding, and finds videos by
the frame's number in the whole data set; a consequence must be neither wrong nor made up. So blocks of episodes are opened
as LeRobotDatasets, of which only these episodes' files are fetched, and a sample is exactly what `Mixture` gives.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import IterableDataset, get_worker_info

from ptr_hf.data.datasets import check_episodes, is_dataset_folder, open_dataset
from ptr_hf.data.in_memory import collate_segments
from ptr_hf.data.mixture.dataset import unified
from ptr_hf.data.mixture.metadata import MixtureMetadata, Source
from ptr_hf.data.segments import SegmentLayout, sample_of

logger = logging.getLogger(__name__)


class StreamingMixture(IterableDataset[dict[str, Any]]):
    """Samples of several datasets without end, each source at its share.

    Every source goes through its episodes in blocks of `stream_episodes`, the blocks and the samples of a block in random
    order. The order depends on seed, epoch and worker alone, so a run resumes by reading past what it has seen. Files that
    were fetched from the Hub for a block are removed when the next one does not need them.

    Args:
        meta: of the mixture.
        layout: the offsets to read.
        seed: of the order.

    Raises:
        ValueError: a dataset holds nothing to learn from under this layout.
    """

    def __init__(self, meta: MixtureMetadata, layout: SegmentLayout, seed: int = 0) -> None:
        self.meta, self.layout, self.seed = meta, layout, seed
        self.epoch = 0
        for source in meta.sources:
            check_episodes(source.meta, source.episodes, layout)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Accelerate calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        place = (self.seed, self.epoch, 0 if worker is None else worker.id)
        draws = np.random.default_rng(np.random.SeedSequence(place))
        with ExitStack() as fetched:
            streams = []
            for source in self.meta.sources:
                root = None
                if isinstance(source.config.dataset, str) and not is_dataset_folder(source.config.dataset):
                    root = Path(fetched.enter_context(tempfile.TemporaryDirectory(prefix="ptr_stream_")))
                streams.append(self._samples(source, np.random.default_rng([*place, source.number]), root))
            while True:
                yield next(streams[int(draws.choice(len(streams), p=self.meta.shares))])

    def _samples(self, source: Source, draws: np.random.Generator, root: Path | None) -> Iterator[dict[str, Any]]:
        """A source's samples, pass after pass.

        Args:
            source: one of the mixture.
            draws: its random stream.
            root: where files from the Hub go; None reads a dataset where it lies.
        """
        # what was set right is said once, not with every block
        announce = cache(logger.warning)
        episodes = sorted(source.episodes)
        size = self.meta.config.stream_episodes
        blocks = [episodes[first : first + size] for first in range(0, len(episodes), size)]
        while True:
            for number in draws.permutation(len(blocks)):
                if root is not None:
                    _keep_only(source.meta, blocks[number], root)
                dataset = open_dataset(
                    source.config.dataset,
                    self.layout,
                    episodes=blocks[number],
                    revision=source.config.revision,
                    root=root,
                    announce=announce,
                )
                try:
                    for position in draws.permutation(len(dataset)).tolist():
                        yield sample_of(unified(collate_segments([dataset[position]]), source, self.meta, self.layout))
                finally:
                    if root is not None:
                        _forget_tables(dataset)


def _keep_only(meta: LeRobotDatasetMetadata, episodes: Sequence[int], root: Path) -> None:
    """Remove what was fetched of other episodes than these."""
    needed = {root / meta.get_data_file_path(episode) for episode in episodes}
    needed |= {root / meta.get_video_file_path(episode, key) for episode in episodes for key in meta.video_keys}
    for folder in ("data", "videos"):
        for file in (root / folder).rglob("*.*"):
            if file.is_file() and file not in needed:
                file.unlink()


def _forget_tables(dataset: LeRobotDataset) -> None:
    """Remove what the datasets library made of a block's data files: it keeps a copy for the next time, which never comes."""
    for file in dataset.hf_dataset.cache_files:
        shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
