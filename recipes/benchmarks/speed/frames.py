"""What reading costs: the frames that the codec works through and the processor time, beside LeRobot's own loader."""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from subprocess import run
from typing import Any
from unittest.mock import patch

import av
import torch
from lerobot.datasets.dataset_reader import DatasetReader
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.import_utils import get_safe_default_video_backend

from ptr_hf.data.datasets import episode_spans, open_dataset
from ptr_hf.data.segments import SegmentLayout

CHUNK = 16
LOADERS = {
    "LeRobot, T = 1": ("lerobot", 1, False),
    "SFT, T = 1": ("ours", 1, False),
    "SFT, T = 4": ("ours", 4, False),
} | {
    "PTR, T = 4, by LeRobot's decoder": ("lerobot", 4, True),
    "PTR, T = 1": ("ours", 1, True),
    "PTR, T = 4": ("ours", 4, True),
}
"""What is measured: whose loader, T, and whether consequences are read; all on the same chunks."""


class DecodedFrames:
    """What was asked of a dataset's videos, and what PyAV's codec did for it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, tuple[float, ...]]] = []
        self.codec_frames: list[tuple[str, int]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Watch every dataset read inside the block."""
        query, opened = DatasetReader._get_query_timestamps, av.open

        def requested(reader: DatasetReader, *args: Any, **kwargs: Any) -> dict[str, list[float]]:
            times = query(reader, *args, **kwargs)
            self.requests += [(key, tuple(own)) for key, own in times.items()]
            return times

        with (
            patch.object(DatasetReader, "_get_query_timestamps", requested),
            patch.object(av, "open", lambda *args, **kwargs: _Container(opened(*args, **kwargs), self)),
        ):
            yield


class _Watched:
    def __init__(self, watched: Any, counter: DecodedFrames, name: str) -> None:
        self._watched, self._counter, self._name = watched, counter, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)

    def decode(self, *args: Any) -> Iterator[Any]:
        for frame in self._watched.decode(*args):
            self._counter.codec_frames.append((self._name, frame.pts))
            yield frame


class _Container(_Watched):
    """A PyAV container that counts the frames it decodes, whole or packet by packet."""

    def __init__(self, container: Any, counter: DecodedFrames) -> None:
        super().__init__(container, counter, container.name)

    def __enter__(self) -> "_Container":
        return self

    def __exit__(self, *error: Any) -> None:
        self._watched.close()

    def demux(self, *args: Any) -> Iterator[Any]:
        for packet in self._watched.demux(*args):
            yield _Watched(packet, self._counter, self._name)


def chunk_layout(length: int, futures: bool) -> SegmentLayout:
    """T chunks one after the other, with the frame that follows each where Δ = stride."""
    return SegmentLayout(None, tuple(range(CHUNK)), length, CHUNK, CHUNK if futures else None)


def whole_segments(dataset: LeRobotDataset, length: int, samples: int, seed: int) -> list[int]:
    """Random frames at which a segment of T chunks can begin that all begin inside the episode."""
    spans = episode_spans(dataset)
    places = [start + frame for _, start, frames in spans for frame in range(frames - (length - 1) * CHUNK)]
    return [places[at] for at in torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:samples]]


def decoded_frames(dataset: LeRobotDataset, places: list[int], length: int) -> dict[str, Any]:
    """Read samples and count frames per chunk and camera.

    Args:
        dataset: any of LeRobot's.
        places: of the samples.
        length: T, chunks in each.

    Returns:
        `requested_per_chunk` counts the frames that the samples hold; `distinct_per_chunk` leaves out the last frame of an
        episode repeated past its end; `twice` counts frames that were decoded more than once for one sample;
        `codec_per_chunk` counts what the codec decodes on its way from a key frame (null for torchcodec, which does not tell).
    """
    requested = distinct = codec = twice = 0
    for place in places:
        counter = DecodedFrames()
        with counter.counting():
            dataset[place]
        frames = [(path, time) for path, times in counter.requests for time in times]
        requested += len(frames)
        distinct += len(set(frames))
        codec += len(counter.codec_frames)
        # One request per camera decodes forward once, so a frame can only return in another request.
        repeated_requests = sum(len(set(times)) for _, times in counter.requests) - len(set(frames))
        twice += repeated_requests + len(counter.codec_frames) - len(set(counter.codec_frames))
    chunks = len(places) * length * len(dataset.meta.video_keys)
    return {
        "requested_per_chunk": requested / chunks,
        "distinct_per_chunk": distinct / chunks,
        "twice": twice,
        "codec_per_chunk": codec / chunks if codec else None,
    }


# ---- beside LeRobot's own loader -----------------------------------------------------------------------------------


def measure_reading(
    dataset: Path, samples: int, rounds: int, seed: int, distances: tuple[int, ...] = (2, 8)
) -> list[dict]:
    """Read the same chunks with either loader, decoder and distance of key frames, in one process of its own.

    torchcodec needs FFmpeg's shared libraries: where the system has none, the process finds those that PyAV brings.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        request = {"dataset": str(dataset), "samples": samples, "rounds": rounds, "seed": seed, "distances": distances}
        libraries = Path(av.__file__).parents[1] / "av.libs"
        links = Path(folder) / "libraries"
        links.mkdir()
        needed = [*libraries.glob("libav*"), *libraries.glob("libsw*")]
        for file in needed if get_safe_default_video_backend() == "pyav" else ():
            name, _, number = file.name.partition(".so.")
            (links / f"{name.partition('-')[0]}.so.{number.partition('.')[0]}").symlink_to(file)
        paths = [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), str(links), str(libraries)]
        command = [sys.executable, __file__, json.dumps(request | {"folder": folder})]
        run(command, env=os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}, check=True)
        return json.loads(output.read_text())


def _measure(request: dict[str, Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    backends = dict.fromkeys([get_safe_default_video_backend(), "pyav"])
    rows = []
    for distance in request["distances"]:
        root = with_key_frames(Path(request["dataset"]), Path(request["folder"]) / f"every_{distance}", distance)
        for backend in backends:
            rows += [{"key_frames_every": distance} | row for row in _by_turns(root, backend, request)]
    return rows


def _by_turns(root: Path, backend: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Every loader on the same chunks, round by round."""
    opened, rows = {}, []
    for name, (whose, length, futures) in LOADERS.items():
        layout = chunk_layout(length, futures)
        meta = open_dataset(root, layout).meta
        offsets = layout.delta_timestamps(list(meta.features), meta.fps)
        theirs = LeRobotDataset(
            root.name, root=root, delta_timestamps=offsets, video_backend=backend, return_uint8=True
        )
        opened[name] = theirs if whose == "lerobot" else open_dataset(theirs, layout)
    starts = whole_segments(next(iter(opened.values())), 4, request["samples"], request["seed"])
    places = {
        name: starts if length == 4 else [start + step * CHUNK for start in starts for step in range(4)]
        for name, (_, length, _) in LOADERS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in LOADERS}
    for _ in range(request["rounds"] + 1):
        for name, dataset in opened.items():
            begin = time.process_time()
            for place in places[name]:
                dataset[place]
            times[name].append((time.process_time() - begin) / (4 * len(starts)))
    first = next(iter(LOADERS))
    for name, (_, length, _) in LOADERS.items():
        ratios = [own / other for own, other in zip(times[name][1:], times[first][1:], strict=True)]
        spread = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        rows.append(
            {"sample": name, "backend": backend, "chunks": 4 * len(starts), "rounds": request["rounds"]}
            | decoded_frames(opened[name], places[name], length)
            | {"cpu_ms_per_chunk": 1e3 * statistics.median(times[name][1:]), "cpu_to_lerobot": spread}
        )
    return rows


def with_key_frames(dataset: Path, folder: Path, distance: int, size: tuple[int, int] = (480, 640)) -> Path:
    """A copy of a dataset whose videos have a key frame every `distance` frames and the size of a usual camera."""
    shutil.copytree(dataset, folder)
    for path in sorted((folder / "videos").rglob("*.mp4")):
        raw = path.rename(path.with_suffix(".before"))
        with av.open(str(raw), format="mp4") as before, av.open(str(path), "w") as after:
            source = before.streams.video[0]
            stream = after.add_stream("h264", rate=source.average_rate or Fraction(30))
            stream.height, stream.width = size
            stream.pix_fmt, stream.time_base = "yuv420p", source.time_base
            stream.options = {"g": str(distance), "bf": "0", "crf": "23", "preset": "veryfast"}
            for frame in before.decode(source):
                scaled = frame.reformat(width=size[1], height=size[0])
                scaled.pict_type = 0
                after.mux(stream.encode(scaled))
            after.mux(stream.encode())
        raw.unlink()
    info = json.loads((folder / "meta/info.json").read_text())
    for feature in info["features"].values():
        if feature["dtype"] == "video":
            feature["shape"] = [*size, 3]
            feature["info"] |= {"video.height": size[0], "video.width": size[1], "video.g": distance}
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


if __name__ == "__main__":
    requested = json.loads(sys.argv[1])
    Path(requested["folder"], "result.json").write_text(json.dumps(_measure(requested)))
