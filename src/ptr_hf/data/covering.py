"""A pass over a whole dataset: the segments that cover it, and how many of them are read at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from ptr_hf.data.datasets import HasEpisodes, episode_spans
from ptr_hf.data.segments import SegmentLayout

FRAMES_AT_ONCE = 64 * 10**6
"""Bytes that the frames of one piece may take as floats; a policy's copies and its vision tower take several times that."""


class Covering(NamedTuple):
    """Segments that cover the chosen episodes from their first frames on, without overlap.

    Attributes:
        anchors: position of each segment's first frame.
        chunks: how many chunks of each begin inside its episode.
    """

    anchors: list[int]
    chunks: list[int]


def covering(
    dataset: LeRobotDataset | HasEpisodes, layout: SegmentLayout, episodes: Sequence[int] | None = None
) -> Covering:
    """The segments that cover a dataset, or some of its episodes."""
    step = layout.segment_length * layout.chunk_stride
    found = Covering([], [])
    for episode, first, length in episode_spans(dataset):
        if episodes is not None and episode not in episodes:
            continue
        for start in range(0, length, step):
            found.anchors.append(first + start)
            found.chunks.append(min(layout.segment_length, -(-(length - start) // layout.chunk_stride)))
    return found


def segments_at_once(features: Mapping[str, Mapping[str, Any]], layout: SegmentLayout, most: int) -> int:
    """How many segments are read at once, so that their frames take a bounded memory; at least one.

    Args:
        features: of the dataset.
        layout: to read it at.
        most: segments that may be read.
    """
    shapes = [feature["shape"] for feature in features.values() if feature["dtype"] in ("image", "video")]
    frames = len(layout.observation_offsets or [0])
    segment = 4 * frames * sum(math.prod(shape) for shape in shapes)
    return max(1, min(most, FRAMES_AT_ONCE // max(1, segment)))
