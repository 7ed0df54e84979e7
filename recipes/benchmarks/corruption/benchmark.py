"""Does reweighting help when demonstrations are corrupted? Every preset and every control on the same data and seeds.

    python recipes/benchmarks/corruption/benchmark.py --track state    # 39-d states of Meta-World, an instruction; no GL needed
    python recipes/benchmarks/corruption/benchmark.py --track pixels   # 84-pixel images; needs MUJOCO_GL=egl or osmesa

A run post-trains a policy that was pretrained on clean demonstrations with goals elsewhere, on demonstrations of which a
part is corrupted, and evaluates it on held-out starts. Results go to `results/corruption_<track>.csv`, a row a run, as they
come in; the grid goes on where it stopped. `write_report.py` beside this file makes the page.

One run of your own: --run '{"preset": "ptr_consequence", "weight_map": "calibrated"}' --label my_map --conditions combined
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a run: the runs are what is parallel
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

from rich.table import Table
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.commits import commit
from benchmarks.corruption.conditions import CONDITIONS
from benchmarks.corruption.run import SETTINGS, Cell, prepare, run
from benchmarks.grid import append, finished, read, run_all
from ptr_hf.presets import PRESETS
from ptr_hf.report.console import PlainConsole

COLUMNS = (
    *("preset", "condition", "seed", "success", "auc_chunk", "auc_episode", "ess", "commit", "command"),
    *("auc_chunk_25", "auc_episode_25", "weight_at_end", "corr_motion", "corr_length", "corr_loss"),
    *("by_task", "auc_by_kind", "auc_by_score", "histogram", "flagged_clean", "flagged_corrupted"),
)

_NO_BELIEF = {"num_belief_tokens": 0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ptr_no_belief": ("ptr", _NO_BELIEF),
    # Table 5 and Figure 10 of the paper, without belief
    "ablation:frozen_encoder": ("ptr", {**_NO_BELIEF, "ema_decay": 1.0}),
    "ablation:no_controller": ("ptr", {**_NO_BELIEF, "controller": False}),
    "ablation:no_clipping": ("ptr", {**_NO_BELIEF, "weight_min": 1e-6, "weight_max": 1e6}),
    **{
        f"sweep:{name}={value:g}": ("ptr", {**_NO_BELIEF, name: value})
        for name, values in (("temperature", (0.06, 0.2)), ("beta", (0.5, 3.0)), ("weight_max", (2.0, 8.0)))
        for value in values
    },
    # our own search around ptr_calibrated
    "search:no_cross_fit": ("ptr_calibrated", {"cross_fit": False}),
    "search:no_self_weighting": ("ptr_calibrated", {"self_weighting": False}),
    "search:segment": ("ptr_calibrated", {"aggregation": "segment"}),
    "search:no_loss": ("ptr_consequence", {"weight_map": "calibrated", "standardize_by": "task", "weight_min": 0.01}),
    "search:shuffled": ("ptr_calibrated", {"shuffle_consequences": True}),
}
"""Presets with options changed, each under a name of its own."""

CORE = (
    *("sft", "ptr_offline", "ptr_no_belief", "ptr_consequence_loss", "ptr_calibrated"),
    *("small_loss", "small_loss_calibrated", "oracle"),
)
GRID: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "state": [
        (
            "combined",
            (*CORE, "ptr_consequence", "ptr_consequence_shuffled", "random_weights", "ptr", "sft_belief"),
        ),
        ("clean", (*CORE[:-1], "ptr_consequence", "random_weights")),
        *((name, CORE) for name in ("convention", "minority", "instruction", "sloppy")),
    ],
    "pixels": [
        ("combined", ("sft", "ptr", "ptr_consequence", "ptr_calibrated", "small_loss", "oracle")),
        ("clean", ("sft", "ptr", "ptr_consequence", "ptr_calibrated", "small_loss")),
    ],
}
"""Condition by condition, so that an interrupted grid lacks conditions and no seeds; an oracle of clean data is SFT."""
SEEDS = {"state": [0, 1, 2, 3, 4], "pixels": [0, 1, 2]}


@dataclass
class BenchmarkArguments:
    """Presets × conditions × seeds on Meta-World."""

    track: Literal["state", "pixels"] = field(default="state", metadata={"help": "What the policy observes."})
    presets: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(PRESETS)}. None: those of the track's grid."}
    )
    conditions: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(CONDITIONS)}. None: those of the track's grid."}
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": "Each decides data, order, noise and test starts. None: 0-4 for states, 0-2 for pixels."},
    )
    run: str | None = field(
        default=None, metadata={"help": "One preset with options of the method, as JSON, in place of --presets."}
    )
    label: str = field(default="", metadata={"help": "What --run is called in the results."})
    steps: int | None = field(default=None, metadata={"help": "Optimiser steps of a run. None: the track's own."})
    test_starts: int | None = field(default=None, metadata={"help": "Held-out starts per task. None: the track's own."})
    workers: int = field(default=os.cpu_count() or 1, metadata={"help": "Runs at the same time, one core each."})
    workspace: Path = field(
        default=Path("outputs/corruption"), metadata={"help": "Folder for demonstrations, policies and datasets."}
    )
    results: Path | None = field(default=None, metadata={"help": "CSV file. None: results/corruption_<track>.csv."})


def cells(arguments: BenchmarkArguments) -> Iterator[Cell]:
    """The runs that were asked for, in the order of the grid."""
    grid = dict(GRID[arguments.track])
    for condition in arguments.conditions or list(grid):
        for seed in arguments.seeds or SEEDS[arguments.track]:
            if arguments.run is not None:
                options = json.loads(arguments.run)
                yield Cell(options.pop("preset"), condition, seed, options, arguments.label)
                continue
            for name in arguments.presets or grid.get(condition, grid["combined"]):
                preset, changed = VARIANTS.get(name, (name, {}))
                yield Cell(preset, condition, seed, changed, name)


def check(arguments: BenchmarkArguments) -> None:
    """Refuse unknown names before anything is recorded."""
    for option, given, known in (
        ("--presets", arguments.presets or [], (*PRESETS, *VARIANTS)),
        ("--conditions", arguments.conditions or [], CONDITIONS),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise SystemExit(f"benchmark.py: {option} {', '.join(unknown)}: choose from {', '.join(known)}.")
    if arguments.run is not None and not arguments.label:
        raise SystemExit("benchmark.py: --run needs a --label, under which its rows stand in the results.")


def summary(path: Path) -> Table:
    """Mean success of every preset under every condition."""
    rows = read(path)
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    table = Table("preset", *conditions, title=f"Success, mean over seeds ({path.name})")
    for preset in dict.fromkeys(row["preset"] for row in rows):
        values = []
        for condition in conditions:
            found = [float(row["success"]) for row in rows if (row["preset"], row["condition"]) == (preset, condition)]
            values.append(f"{sum(found) / len(found):.3f} ({len(found)})" if found else "–")
        table.add_row(preset, *values)
    return table


def main(argv: list[str]) -> None:
    """Prepare once, then run what is missing."""
    (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)
    check(arguments)
    results = arguments.results or Path("results") / f"corruption_{arguments.track}.csv"
    workspace = arguments.workspace / arguments.track
    setting = SETTINGS[arguments.track]
    setting = replace(
        setting,
        **{name: vars(arguments)[name] for name in ("steps", "test_starts") if vars(arguments)[name] is not None},
    )
    prepare(setting, workspace)
    done = finished(read(results))
    at = commit()
    try:
        run_all(
            [cell for cell in cells(arguments) if cell.key not in done],
            partial(run, setting, workspace=workspace),
            lambda rows: append(results, [row | {"commit": at} for row in rows], COLUMNS),
            arguments.workers,
        )
    finally:
        PlainConsole().print(summary(results) if results.is_file() else "There are no results.")


if __name__ == "__main__":
    main(sys.argv[1:])
