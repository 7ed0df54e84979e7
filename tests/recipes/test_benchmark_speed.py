"""The speed benchmark counts what it claims to count; nothing here looks at a time."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from lerobot.utils.import_utils import get_safe_default_video_backend
from transformers import HfArgumentParser

from benchmarks.speed import gpu, page, start
from benchmarks.speed.benchmark import SpeedArguments
from benchmarks.speed.frames import DecodedFrames, chunk_layout, decoded_frames, measure_reading, whole_segments
from benchmarks.speed.probes import Case, build_policy, paired_steps, training_run
from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.demonstrations import bundled_demonstrations


@pytest.mark.full
@pytest.mark.parametrize(("length", "futures", "frames"), [(1, False, 1), (1, True, 2), (4, True, 5), (4, False, 4)])
def test_a_segment_asks_for_each_frame_once_and_none_is_decoded_twice(length: int, futures: bool, frames: int) -> None:
    dataset = open_dataset(bundled_demonstrations(), chunk_layout(length, futures))
    counted = decoded_frames(dataset, whole_segments(dataset, length, samples=24, seed=0), length)
    assert counted["requested_per_chunk"] == pytest.approx(frames / length)
    assert counted["twice"] == 0
    assert counted["distinct_per_chunk"] <= counted["requested_per_chunk"]


def test_only_frames_past_the_end_of_an_episode_are_asked_for_twice() -> None:
    dataset = open_dataset(bundled_demonstrations(), chunk_layout(4, True))
    for index in (0, len(dataset) - 1):
        counter = DecodedFrames()
        with counter.counting():
            item = dataset[index]
        ((_, times),) = counter.requests
        padded = int(item["observation.image_is_pad"].sum())
        assert len(times) - len(set(times)) == padded - (padded == len(times))


@pytest.mark.skipif(get_safe_default_video_backend() != "pyav", reason="only PyAV shows its codec's frames")
def test_the_counter_sees_a_frame_that_is_decoded_twice() -> None:
    dataset = open_dataset(bundled_demonstrations(), chunk_layout(1, False))
    counter = DecodedFrames()
    with counter.counting():
        first, second = dataset[5], dataset[5]
    assert first["index"] == second["index"] == 5
    assert len(counter.codec_frames) == 2 * len(set(counter.codec_frames)) > 0


@pytest.mark.full
@pytest.mark.parametrize("runner", ["lerobot-train", "cached", "ptr"])
def test_a_training_run_reports_throughput_and_memory(runner: str) -> None:
    case = Case("smolvla_frozen", segments=1, segment_length=2, belief_tokens=2)
    figures = training_run(runner, case, bundled_demonstrations(), steps=2, skip=1, threads=1, seed=0, episodes=[0, 3])
    assert set(figures) == {"samples_per_cpu_s", "samples_per_s", "peak_mib"}
    assert all(value > 0 for value in figures.values())


@pytest.mark.full
def test_the_script_for_a_gpu_runs_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    options = ["--tiny", "true", "--device", "cpu", "--pairs", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["gpu.py", *options])
    gpu.main()
    result = json.loads(output.read_text())
    assert [step["belief_tokens"] for step in result["steps"]] == [0, 4]
    for step in result["steps"]:
        for side in ("sft", "offline", "cached", "ptr"):
            assert step[f"{side}_wall_s"] > 0
            assert step[f"{side}_samples_per_s"] == pytest.approx(step["chunks"] / step[f"{side}_wall_s"])
    assert result["resume"]["bit_for_bit"]


def test_the_committed_page_says_what_was_measured(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    committed, results = root / "docs" / "speed.md", str(root / "results")
    page.main(["--check", "--results", results, "--page", str(committed)])
    other = tmp_path / "speed.md"
    other.write_text(committed.read_text().replace("| 15 s |", "| 16 s |"))
    with pytest.raises(SystemExit, match="not up to date"):
        page.main(["--check", "--results", results, "--page", str(other)])


@pytest.mark.full
def test_a_start_ends_at_the_first_step(tmp_path: Path) -> None:
    marks = start.start(tmp_path, (sys.executable,))
    assert tuple(marks) == start.MARKS
    assert 0 < marks["imported"] < marks["opened and inspected"] < marks["first step"]
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.full
def test_where_a_step_goes_adds_up_to_its_ratio() -> None:
    found = paired_steps(Case("act", 2, 2, 0), bundled_demonstrations(), pairs=2, seed=0, progress=lambda: None)
    assert sum(found["parts"].values()) == pytest.approx(found["ratio_cpu"]["median"])
    assert all(share > 0 for name, share in found["parts"].items() if name != "backward, optimiser, queue")


@pytest.mark.full
def test_either_loader_reads_the_same_chunks() -> None:
    rows = measure_reading(bundled_demonstrations("heldout"), samples=2, rounds=1, seed=0, distances=(8,))
    assert {row["backend"] for row in rows} >= {"pyav"}
    codec = {row["sample"]: row["codec_per_chunk"] for row in rows if row["backend"] == "pyav"}
    assert codec["PTR, T = 4"] < codec["LeRobot, T = 1"] < codec["PTR, T = 4, by LeRobot's decoder"]


def test_an_unknown_policy_is_named(tmp_path: Path) -> None:
    meta = open_dataset(bundled_demonstrations(), chunk_layout(1, False)).meta
    with pytest.raises(ValueError, match=r"'pi99'.*act, smolvla"):
        build_policy("pi99", meta, tmp_path, seed=0)


def test_every_option_has_help() -> None:
    shown = " ".join(HfArgumentParser(SpeedArguments).format_help().split())
    for option in fields(SpeedArguments):
        assert f"--{option.name}" in shown
        assert option.metadata["help"][:30] in shown
