"""What PTR costs, as ratios measured side by side on one machine: step time, throughput, memory and decoded frames.

    python recipes/benchmarks/speed/benchmark.py                    # tiny policies, a few minutes
    python recipes/benchmarks/speed/benchmark.py --real_size true   # and SmolVLA at its released size: 8 GB, half an hour

The two sides of a ratio take turns (step by step, or run by run), so that whatever else the machine does meets both.
Times are CPU time, which other processes hardly change; wall time stands beside it.
"""

import json
import logging
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.speed.frames import measure_reading
from benchmarks.speed.probes import FROZEN, Case, paired_steps, spread, training_run
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.report.console import PlainConsole

RUNNERS = ("lerobot-train", "sft", "cached", "offline", "ptr")
SIDES = ("offline", "cached", "by_chunk")
"""Steps that are compared with SFT's beside PTR's."""
STEPS = [
    Case("act", 8, 4, 0),
    Case("act", 8, 4, 4),
    Case("smolvla_frozen", 8, 4, 0),
    Case("smolvla_frozen", 8, 4, 4),
    Case("smolvla", 8, 4, 0),
    Case("smolvla", 8, 4, 4),
    Case("smolvla", 32, 1, 0),
    Case("smolvla", 32, 4, 4),
]
RUNS = [Case("act", 2, 4, 0), Case("smolvla_frozen", 8, 4, 0)]
REAL_STEPS = [Case("smolvla_500m", 2, 4, 0), Case("smolvla_500m", 2, 4, 4)]
REAL_RUNS = [Case("smolvla_500m", 4, 2, 0)]
REAL_EPISODES = (0,)
"""What runs at the released size train on: the features of every frame are computed first."""


@dataclass
class SpeedArguments:
    """Ratios of PTR's cost to plain fine-tuning's."""

    output: Path = field(default=Path("results/speed.json"), metadata={"help": "Where the result goes."})
    dataset: Path | None = field(
        default=None, metadata={"help": "Folder of a LeRobotDataset. None: the bundled demonstrations."}
    )
    real_size: bool = field(default=False, metadata={"help": "Also measure SmolVLA at its released size."})
    tiny: bool = field(default=True, metadata={"help": "Measure the tiny policies."})
    reading: bool = field(default=True, metadata={"help": "Measure how videos are read."})
    pairs: int = field(default=20, metadata={"help": "Pairs of steps of a tiny policy."})
    real_size_pairs: int = field(default=5, metadata={"help": "Pairs of steps at the released size."})
    rounds: int = field(
        default=3, metadata={"help": "Training runs of each kind on a tiny policy; one at the released size."}
    )
    run_steps: int = field(default=25, metadata={"help": "Steps of a training run; the first five do not count."})
    frame_samples: int = field(default=24, metadata={"help": "Segments of four chunks that are read."})
    frame_rounds: int = field(default=5, metadata={"help": "Rounds in which every loader reads them."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    seed: int = field(default=0, metadata={"help": "Of weights, samples and order."})


def measure_steps(arguments: SpeedArguments, dataset: Path, cases: list[Case], pairs: int) -> list[dict[str, Any]]:
    """PTR's step against SFT's on the same chunks."""
    results = []
    for case in cases:
        with tqdm(total=pairs + 1, desc=case.label, unit="pair") as bar:
            results.append(paired_steps(case, dataset, pairs, arguments.seed, bar.update))
    return results


def measure_runs(
    arguments: SpeedArguments,
    dataset: Path,
    cases: list[Case],
    rounds: int,
    steps: int,
    skip: int,
    episodes: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Throughput and peak memory of `lerobot-train`, and of `PTRTrainer` in each of its ways."""
    results = []
    for case in cases:
        runners = [name for name in RUNNERS if name != "cached" or case.policy in FROZEN]
        if episodes is not None:
            runners.remove("offline")  # so few episodes cannot be inspected
        runs: dict[str, list[dict[str, float]]] = {runner: [] for runner in runners}
        with tqdm(total=rounds * len(runners), desc=case.label, unit="run") as bar:
            for _ in range(rounds):
                for runner in runners:
                    runs[runner].append(
                        training_run(runner, case, dataset, steps, skip, arguments.threads, arguments.seed, episodes)
                    )
                    bar.update()
        figures = {
            runner: {name: statistics.median(run[name] for run in done) for name in done[0]}
            for runner, done in runs.items()
        }
        results.append(
            asdict(case)
            | {"chunks": case.chunks, "rounds": rounds, "steps": steps - skip, "runs": figures}
            | {
                f"{runner}_to_lerobot_cpu": _ratio(runs, "samples_per_cpu_s", "lerobot-train", runner)
                for runner in runners[1:]
            }
            | {f"{runner}_to_sft_peak_memory": _ratio(runs, "peak_mib", runner, "sft") for runner in runners[2:]}
        )
    return results


def _ratio(runs: dict[str, list[dict[str, float]]], name: str, above: str, below: str) -> dict[str, float]:
    pairs = zip(runs[above], runs[below], strict=True)
    return spread([first[name] / second[name] for first, second in pairs])


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    console = PlainConsole()
    steps = _table(
        "Step time to SFT's on the same chunks",
        *("step", "SFT CPU s", "PTR CPU s", "ratio", "wall", "offline", "SFT cached", "SFT chunk by chunk"),
    )
    for row in result["step_time"]:
        label = Case(*(row[name] for name in Case.__dataclass_fields__)).label
        steps.add_row(
            label,
            f"{row['sft_cpu_s']:.3f}",
            f"{row['ptr_cpu_s']:.3f}",
            _span(row["ratio_cpu"]),
            _span(row["ratio_wall"]),
            *(_span(row[f"{side}_ratio_cpu"]) if f"{side}_ratio_cpu" in row else "–" for side in SIDES),
        )
    console.print(steps)
    names = list(dict.fromkeys(name for row in result["step_time"] for name in row["parts"]))
    parts = _table("Where PTR's step goes, in SFT's steps", "step", *names)
    for row in result["step_time"]:
        label = Case(*(row[name] for name in Case.__dataclass_fields__)).label
        parts.add_row(label, *(f"{row['parts'][name]:.2f}" for name in names))
    console.print(parts)
    runs = _table(
        "CPU time of a sample in whole training runs, data loading included, to lerobot-train's",
        *("run", *RUNNERS[1:], "PTR's peak memory to SFT's"),
    )
    for row in result["training_runs"]:
        label = Case(*(row[name] for name in Case.__dataclass_fields__)).label
        ratios = (f"{runner}_to_lerobot_cpu" for runner in RUNNERS[1:])
        spans = (_span(row[name]) if name in row else "–" for name in ratios)
        runs.add_row(label, *spans, _span(row["ptr_to_sft_peak_memory"]))
    console.print(runs)
    reading = _table(
        "Reading, per chunk and camera",
        "sample",
        "key frames",
        "decoder",
        "frames",
        "codec",
        "twice",
        "CPU ms",
        "to LeRobot",
    )
    for row in result["reading"]:
        codec = "–" if row["codec_per_chunk"] is None else f"{row['codec_per_chunk']:.2f}"
        counts = (f"{row['requested_per_chunk']:.2f}", codec, str(row["twice"]), f"{row['cpu_ms_per_chunk']:.1f}")
        every = f"every {row['key_frames_every']}"
        reading.add_row(row["sample"], every, row["backend"], *counts, _span(row["cpu_to_lerobot"]))
    console.print(reading)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left")
    return table


def _span(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['low']:.2f}–{values['high']:.2f})"


def main() -> None:
    """Measure, show, save."""
    (arguments,) = HfArgumentParser(
        SpeedArguments, description=__doc__.partition("\n")[0]
    ).parse_args_into_dataclasses()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    dataset = arguments.dataset or bundled_demonstrations("train")
    result: dict[str, Any] = {
        "command": " ".join(["python", "recipes/benchmarks/speed/benchmark.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "dataset": dataset.name,
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "threads": arguments.threads},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("lerobot_policy_ptr", "lerobot", "torch", "transformers", "av")},
        "reading": [],
        "step_time": [],
        "training_runs": [],
    }
    if arguments.reading:
        result["reading"] = measure_reading(
            arguments.dataset or bundled_demonstrations("heldout"),
            arguments.frame_samples,
            arguments.frame_rounds,
            arguments.seed,
        )
    save(result, arguments.output)
    plan: list[tuple[list[Case], int, list[Case], int, int, int, Sequence[int] | None]] = []
    if arguments.tiny:
        plan.append((STEPS, arguments.pairs, RUNS, arguments.rounds, arguments.run_steps, 5, None))
    if arguments.real_size:
        plan.append((REAL_STEPS, arguments.real_size_pairs, REAL_RUNS, 1, 3, 1, REAL_EPISODES))
    for steps, pairs, runs, rounds, run_steps, skip, episodes in plan:
        for case in steps:
            result["step_time"] += measure_steps(arguments, dataset, [case], pairs)
            save(result, arguments.output)
        result["training_runs"] += measure_runs(arguments, dataset, runs, rounds, run_steps, skip, episodes)
        save(result, arguments.output)
    show(result)


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
