"""What a rank's step and start cost as ranks, episodes and frames grow: bytes, and times as ratios of one run."""

import multiprocessing
import statistics
import tempfile
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.fast_writer import write_frames, write_many_frames
from benchmarks.scaling.ranks import full_queue, part, samples_of
from episodes import Episode
from ptr_hf.data.datasets import check_dataset, open_dataset
from ptr_hf.data.order import EpochSampler
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.method import CandidateQueue, Candidates, GlobalRows, build_candidates, identification_loss
from ptr_hf.scores import (
    ActionIdentification,
    EpisodeTable,
    InstructionIdentification,
    Score,
    ScoreWeigher,
    SlotMemory,
)
from ptr_hf.scoring import inspect_dataset

CHUNKS, TARGET, STATE, QUEUE, DRAWS = 4, 768, 14, 1024, 64


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that ``work`` holds at a time, temporary ones of every operator included."""
    with warnings.catch_warnings():
        # of a profiler that could run for several cycles
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def heap_peak(work: Callable[[], object]) -> int:
    """The most bytes of Python objects and NumPy arrays that ``work`` holds at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@contextmanager
def memory_of(found: dict[str, float], name: str) -> Iterator[None]:
    """Write to ``found`` the most bytes that this process takes inside and no file stands for (Linux), and the CPU's seconds.

    Pages of files, such as memory-mapped tables and temporary files, are the system's to give away.
    """

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before, began, ended = held(), time.process_time(), threading.Event()
    most = [before]

    def watch() -> None:
        while not ended.wait(0.01):
            most.append(max(most.pop(), held()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    found[name], found[f"{name}, seconds"] = max(most[0], held()) - before, time.process_time() - began


def relative_times(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median over rounds of each work's processor time to the first one's, all of them run in every round."""
    ratios: list[list[float]] = []
    for _ in range(rounds):
        # after the last and largest one of a round, memory and caches are not what the others meet
        works[0]()
        times = []
        for work in works:
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
        ratios.append([one / times[0] for one in times])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


# ---- candidates ----------------------------------------------------------------------------------------------------


def candidate_work(ranks: int, segments: int) -> Callable[[], Candidates]:
    """Candidates, logits and L_id of rank 0, forward and backward, on gathered rows."""
    rows = GlobalRows(CHUNKS, segments, 0, ranks)
    everyone, queue = samples_of(rows.total, TARGET, STATE, seed=1), full_queue(QUEUE, TARGET, STATE)
    local = part(everyone, rows.own())
    query = torch.randn(len(local.valid), TARGET, requires_grad=True)

    def work() -> Candidates:
        found = build_candidates(local, everyone, rows, queue, DRAWS, 0.5, seed=3)
        identification_loss(found.logits(query, 0.12), found.mask).sum().backward()
        return found

    return work


def candidate_bytes(ranks: int, segments: int, target: int = TARGET) -> dict[str, int]:
    """By formula: what the candidates hold (int64 index, mask, float32 logits; pool), and the queue."""
    rows = CHUNKS * segments
    return {
        "index, mask and logits": 13 * rows * (ranks * rows + DRAWS),
        "pool": 4 * target * (ranks * rows + QUEUE),
        "queue": QUEUE * (4 * (target + STATE) + 32) + 8,
    }


def measure_candidates(ranks: Sequence[int], segments: int, rounds: int) -> list[dict[str, Any]]:
    """Time and peak memory of a rank's candidates against one rank's, and the bytes that formulas give."""
    works = [candidate_work(count, segments) for count in ranks]
    times = relative_times(works, rounds)
    result = []
    for count, work, ratio in zip(ranks, works, times, strict=True):
        found, queue = work(), CandidateQueue(QUEUE, TARGET, STATE)
        held = {
            "index, mask and logits": found.index.nbytes + found.mask.nbytes + 4 * found.mask.numel(),
            "pool": found.pool.nbytes,
            "queue": sum(value.nbytes for value in queue.buffers()),
        }
        assert held == candidate_bytes(count, segments), "the formulas of docs/scaling.md are not the code's any more"
        row = {"ranks": count, "segments": segments, "time_to_one_rank": ratio, "peak_bytes": peak_bytes(work), **held}
        result.append(row)
    return result


# ---- slots ---------------------------------------------------------------------------------------------------------


def slot_bytes(slots: int, scores: int, episodes: int) -> int:
    """By formula: the buffers of a slot memory."""
    return slots * (8 * scores + 12) + 16 * episodes


def measure_slots(sizes: Sequence[int], visited: int) -> list[dict[str, Any]]:
    """What ``remember`` and a refresh of the weights cost with ever more episodes, each of which is a slot.

    Args:
        sizes: numbers of episodes; how much the refresh of the last holds for a moment is not measured.
        visited: rows of all ranks that a step brings.
    """
    heads: dict[str, Score] = {
        "action_identification": ActionIdentification(8, 4, 8),
        "instruction_identification": InstructionIdentification(8, 2, 8),
    }
    works: list[tuple[SlotMemory, ScoreWeigher, Tensor, Tensor]] = []
    for size in sizes:
        memory = SlotMemory(size, size, len(heads))
        none = torch.zeros(size, dtype=torch.int64)
        memory.fill(EpisodeTable(none, none + 1, none, none.bool(), 1))
        # every episode was visited before
        memory.remember(torch.arange(size), torch.randn(size, len(heads)))
        weigher = ScoreWeigher(heads, memory, weight_map="exponential")
        works.append((memory, weigher, torch.randint(size, (visited,)), torch.randn(visited, len(heads))))
        held = sum(value.nbytes for value in memory.buffers())
        assert held == slot_bytes(size, len(heads), size), "the formula of docs/scaling.md is not the code's any more"
    remember = [lambda m=memory, s=slot, v=value: m.remember(s, v) for memory, _, slot, value in works]
    refresh = [lambda m=memory, w=weigher: w.slot_weights(m.mean, m.group) for memory, weigher, _, _ in works]
    times = relative_times(remember, 3), relative_times(refresh, 1)
    return [
        {
            "episodes": size,
            "bytes": slot_bytes(size, len(heads), size),
            "remember_time": times[0][place],
            "refresh_time": times[1][place],
            "remember_peak_bytes": peak_bytes(remember[place]),
            "refresh_peak_bytes": peak_bytes(refresh[place]) if size < sizes[-1] else None,
        }
        for place, size in enumerate(sizes)
    ]


# ---- the dataset ---------------------------------------------------------------------------------------------------

LAYOUT = SegmentLayout(None, (0, 1), 1, 2, 2)


def measure_dataset(folder: Path, sizes: tuple[int, int], frames: int) -> dict[str, Any]:
    """Bytes that a real LeRobotDataset without pictures costs each process, per episode and per frame.

    Args:
        folder: to write datasets in.
        sizes: two numbers of episodes, whose difference tells what one more costs.
        frames: of an episode.
    """
    # what the first one of a process costs is no part of the difference
    _, small, large = (_dataset_bytes(folder / f"{place}", size, frames) for place, size in enumerate((4, *sizes)))
    more = sizes[1] - sizes[0]
    slope = {name: (large[name] - small[name]) / more for name in small}
    per_frame = {name: slope.pop(name) / frames for name in ("check_dataset", "order of an epoch")}
    return {"episodes": sizes[1], "frames": sizes[1] * frames, "per_episode": slope, "per_frame": per_frame}


def _dataset_bytes(path: Path, episodes: int, frames: int) -> dict[str, float]:
    actions = np.zeros((frames, 2), dtype=np.float32)
    write_frames(path, [Episode({"action": actions}, f"task {number % 7}") for number in range(episodes)], 10)
    # the first time its files are also converted
    dataset = open_dataset(path, LAYOUT)
    table = EpisodeTable.from_metadata(dataset.meta, "task")
    held = sum(value.nbytes for value in (table.first, table.length, table.group, table.corrupted))
    return {
        "metadata on disk": sum(file.stat().st_size for file in (path / "meta" / "episodes").rglob("*.parquet")),
        "metadata, memory-mapped": dataset.meta.episodes.data.nbytes,
        "EpisodeTable": held,
        "building it, standardize_by=all": heap_peak(lambda: EpisodeTable.from_metadata(dataset.meta)),
        "building it, standardize_by=task": heap_peak(lambda: EpisodeTable.from_metadata(dataset.meta, "task")),
        "check_dataset": heap_peak(lambda: check_dataset(dataset, LAYOUT)),
        "order of an epoch": peak_bytes(EpochSampler(len(dataset)).order),
    }


def measure_large(sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """What opening and inspecting real LeRobotDatasets of many episodes takes, each in a process of its own.

    Args:
        sizes: numbers of episodes, and of frames of each.
    """
    rows = []
    for episodes, frames in sizes:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        ):
            rows.append(pool.submit(_large, Path(folder), episodes, frames).result())
    return rows


def _large(folder: Path, episodes: int, frames: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    # the library's own copies of the tables go as well
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    write_many_frames(folder / "dataset", episodes, frames)
    return {"episodes": episodes, "frames": frames} | memory_of_dataset(folder / "dataset", folder / "scores")


def memory_of_dataset(path: Path, scores: Path) -> dict[str, float]:
    """What opening and inspecting a dataset takes, see ``memory_of``; the scores are written to a folder."""
    found: dict[str, float] = {}
    # the first time its files are also converted
    open_dataset(path, LAYOUT)
    with memory_of(found, "opening"):
        dataset = open_dataset(path, LAYOUT)
    with memory_of(found, "check_dataset"):
        check_dataset(dataset, LAYOUT)
    with memory_of(found, "order of an epoch"):
        EpochSampler(len(dataset)).order()
    del dataset
    with memory_of(found, "inspection"):
        inspected = inspect_dataset(path, device="cpu", progress=False)
    with memory_of(found, "writing its scores"):
        inspected.save(scores)
    return found
