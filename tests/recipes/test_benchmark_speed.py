"""The speed benchmark counts what it claims to count; nothing here looks at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptr_hf.data.datasets import open_dataset, video_backend
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.data.segments import SegmentLayout

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

from speed_frames import DecodedFrames, decoded_frames  # noqa: E402
from speed_probes import Case, build_policy, training_run  # noqa: E402

CHUNK = 16


def _layout(length: int, futures: bool) -> SegmentLayout:
    return SegmentLayout(None, tuple(range(CHUNK)), length, CHUNK, CHUNK if futures else None)


@pytest.mark.parametrize(("length", "futures", "frames"), [(1, False, 1), (1, True, 2), (4, True, 5), (4, False, 4)])
def test_a_segment_asks_for_each_frame_once_and_none_is_decoded_twice(length, futures, frames):
    counted = decoded_frames(_layout(length, futures), bundled_demonstrations(), samples=24, seed=0)
    assert counted["requested_per_chunk"] == pytest.approx(frames / length)
    assert counted["twice"] == 0
    assert counted["distinct_per_chunk"] <= counted["requested_per_chunk"]


def test_only_frames_past_the_end_of_an_episode_are_asked_for_twice():
    dataset = open_dataset(bundled_demonstrations(), _layout(4, True))
    for index in (0, len(dataset) - 1):
        counter = DecodedFrames()
        with counter.counting():
            item = dataset[index]
        ((_, times),) = counter.requests
        padded = int(item["observation.image_is_pad"].sum())
        assert len(times) - len(set(times)) == padded - (padded == len(times))


@pytest.mark.skipif(video_backend() != "pyav", reason="only PyAV shows its codec's frames")
def test_the_counter_sees_a_frame_that_is_decoded_twice():
    dataset = open_dataset(bundled_demonstrations(), _layout(1, False))
    counter = DecodedFrames()
    with counter.counting():
        dataset[5], dataset[5]
    assert len(counter.codec_frames) == 2 * len(set(counter.codec_frames)) > 0


def test_every_runner_reports_throughput_and_memory():
    case = Case("smolvla", segments=1, segment_length=2, belief_tokens=2)
    for runner in ("lerobot-train", "sft", "ptr"):
        figures = training_run(runner, case, bundled_demonstrations(), steps=2, skip=1, threads=1, seed=0)
        assert set(figures) == {"samples_per_cpu_s", "samples_per_s", "peak_mib"}
        assert all(value > 0 for value in figures.values())


def test_an_unknown_policy_is_named(tmp_path):
    meta = open_dataset(bundled_demonstrations(), _layout(1, False)).meta
    with pytest.raises(ValueError, match="'pi99'.*act, smolvla"):
        build_policy("pi99", meta, tmp_path, seed=0)


def test_help_lists_the_options():
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(
        [sys.executable, RECIPES / "benchmark_speed.py", "--help"], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "--real_size" in shown.stdout
    assert torch.get_num_threads() >= 1
