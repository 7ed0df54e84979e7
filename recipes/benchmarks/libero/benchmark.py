"""Does post-training with weights help on LIBERO when demonstrations are uneven? Presets × conditions × seeds.

A run starts from a policy that learnt LIBERO's tasks from an expert, post-trains it on a condition's demonstrations, and lets it
act on held-out starts. `--track states` tells the policy where the objects are, `--track pixels` gives it two cameras. Every seed
decides data, order, noise and held-out starts, so presets are compared seed by seed.

It needs LIBERO in an environment of its own (docs/libero.md):

    .venv-libero/bin/python recipes/benchmarks/libero/benchmark.py --track states --jobs 2

Results go to `results/libero_<track>.csv`, a row a run, as they come in; the grid goes on where it stopped. The table is printed
at the end, or by `--report` alone, which needs no LIBERO; a picture lies in `figures/` beside the results.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a run: the runs are what is parallel
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco chooses its GL when it is first imported

from matplotlib.figure import Figure
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package `benchmarks` lies
from benchmarks.commits import commit
from benchmarks.grid import append, estimate, finished, paired, percent, read, run_all
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    SKY,
    TICK_SIZE,
    VERMILION,
    board,
    name_axes,
    save_figure,
)

COLUMNS = (
    *("preset", "condition", "seed", "success", "by_task", "auc_episode", "flagged_clean", "flagged_corrupted"),
    *("auc_chunk", "auc_by_kind", "auc_by_score", "histogram", "commit", "command"),
)
BASELINE = "sft"
CORE = ("sft", "ptr_offline", "clean_only", "oracle", "ptr", "small_loss", "random_weights", "ptr_calibrated")
GRID: Mapping[str, tuple[str, ...]] = {
    "combined": CORE,
    "failed_attempts": CORE,
    # what weighing costs where there is nothing to find; an oracle of clean data is SFT
    "clean": ("sft", "ptr_offline", "blind", "ptr", "small_loss"),
    "paper_combined": CORE[:5],
    "convention": CORE[:4],
    "recovery": CORE[:4],
    "hesitation": CORE[:4],
}
"""Condition by condition, seed by seed, so that an interrupted grid lacks conditions and seeds but no presets."""
PRESETS = ("sft", "ptr_offline", "ptr_offline_pictures", *CORE[2:], "blind")
"""In the order of the table."""
SHOWN: Mapping[str, str] = {
    "sft": GREY,
    "random_weights": PINK,
    "ptr": SKY,
    "small_loss": ORANGE,
    "ptr_calibrated": INK,
    "ptr_offline": BLUE,
    "ptr_offline_pictures": VERMILION,
    "oracle": GREEN,
    "clean_only": FAINT,
}
"""Presets in the picture, with their colours."""


def cells(presets: Sequence[str] | None, conditions: Sequence[str] | None, seeds: Sequence[int]) -> Iterator[Any]:
    """The runs that were asked for, in the order of the grid."""
    from benchmarks.libero.run import Cell

    for condition in conditions or GRID:
        for seed in seeds:
            for preset in presets or GRID.get(condition, CORE[:4]):
                yield Cell(preset, condition, seed)


def by_seed(rows: Sequence[Mapping[str, str]], condition: str, preset: str) -> dict[int, float]:
    """Success of a preset under a condition, by seed."""
    return {
        int(row["seed"]): float(row["success"])
        for row in rows
        if (row["condition"], row["preset"]) == (condition, preset)
    }


def report(rows: Sequence[Mapping[str, str]]) -> list[Table]:
    """Per condition: success, and its difference to SFT seed by seed; what the inspection found.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("There are no results yet: run the grid first, without --report.")
    tables = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        table = Table(
            Column("preset", overflow="fold"),
            "success, %",
            f"minus {BASELINE}, pp",
            "seeds",
            title=f"{condition}: mean ± SE over seeds, differences paired by seed",
        )
        base = by_seed(rows, condition, BASELINE)
        for preset in PRESETS:
            if own := by_seed(rows, condition, preset):
                apart = percent(paired(own, base), "+") if preset != BASELINE else "–"
                table.add_row(preset, percent(estimate(list(own.values()))), apart, str(len(own)))
        tables.append(table)
    found = Table("condition", "seed", "AUC of episodes", "bad ones flagged", "good ones flagged", title="ptr_offline")
    for row in rows:
        if row["auc_episode"] or row["flagged_clean"]:
            found.add_row(
                row["condition"], row["seed"], row["auc_episode"], row["flagged_corrupted"], row["flagged_clean"]
            )
    return [*tables, found] if found.row_count else tables


def figure(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Success by condition: bars are means, lines their standard errors over seeds."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    drawn, (ax,) = board(1, 1, 1.5 + 2.4 * len(conditions), 3.4)
    presets = [name for name in SHOWN if any(row["preset"] == name for row in rows)]
    width = 0.84 / len(presets)
    for place, preset in enumerate(presets):
        own = [estimate(list(by_seed(rows, condition, preset).values())) for condition in conditions]
        x = [number + (place - (len(presets) - 1) / 2) * width for number in range(len(conditions))]
        there = [n for n, item in enumerate(own) if item.seeds]
        ax.bar([x[n] for n in there], [100 * own[n].mean for n in there], width, color=SHOWN[preset], label=preset)
        errors = [100 * own[n].error if own[n].seeds > 1 else 0.0 for n in there]
        ax.errorbar([x[n] for n in there], [100 * own[n].mean for n in there], errors, fmt="none", ecolor=INK)
    ax.set_xticks(range(len(conditions)), conditions)
    ax.set_ylim(0, 105)
    name_axes(ax, "Success on held-out starts", "%, mean ± SE over seeds")
    ax.legend(fontsize=TICK_SIZE, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--track", choices=("states", "pixels"), default="states", help="what policies observe")
    options.add_argument("--presets", nargs="+", choices=PRESETS, metavar="PRESET", help=f"of {', '.join(PRESETS)}")
    options.add_argument("--conditions", nargs="+", metavar="CONDITION", help=f"the grid's: {', '.join(GRID)}")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each (default: 2)")
    options.add_argument("--steps", type=int, help="optimiser steps of a run")
    options.add_argument("--test_starts", type=int, help="held-out starts of every task")
    options.add_argument(
        "--workspace", type=Path, default=Path("outputs/libero"), help="folder for demonstrations, policies and runs"
    )
    options.add_argument("--results", type=Path, help="CSV file (default: results/libero_<track>.csv)")
    options.add_argument("--report", action="store_true", help="print the table of the results and do nothing else")
    return options


def run_grid(given: argparse.Namespace, results: Path) -> None:
    """Record and pretrain what is missing, then train and evaluate every run that is not in the results."""
    if importlib.util.find_spec("libero") is None:
        raise SystemExit(
            "benchmark.py: LIBERO is not installed here. It needs an environment of its own; docs/libero.md has the "
            "commands. --report prints the table of earlier results without it."
        )
    from benchmarks.libero.conditions import CONDITIONS, record_pool
    from benchmarks.libero.run import SETTINGS, pretrained_policy, run

    if unknown := sorted(set(given.conditions or ()) - set(CONDITIONS)):
        raise SystemExit(f"benchmark.py: --conditions {', '.join(unknown)}: choose from {', '.join(CONDITIONS)}.")
    changed = {name: value for name in ("steps", "test_starts") if (value := vars(given)[name])}
    setting = replace(SETTINGS[given.track], **changed)
    workspace = given.workspace / given.track
    done = finished(read(results))
    missing = [
        cell
        for cell in cells(given.presets, given.conditions, given.seeds)
        if (cell.preset, cell.condition, cell.seed) not in done
    ]
    if missing:
        record_pool(setting.pool, workspace)
        for blind in sorted({cell.preset == "blind" for cell in missing}):
            pretrained_policy(setting, workspace, blind)
    at = commit()
    run_all(
        missing,
        partial(run, setting, workspace=workspace),
        lambda rows: append(results, [row | {"commit": at} for row in rows], COLUMNS),
        given.jobs,
    )


def main(argv: list[str]) -> None:
    """Run what is missing, then print the table."""
    given = parser().parse_args(argv)
    results = given.results or Path("results") / f"libero_{given.track}.csv"
    console = PlainConsole()
    if not given.report:
        run_grid(given, results)
    rows = read(results)
    try:
        for table in report(rows):
            console.print(table)
    except ValueError as error:
        raise SystemExit(f"benchmark.py: {error}") from error
    picture = results.parent / "figures" / f"{results.stem}.png"
    picture.parent.mkdir(exist_ok=True)
    console.print(f"picture  {save_figure(figure(rows), picture)}", soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
