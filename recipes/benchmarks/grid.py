"""What the benchmarks' grids of runs share: results that grow a row at a time, runs side by side, means over seeds."""

import csv
import math
import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, NaN for a single seed."""

    mean: float
    error: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error: the standard deviation (n - 1) over √n."""
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, 0)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Estimate:
    """The difference one - other over the seeds that both have."""
    return estimate([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def percent(item: Estimate, sign: str = "") -> str:
    """A share as a cell of a table; ``+`` for a difference."""
    if not item.seeds:
        return "–"
    error = "" if math.isnan(item.error) else f" ± {100 * item.error:.1f}"
    return f"{round(100 * item.mean, 1) + 0.0:{sign}.1f}{error}"  # + 0.0: no negative zero


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the results; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def finished(rows: Sequence[Mapping[str, str]]) -> set[tuple[str, str, int]]:
    """The runs that are in the results already: preset, condition and seed."""
    return {(row["preset"], row["condition"], int(row["seed"])) for row in rows}


def append(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Add a run's rows, and the header to a new file; one with fewer columns gets those that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and len(path.open().readline().split(",")) < len(columns):
        older = read(path)
        path.unlink()
        append(path, older, columns)
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="raise", lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def run_all[Cell](
    cells: Sequence[Cell],
    run: Callable[[Cell], list[dict[str, Any]]],
    keep: Callable[[list[dict[str, Any]]], None],
    jobs: int,
) -> None:
    """Make every run in processes of their own, and keep each one's rows as they come in.

    Raises:
        SystemExit: some runs failed; the others are kept.
    """
    failures = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool, tqdm(total=len(cells), unit="run") as bar:
        futures = {pool.submit(run, cell): cell for cell in cells}
        for future in as_completed(futures):
            try:
                rows = future.result()
                keep(rows)
                success = sum(float(row["success"]) for row in rows) / len(rows)
                bar.set_postfix_str(
                    f"{' '.join(str(rows[0][key]) for key in ('preset', 'condition', 'seed'))}: {success:.3f}"
                )
            except Exception:
                failures += 1
                tqdm.write(f"{futures[future]} failed:\n{traceback.format_exc()}")
            bar.update()
    if failures:
        raise SystemExit(f"benchmark.py: {failures} runs failed; the same command tries them again.")
