"""One policy for five arms, or one for each? Post-training with and without PTR on robosuite's Lift.

Panda, Sawyer, UR5e, IIWA and Kinova3 lift a cube. Each writes its actions in a convention of its own, and on two of them half
of the demonstrations are by operators of bad quality. Policies read states, in one condition also a camera that stands
elsewhere for every arm (drawn by a headless GL, by default MUJOCO_GL=egl). A specialist learns one arm, a
generalist the mixture of all five; both see as many samples of an arm. Every seed decides data, weights, order and held-out
starts, so presets are compared seed by seed.

robosuite 1.5.2 pins packages that LeRobot cannot live with, so it has an environment of its own (docs/embodiment.md):

    python3.12 -m venv .venv-robosuite && .venv-robosuite/bin/pip install -c constraints.txt -e .
    .venv-robosuite/bin/pip install --no-deps -r recipes/benchmarks/embodiment/robosuite.txt
    .venv-robosuite/bin/python recipes/benchmarks/embodiment/benchmark.py --jobs 2

Results go to `results/embodiment.csv`, a row a run and arm, as they come in; the grid goes on where it stopped. The table is
printed at the end, or by `--report` alone, which needs no robosuite; a picture lies in `figures/` beside the results.
"""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    board,
    name_axes,
    save_figure,
)

COLUMNS = ("preset", "condition", "arm", "seed", "success", "share", "commit", "command")
BASELINE = "generalist_sft"
MEAN = "mean"
GENERALISTS = ("sft", "ptr_offline", "ptr", "ptr_calibrated", "small_loss", "random_weights", "oracle")
SPECIALISTS = ("sft", "ptr", "ptr_calibrated")
PRESETS = (*(f"generalist_{name}" for name in GENERALISTS), *(f"specialist_{name}" for name in SPECIALISTS))
GRID: Mapping[str, tuple[str, ...]] = {
    "uneven": PRESETS,
    # what weighing costs where there is nothing to reject; an oracle of clean data is SFT
    "clean": (*(f"generalist_{name}" for name in GENERALISTS[:5]), "specialist_sft"),
    # pictures cost several times as much
    "uneven_cameras": (*(f"generalist_{name}" for name in GENERALISTS), "specialist_sft"),
}
"""Condition by condition, seed by seed, so that an interrupted grid lacks conditions and seeds but no presets."""
SHOWN: Mapping[str, str] = {
    "specialist_sft": FAINT,
    "generalist_sft": GREY,
    "generalist_random_weights": PINK,
    "generalist_ptr": SKY,
    "generalist_small_loss": ORANGE,
    "generalist_ptr_calibrated": INK,
    "generalist_ptr_offline": BLUE,
    "generalist_oracle": GREEN,
}
"""Presets in the picture, with their colours."""


WIDE = 140
"""Columns of the tables where they go into a file or a pipe, which have no width."""


def cells(presets: Sequence[str] | None, conditions: Sequence[str] | None, seeds: Sequence[int]) -> Iterator[Any]:
    """The runs that were asked for, in the order of the grid."""
    from benchmarks.embodiment.run import Cell

    for condition in conditions or GRID:
        for seed in seeds:
            for preset in presets or GRID[condition]:
                yield Cell(preset, condition, seed)


# ---- the table -------------------------------------------------------------------------------------------------------


def by_seed(rows: Sequence[Mapping[str, str]], condition: str, preset: str, arm: str, column: str) -> dict[int, float]:
    """A preset's values of an arm, or their mean over the arms that it ran on, by seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["condition"], row["preset"]) == (condition, preset) and arm in (MEAN, row["arm"]):
            found.setdefault(int(row["seed"]), []).append(float(row[column]))
    return {seed: sum(values) / len(values) for seed, values in sorted(found.items())}


def report(rows: Sequence[Mapping[str, str]]) -> list[Table]:
    """Per condition: success, its difference to generalist SFT, and shares of the weight; by arm and in the mean.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("There are no results yet: run the grid first, without --report.")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    tables = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        presets = [name for name in PRESETS if by_seed(rows, condition, name, MEAN, "success")]
        success = Table(_presets(), *arms, MEAN, "seeds", title=f"{condition}: success in %, mean ± SE over seeds")
        difference = Table(
            _presets(), *arms, MEAN, "seeds", title=f"{condition}: minus {BASELINE}, in pp, paired by seed, mean ± SE"
        )
        weight = Table(_presets(), *arms, title=f"{condition}: share of the weight q(m) in %, mean ± SE")
        for preset in presets:
            values = {arm: by_seed(rows, condition, preset, arm, "success") for arm in (*arms, MEAN)}
            base = {arm: by_seed(rows, condition, BASELINE, arm, "success") for arm in (*arms, MEAN)}
            own = [estimate(list(values[arm].values())) for arm in (*arms, MEAN)]
            success.add_row(preset, *(percent(item) for item in own), str(own[-1].seeds))
            if preset != BASELINE:
                apart = [paired(values[arm], base[arm]) for arm in (*arms, MEAN)]
                difference.add_row(preset, *(percent(item, "+") for item in apart), str(apart[-1].seeds))
            if preset.startswith("generalist_"):
                q = [estimate(list(by_seed(rows, condition, preset, arm, "share").values())) for arm in arms]
                weight.add_row(preset, *(percent(item) for item in q))
        tables += [success, difference, weight]
    return tables


def figure(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Success by arm and in the mean, a panel a condition: bars are means, lines their standard errors over seeds."""
    arms = [*dict.fromkeys(row["arm"] for row in rows), MEAN]
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    drawn, axes = board(len(conditions), 1, 11.0, 3.3 * len(conditions))
    for ax, condition in zip(axes, conditions, strict=True):
        presets = [name for name in SHOWN if by_seed(rows, condition, name, MEAN, "success")]
        width = 0.84 / len(presets)
        for place, preset in enumerate(presets):
            own = [estimate(list(by_seed(rows, condition, preset, arm, "success").values())) for arm in arms]
            x = [number + (place - (len(presets) - 1) / 2) * width for number in range(len(arms))]
            errors = [0.0 if math.isnan(item.error) else 100 * item.error for item in own]
            ax.bar(x, [100 * item.mean for item in own], width, color=SHOWN[preset], label=preset)
            ax.errorbar(x, [100 * item.mean for item in own], errors, fmt="none", ecolor=INK, elinewidth=1.0)
        ax.set_xticks(range(len(arms)), arms)
        ax.set_ylim(0, 105)
        name_axes(ax, condition, "success in %, mean ± SE over seeds")
        ax.legend(
            fontsize=TICK_SIZE, frameon=False, labelcolor=INK, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return drawn


def _presets() -> Column:
    """The first column; in a narrow window names go on in the next line, since shortened ones could not be told apart."""
    return Column("preset", overflow="fold")


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--presets", nargs="+", choices=PRESETS, metavar="PRESET", help=f"of {', '.join(PRESETS)}")
    options.add_argument("--conditions", nargs="+", choices=tuple(GRID), help="all by default")
    options.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2, 3, 4],
        help="each decides data, weights, order and test starts",
    )
    options.add_argument("--jobs", type=int, default=2, help="runs at the same time, one core each (default: 2)")
    options.add_argument("--steps", type=int, help="optimiser steps of a generalist; a specialist has a fifth of them")
    options.add_argument("--test_starts", type=int, help="held-out starts of every arm")
    options.add_argument(
        "--workspace", type=Path, default=Path("outputs/embodiment"), help="folder for demonstrations and runs"
    )
    options.add_argument("--results", type=Path, help="CSV file (default: results/embodiment.csv)")
    options.add_argument("--report", action="store_true", help="print the table of the results and do nothing else")
    options.add_argument("--smoke", action="store_true", help="a run of minutes that shows that everything works")
    return options


def main(argv: list[str]) -> None:
    """Record once, then run what is missing, then print the table."""
    given = parser().parse_args(argv)
    results = given.results or Path("outputs/embodiment_smoke.csv" if given.smoke else "results/embodiment.csv")
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = PlainConsole(width=WIDE if piped else None)
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


def run_grid(given: argparse.Namespace, results: Path) -> None:
    """Record what is missing, then train and evaluate every run that is not in the results."""
    if importlib.util.find_spec("robosuite") is None:
        raise SystemExit(
            "benchmark.py: robosuite is not installed here. It needs an environment of its own; "
            "docs/embodiment.md has the commands. --report prints the table of earlier results without it."
        )
    from benchmarks.embodiment.data import CONDITIONS, Pool, condition_mixture, record_all
    from benchmarks.embodiment.run import Setting, run
    from benchmarks.quiet import be_quiet

    settings: dict[str, Any] = {name: value for name in ("steps", "test_starts") if (value := vars(given)[name])}
    presets, conditions, seeds, workspace = given.presets, given.conditions, given.seeds, given.workspace
    if given.smoke:
        settings = {"pool": Pool(recorded=6, used=6), "steps": 50, "test_starts": 1, "test_steps": 16} | settings
        presets, conditions = presets or ["generalist_ptr", "specialist_sft"], conditions or ["uneven"]
        seeds, workspace = seeds[:1], workspace / "smoke"
    setting = Setting(**settings)
    done = finished(read(results))
    missing = [
        cell for cell in cells(presets, conditions, seeds) if (cell.preset, cell.condition, cell.seed) not in done
    ]
    if missing:
        record_all(setting.pool, workspace, given.jobs, any(CONDITIONS[cell.condition].cameras for cell in missing))
    be_quiet()
    for condition, seed in dict.fromkeys((cell.condition, cell.seed) for cell in missing):
        condition_mixture(setting.pool, workspace, condition, seed)  # written here: the runs share them
    at = commit()
    run_all(
        missing,
        partial(run, setting, workspace=workspace),
        lambda rows: append(results, [row | {"commit": at} for row in rows], COLUMNS),
        given.jobs,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
