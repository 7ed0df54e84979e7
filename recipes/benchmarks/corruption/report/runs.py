"""The runs of the corruption benchmark, as `recipes/benchmarks/corruption/benchmark.py` writes them: a CSV file, a row a run."""

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ptr_hf.presets import PRESETS

KEYS = ("preset", "condition", "seed", "success")
NUMBERS = (
    *("success", "auc_chunk", "auc_episode", "auc_chunk_25", "auc_episode_25"),
    *("ess", "weight_at_end", "corr_motion", "corr_length", "corr_loss"),
)
NAMED_NUMBERS = ("by_task", "auc_by_kind", "auc_by_score")
VARIANTS = ("ablation:", "sweep:", "search:")
BIN_EDGES = np.geomspace(0.01, 4.5, 21)
"""Edges of the bins that the column `histogram` counts weights in."""


@dataclass(frozen=True)
class Run:
    """One run. `numbers` holds what was measured, a JSON column's entries as `auc_by_kind:noise`; what is missing is not in.

    `base` and `options` are the preset that was trained and what was changed in it; `preset` is what the run is called.
    """

    preset: str
    condition: str
    seed: int
    numbers: Mapping[str, float]
    histogram: tuple[float, ...] = ()
    base: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""
    command: str = ""


@dataclass(frozen=True)
class Runs:
    """The runs of one track (`state` or `pixels`)."""

    track: str
    items: tuple[Run, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the runs are called: SFT first, the oracle last, what has other options behind the preset it changes."""
        found = {run.preset: run for run in reversed(self.items)}
        order = ["sft", *(name for name in PRESETS if name not in ("sft", "oracle")), "oracle"]
        places = {name: place for place, name in enumerate(order)}
        last = len(order) - 2
        return tuple(sorted(found, key=lambda name: (places.get(found[name].base, last), name not in PRESETS, name)))

    @property
    def presets(self) -> tuple[str, ...]:
        """The names without those of ablations, sweeps and the search."""
        return tuple(name for name in self.names if not name.startswith(VARIANTS))

    @property
    def conditions(self) -> tuple[str, ...]:
        """In the order they came, the clean data first."""
        found = dict.fromkeys(run.condition for run in self.items)
        return tuple(sorted(found, key=lambda name: name != "clean"))

    @property
    def corrupted(self) -> tuple[str, ...]:
        """The conditions without the clean data."""
        return tuple(condition for condition in self.conditions if condition != "clean")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.items}))

    def of(self, preset: str, condition: str) -> tuple[Run, ...]:
        """The runs of a cell, by seed."""
        found = (run for run in self.items if (run.preset, run.condition) == (preset, condition))
        return tuple(sorted(found, key=lambda run: run.seed))

    def values(self, number: str, preset: str, condition: str) -> dict[int, float]:
        """Seed → a measured number; seeds without it are left out."""
        return {run.seed: run.numbers[number] for run in self.of(preset, condition) if number in run.numbers}

    def success(self, preset: str, condition: str) -> dict[int, float]:
        """Seed → success on held-out starts, in [0, 1]."""
        return self.values("success", preset, condition)

    def corrupted_mean(self, preset: str) -> dict[int, float]:
        """Seed → mean success over the corrupted conditions, for seeds that ran all of them."""
        return _mean_of([self.success(preset, condition) for condition in self.corrupted])

    def task_mean(self, preset: str, condition: str, tasks: Sequence[str]) -> dict[int, float]:
        """Seed → mean success over some of the tasks, for seeds that have all of them."""
        return _mean_of([self.values(f"by_task:{task}", preset, condition) for task in tasks])

    def entries(self, column: str) -> tuple[str, ...]:
        """Names of the entries of a JSON column, in the order they came."""
        names = (name for run in self.items for name in run.numbers if name.startswith(f"{column}:"))
        return tuple(dict.fromkeys(name.removeprefix(f"{column}:") for name in names))

    def histogram(self, preset: str, condition: str) -> Float[np.ndarray, " bins"] | None:
        """Share of the counted weights in every bin of `BIN_EDGES`, all seeds together; None where none were counted."""
        counts = [run.histogram for run in self.of(preset, condition) if len(run.histogram) == len(BIN_EDGES) - 1]
        total = np.sum(counts, axis=0, dtype=np.float64) if counts else np.zeros(1)
        return total / total.sum() if total.sum() > 0 else None

    def mixed(self) -> tuple[str, ...]:
        """Names whose runs come from more than one commit."""
        return tuple(name for name in self.names if len({run.commit for run in self.items if run.preset == name}) > 1)

    def missing(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Preset → condition → the seeds without a run."""
        lacking: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in self.presets:
            for condition in self.conditions:
                if seeds := tuple(sorted(set(self.seeds) - set(self.success(name, condition)))):
                    lacking.setdefault(name, {})[condition] = seeds
        return lacking


def read_runs(path: str | Path) -> Runs:
    """Read `corruption_<track>.csv`; empty cells are missing numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a needed column is missing, a cell holds no number, or a run is in the file twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no results at {path}: run recipes/benchmarks/corruption/benchmark.py first."
        )
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in KEYS if name not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path} is no result of recipes/benchmarks/corruption/benchmark.py: it lacks the columns {lacking}."
            )
        runs: dict[tuple[str, str, int], Run] = {}
        for row in reader:
            cells = {name: value or "" for name, value in row.items() if name is not None}
            try:
                run = _run(cells)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {reader.line_num}, cannot be read: {error}.") from error
            key = run.preset, run.condition, run.seed
            if key in runs:
                raise ValueError(f"{path}, line {reader.line_num}: the run {key} is there twice; drop one of the two.")
            runs[key] = run
    return Runs(path.stem.removeprefix("corruption_"), tuple(runs.values()))


def _mean_of(columns: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Mean over the columns, for the seeds that all of them have."""
    complete = set.intersection(*(set(column) for column in columns)) if columns else set()
    return {seed: sum(column[seed] for column in columns) / len(columns) for seed in sorted(complete)}


def _run(row: Mapping[str, str]) -> Run:
    numbers = {name: float(row[name]) for name in NUMBERS if row.get(name)}
    for column in NAMED_NUMBERS:
        entries = json.loads(row[column]) if row.get(column) else {}
        numbers |= {f"{column}:{name}": float(value) for name, value in entries.items() if value is not None}
    options = _options(row.get("command", ""))
    return Run(
        preset=row["preset"],
        condition=row["condition"],
        seed=int(row["seed"]),
        numbers={name: value for name, value in numbers.items() if math.isfinite(value)},
        histogram=tuple(map(float, json.loads(row["histogram"]))) if row.get("histogram") else (),
        base=str(options.pop("preset", row["preset"] if row["preset"] in PRESETS else "ptr")),
        options=options,
        commit=row.get("commit", ""),
        command=row.get("command", ""),
    )


def _options(command: str) -> dict[str, Any]:
    """What the command gives as `--run`: the preset and the options of the method that differ from it."""
    words: Sequence[str] = shlex.split(command)
    return dict(json.loads(words[words.index("--run") + 1])) if "--run" in words[:-1] else {}
