"""Frames read in one pass are LeRobot's, bit for bit, and no more is decoded than they need."""

from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from demonstrations import write_dataset
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import FrameTimestampError, decode_video_frames_pyav
from lerobot.utils.import_utils import get_safe_default_video_backend

from benchmarks.speed.frames import DecodedFrames
from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.pictures import pictures
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.data.video_frames import frames_at

CAMERAS = ("observation.images.front", "observation.images.wrist")
FPS = 30
LENGTH = 70
TOLERANCE = 1e-4
VIDEOS = {
    "key frame every 2": ("h264", {"g": "2", "bf": "0"}),
    "key frame every 8": ("h264", {"g": "8", "bf": "0"}),
    "one key frame": ("h264", {"g": "999", "bf": "0", "x264-params": "scenecut=0"}),
    "frames told ahead": ("h264", {"g": "8", "bf": "3"}),
    "open groups": ("h264", {"g": "8", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}),
    "hevc": ("hevc", {"g": "8", "x265-params": "log-level=none"}),
}


@pytest.fixture(scope="module", params=VIDEOS)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, options = VIDEOS[request.param]
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    draws = np.random.default_rng(0)
    background = draws.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for shift in range(LENGTH):
            picture = np.roll(background, shift, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_are_those_of_lerobot(video: Path) -> None:
    # as they stand in a dataset: in single precision
    times = [float(np.float32(frame / FPS)) for frame in range(LENGTH)]
    whole = decode_video_frames_pyav(video, times, TOLERANCE, return_uint8=True)
    draws = np.random.default_rng(1)
    asked = [
        *([frame] for frame in range(0, LENGTH, 3)),
        [7, 8],
        [16, 0, 16, 33],
        [*range(LENGTH)],
        [*range(60, 0, -16)],
    ]
    asked += [draws.integers(0, LENGTH, draws.integers(1, 9)).tolist() for _ in range(20)]
    for frames in asked:
        own = [times[frame] for frame in frames]
        ours = frames_at(video, own, TOLERANCE)
        assert torch.equal(ours, whole[frames]), frames
        # LeRobot itself misses some frames where groups are open
        with suppress(FrameTimestampError):
            assert torch.equal(ours, decode_video_frames_pyav(video, own, TOLERANCE, return_uint8=True)), frames


def test_the_closest_frame_is_taken_within_the_tolerance(video: Path) -> None:
    whole = frames_at(video, [frame / FPS for frame in range(LENGTH)], TOLERANCE)
    frames = [1, 8, 9, 15, 16, 40, LENGTH - 1]
    for shift in (-0.4, -0.1, 0.1, 0.4):
        times = [(frame + shift) / FPS for frame in frames]
        assert torch.equal(frames_at(video, times, 0.5 / FPS), whole[frames])
        with pytest.raises(
            FrameTimestampError, match=r"video.mp4 has no frame within 0.0001 s of 0\.\d+ s: the closest is"
        ):
            frames_at(video, times, TOLERANCE)
    for beyond in (LENGTH / FPS, 1e4):
        with pytest.raises(FrameTimestampError, match="has no frame within"):
            frames_at(video, [0.0, beyond], TOLERANCE)


@pytest.mark.parametrize("distance", [2, 8])
def test_no_more_is_decoded_than_from_the_last_key_frame_on(tmp_path: Path, distance: int) -> None:
    encoder = RGBEncoderConfig(vcodec="h264", g=distance, extra_options={"bf": 0, "sc_threshold": 0})
    root = write_dataset(tmp_path / "points", (60, 30), use_videos=True, encoder=encoder, cameras=CAMERAS)
    layout = SegmentLayout(None, tuple(range(16)), 4, 16, 16)
    ours, counter = open_dataset(root, layout), DecodedFrames()
    with counter.counting():
        ours[3]
    if get_safe_default_video_backend() == "pyav":
        # 3, 19, 35, 51 and the episode's last, 59, each from its key frame on
        needed = sum(frame % distance + 1 for frame in (3, 19, 35, 51, 59))
        assert len(counter.codec_frames) == len(CAMERAS) * needed


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
@pytest.mark.parametrize("floats", [False, True])
def test_items_are_those_of_lerobot(tmp_path: Path, backend: str, floats: bool) -> None:
    if backend == "torchcodec" != get_safe_default_video_backend():
        pytest.skip("torchcodec does not load here")
    root = write_dataset(tmp_path / "points", (20, 30), use_videos=True, cameras=CAMERAS, vivid=True)
    layout = SegmentLayout((-1, 0), tuple(range(4)), 3, 4, 6)
    offsets = layout.delta_timestamps([*CAMERAS, "action", "observation.state"], 10)
    theirs = LeRobotDataset(
        "tests/points", root=root, video_backend=backend, delta_timestamps=offsets, return_uint8=not floats
    )
    ours = open_dataset(theirs, layout)
    ours.set_image_transforms((lambda picture: picture) if floats else None)
    for index in (0, 1, 7, 19, 20, 33, 49):
        item, expected = ours[index], theirs[index]
        for camera in CAMERAS:
            assert item[camera].dtype == expected[camera].dtype
            assert torch.equal(item[camera], expected[camera])
    shown = pictures(ours, CAMERAS[1], 1, [29, 21, 40])
    single = LeRobotDataset("tests/points", root=root, video_backend=backend, return_uint8=True)
    assert all(np.array_equal(shown[at], single[row][CAMERAS[1]]) for at, row in enumerate((29, 21, 40)))
