"""Frames of a video in one forward pass of its container, where PyAV decodes.

LeRobot's own decoder works through everything from the first to the last frame that is asked for, and turns all of it into
pictures. A segment asks for a frame every chunk: most of what lies between has no use, and is passed over here.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import av
import torch
from jaxtyping import UInt8
from lerobot.datasets.dataset_reader import DatasetReader
from lerobot.datasets.video_utils import FrameTimestampError
from torch import Tensor


def frames_at(path: Path, times: Sequence[float], tolerance_s: float) -> UInt8[Tensor, "frames 3 height width"]:
    """The frames that LeRobot's decoder gives with PyAV, bit for bit.

    The container is opened and searched once. Packets are read on from there; those before a key frame that does not lie
    behind the next frame are never decoded, and only frames that are asked for become pictures.

    Args:
        path: of the video.
        times: of the frames in seconds, in any order; one may come twice.
        tolerance_s: how far a frame may lie from its time.

    Raises:
        FrameTimestampError: there is no frame so close to one of the times.
        OSError, ValueError: the file cannot be read or decoded.
    """
    ahead = deque(sorted(set(times)))
    found: dict[float, Tensor] = {}
    before: Any = None

    def distance(frame: Any) -> float:
        return abs(float(frame.pts * unit) - ahead[0])

    def take(frame: Any) -> None:
        if frame is None or not distance(frame) < tolerance_s:
            closest = "none can be read" if frame is None else f"the closest is at {float(frame.pts * unit):.4f} s"
            raise FrameTimestampError(f"{path} has no frame within {tolerance_s} s of {ahead[0]:.4f} s: {closest}.")
        picture = frame.to_ndarray(format="rgb24")
        found[ahead.popleft()] = torch.from_numpy(picture).permute(2, 0, 1).contiguous()

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        unit: Any = stream.time_base
        waiting: list[Any] = []
        for packet in _packets_from(container, stream, round(ahead[0] / unit)):
            target = round(ahead[0] / unit)
            if waiting and packet.is_keyframe and packet.pts is not None and packet.pts <= target:
                waiting.clear()
                stream.codec_context.flush_buffers()
            waiting.append(packet)
            if packet.pts is not None and packet.pts < target:
                continue
            for frame in chain.from_iterable(each.decode() for each in waiting):
                while ahead and frame.pts is not None and frame.pts >= round(ahead[0] / unit):
                    take(frame if before is None else min(before, frame, key=distance))
                before = before if frame.pts is None else frame
            waiting.clear()
            if not ahead:
                break
        while ahead:
            take(before)
    return torch.stack([found[time] for time in times])


def _packets_from(container: Any, stream: Any, tick: int) -> Iterator[Any]:
    """The packets from the last key frame on that is not shown after a time, in the stream's unit."""
    container.seek(tick, stream=stream)
    first = next(container.demux(stream))
    if first.pts is not None and first.pts > tick:
        # containers are searched by when a frame is decoded, which may be before frames that are shown before it
        container.seek(first.dts - 1, stream=stream)
        first = next(container.demux(stream))
    yield first
    yield from container.demux(stream)


class ForwardReader(DatasetReader):
    """LeRobot's reader with `frames_at` where PyAV decodes colour; torchcodec passes over what lies between by itself.

    Args:
        reader: whose settings and data it takes over.
    """

    def __init__(self, reader: DatasetReader) -> None:
        self.__dict__.update(reader.__dict__)

    def _query_videos(self, query_timestamps: dict[str, list[float]], ep_idx: int) -> dict[str, Tensor]:
        depth = set(self._meta.depth_keys)
        if self._video_backend != "pyav" or depth.intersection(query_timestamps):
            return super()._query_videos(query_timestamps, ep_idx)
        episode, found = self._meta.episodes[ep_idx], {}
        for key, times in query_timestamps.items():
            begin = episode[f"videos/{key}/from_timestamp"]
            path = self.root / self._meta.get_video_file_path(ep_idx, key)
            frames: Tensor = frames_at(path, [begin + time for time in times], self._tolerance_s)
            found[key] = (frames if self._return_uint8 else frames.float() / 255).squeeze(0)
        return found
