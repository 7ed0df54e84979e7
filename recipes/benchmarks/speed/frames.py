"""A count of the video frames that one training sample costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import torch
from lerobot.datasets import dataset_reader, video_utils
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.import_utils import get_safe_default_video_backend

from ptr_hf.data.datasets import episode_spans, open_dataset
from ptr_hf.data.segments import SegmentLayout


class DecodedFrames:
    """What was asked of LeRobot's video decoder, and what its codec did for it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, tuple[float, ...]]] = []
        self.codec_frames: list[tuple[str, int]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Watch the decoder of every dataset read inside the block."""
        decode, opened = dataset_reader.decode_video_frames, av.open

        def requested(path: Any, timestamps: list[float], *args: Any, **kwargs: Any) -> torch.Tensor:
            self.requests.append((str(path), tuple(timestamps)))
            return decode(path, timestamps, *args, **kwargs)

        with (
            patch.object(dataset_reader, "decode_video_frames", requested),
            patch.object(video_utils.av, "open", lambda *args, **kwargs: _Container(opened(*args, **kwargs), self)),
        ):
            yield


class _Container:
    """A PyAV container that counts the frames it decodes, by presentation time."""

    def __init__(self, container: Any, counter: DecodedFrames) -> None:
        self._container, self._counter = container, counter

    def __enter__(self) -> "_Container":
        return self

    def __exit__(self, *error: Any) -> None:
        self._container.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def decode(self, *args: Any) -> Iterator[Any]:
        for frame in self._container.decode(*args):
            self._counter.codec_frames.append((self._container.name, frame.pts))
            yield frame


def decoded_frames(layout: SegmentLayout, dataset: Path, samples: int, seed: int) -> dict[str, Any]:
    """Read random samples at a layout and count frames per chunk.

    Returns:
        `requested_per_chunk` counts the frames that the samples hold; `distinct_per_chunk` leaves out the last frame of an
        episode repeated past its end; `twice` counts frames that were decoded more than once for one sample;
        `codec_per_chunk` counts what the codec decodes on its way from a key frame (null for torchcodec, which does not tell);
        `chunks_inside_episode` is the share of chunks that begin inside their episode when segments begin at any frame.
    """
    opened = open_dataset(dataset, layout)
    order = torch.randperm(len(opened), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    requested = distinct = codec = twice = 0
    for index in order:
        counter = DecodedFrames()
        with counter.counting():
            opened[index]
        frames = [(path, time) for path, times in counter.requests for time in times]
        requested += len(frames)
        distinct += len(set(frames))
        codec += len(counter.codec_frames)
        # One request per camera decodes forward once, so a frame can only return in another request.
        repeated_requests = sum(len(set(times)) for _, times in counter.requests) - len(set(frames))
        twice += repeated_requests + len(counter.codec_frames) - len(set(counter.codec_frames))
    chunks = len(order) * layout.segment_length * len(opened.meta.video_keys)
    return {
        "requested_per_chunk": requested / chunks,
        "distinct_per_chunk": distinct / chunks,
        "twice": twice,
        "codec_per_chunk": codec / chunks if codec else None,
        "chunks_inside_episode": _share_inside(opened, layout),
        "samples": len(order),
        "backend": get_safe_default_video_backend(),
    }


def _share_inside(dataset: LeRobotDataset, layout: SegmentLayout) -> float:
    inside = [max(0, length - start) for _, _, length in episode_spans(dataset) for start in layout.chunk_starts]
    return sum(inside) / (len(dataset) * layout.segment_length)
