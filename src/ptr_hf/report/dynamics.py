"""The training dynamics: one row per logging step, in `ptr_dynamics.parquet`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from ptr_hf.report.files import put_aside, replacing

DYNAMICS_FILE = "ptr_dynamics.parquet"


class Column(NamedTuple):
    """Arrow type, unit and meaning of one column."""

    kind: pa.DataType
    unit: str
    meaning: str


_REAL = pa.float64()

GROUP_FIELDS: dict[str, Column] = {
    "name": Column(pa.string(), "", "of the source or task"),
    "chunks": Column(pa.int64(), "chunks", "chunks that had a say"),
    "targets": Column(pa.int64(), "chunks", "of these, chunks whose future was recorded"),
    "share": Column(_REAL, "fraction", "π(m), share of the chunks"),
    "weight_share": Column(_REAL, "fraction", "q(m), share of the weight in the action loss"),
    "weight": Column(_REAL, "", "mean weight"),
    "score": Column(_REAL, "nats", "mean PTR score T of the chunks with a future"),
    "loss": Column(_REAL, "", "mean action loss, unweighted"),
    "at_floor": Column(_REAL, "fraction", "weights at the lower bound, of the chunks with a future"),
    "at_ceiling": Column(_REAL, "fraction", "weights at the upper bound, of the chunks with a future"),
}
"""What is logged of every source and task in a window; means over nothing are null."""
MOST_TASKS = 64
"""Of more tasks, the ones with the most chunks in the window are logged."""
_GROUPS = pa.list_(pa.struct([(name, field.kind) for name, field in GROUP_FIELDS.items()]))

DYNAMICS_COLUMNS: dict[str, Column] = {
    "step": Column(pa.int64(), "optimiser steps", "training step"),
    "run": Column(pa.string(), "", "name of the configuration: sft, ptr, ..."),
    "loss": Column(_REAL, "", "total loss (Eq. 32)"),
    "loss_action": Column(_REAL, "", "action loss, weighted and self-normalised (Eq. 27)"),
    "loss_identification": Column(_REAL, "nats", "identification loss (Eq. 13)"),
    "loss_ranking": Column(_REAL, "nats", "ranking loss (Eq. 31)"),
    "loss_tokenizer": Column(_REAL, "", "belief regularisation"),
    "grad_norm": Column(_REAL, "", "norm of the gradient before clipping"),
    "learning_rate": Column(_REAL, "", "learning rate of the first parameter group"),
    "accuracy": Column(_REAL, "fraction", "identification accuracy"),
    "candidates": Column(_REAL, "", "candidates per chunk, the match included (|Y|)"),
    "margin": Column(_REAL, "logits", "logit of the match minus the best other"),
    "score": Column(_REAL, "nats", "mean PTR score T (Eq. 14)"),
    "weight_mean": Column(_REAL, "", "mean weight"),
    "weight_min": Column(_REAL, "", "smallest weight"),
    "weight_max": Column(_REAL, "", "largest weight"),
    "weight_at_floor": Column(_REAL, "fraction", "weights at the lower bound"),
    "weight_at_ceiling": Column(_REAL, "fraction", "weights at the upper bound"),
    "effective_sample_size": Column(_REAL, "fraction", "effective sample size"),
    "valid_target_ratio": Column(_REAL, "fraction", "chunks whose future was recorded"),
    "temperature": Column(_REAL, "", "temperature τ"),
    "beta": Column(_REAL, "nats", "weight scale β"),
    "hard_negative_ratio": Column(_REAL, "fraction", "hard-negative ratio ρ"),
    "belief_entropy": Column(_REAL, "nats", "belief assignment entropy H_tok"),
    "belief_diversity": Column(_REAL, "", "belief overlap D_tok"),
    "nonfinite_samples": Column(_REAL, "samples", "samples left out because a value or their loss was not finite"),
    "nonfinite_gradients": Column(_REAL, "steps", "steps left out because their gradient was not finite"),
    "weight_histogram": Column(pa.list_(pa.int64()), "chunks", "weights counted in the bins of weight_bin_edges"),
    "weight_bin_edges": Column(pa.list_(pa.float64()), "", "bin edges, log-spaced between the weight bounds"),
    "sources": Column(_GROUPS, "", "every source of a mixture: GROUP_FIELDS"),
    "tasks": Column(_GROUPS, "", "likewise every task, of more than 64 those with the most chunks"),
    "share_bound": Column(_REAL, "", "factor that q(m) and π(m) differ by at most, either way (Eq. 30)"),
}
_ADDED = ("nonfinite_samples", "nonfinite_gradients", "sources", "tasks", "share_bound")
"""Columns that files of earlier versions lack: read as null."""
DYNAMICS_SCHEMA = pa.schema([(name, column.kind) for name, column in DYNAMICS_COLUMNS.items()])


class WeightCounts(NamedTuple):
    """Weights of some logging steps, counted: `counts (bins,)` between `edges (bins + 1,)`, steps `first..last`."""

    counts: Int[np.ndarray, " bins"]
    edges: Float[np.ndarray, " edges"]
    first_step: int
    last_step: int


def weight_bin_edges(lower: float, upper: float, bins: int = 32) -> Float[np.ndarray, " edges"]:
    """`bins + 1` log-spaced edges whose ends are exactly the weight bounds; equal bounds (α = 0) get a factor of two.

    Raises ValueError unless 0 < lower ≤ upper and bins ≥ 1.
    """
    if not 0.0 < lower <= upper or bins < 1:
        raise ValueError(f"Weight bins need 0 < lower <= upper and bins >= 1, got ({lower}, {upper}, {bins}).")
    if upper / lower < 1.0 + 1e-9:
        lower, upper = lower / 2.0, upper * 2.0
    edges = np.geomspace(lower, upper, bins + 1)
    edges[0], edges[-1] = lower, upper
    return edges


def weight_histogram(
    weight: Float[np.ndarray, " chunks"], edges: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " bins"]:
    """Counts of the finite weights; those a rounding error outside the bounds fall into the end bins."""
    finite = weight[np.isfinite(weight)].astype(np.float64)
    return np.histogram(np.clip(finite, edges[0], edges[-1]), bins=edges)[0].astype(np.int64)


@dataclass(frozen=True)
class Dynamics:
    """The logged rows of one or more runs, `table` in the schema of `DYNAMICS_COLUMNS`."""

    table: pa.Table

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs, in the order of their first row."""
        return tuple(dict.fromkeys(self.table["run"].to_pylist()))

    def steps(self, run: str) -> Int[np.ndarray, " rows"]:
        """Logged steps of a run, ascending."""
        return np.asarray(self._of(run)["step"].to_numpy(), dtype=np.int64)

    def column(self, name: str, run: str) -> Float[np.ndarray, " rows"]:
        """A scalar column of a run; NaN where it was not logged."""
        return np.asarray(self._of(run)[name].to_numpy(), dtype=np.float64)

    def logged(self, name: str, run: str) -> bool:
        """Whether the column holds any finite value for this run."""
        return bool(np.isfinite(self.column(name, run)).any())

    def tail(self, name: str, run: str, share: float = 0.1) -> float:
        """Mean of the finite values in the last `share` of the run's rows (at least one row); NaN without any."""
        values = self.column(name, run)
        values = values[-max(1, round(share * len(values))) :]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else float("nan")

    def without(self, names: Iterable[str], rows: pa.ChunkedArray | None = None) -> "Dynamics":
        """The same with scalar columns left empty, in all rows or in those that are marked."""
        table = self.table
        for name in names:
            place, empty = table.column_names.index(name), pa.nulls(len(table), pa.float64())
            values = empty if rows is None else pc.if_else(rows, empty, table[name])
            table = table.set_column(place, table.schema.field(place), values)
        return Dynamics(table)

    @property
    def identified(self) -> "Dynamics":
        """The same without accuracy, margin and score where nothing was compared, which are logged as zeros there."""
        alone = pc.fill_null(pc.less(self.table["candidates"], 1.0), False)
        return self.without(("accuracy", "margin", "score"), alone)

    def chance(self, run: str) -> float | None:
        """Identification accuracy of guessing at the end of training, 1 / |Y|; None where nothing was compared."""
        candidates = self.tail("candidates", run)
        return 1.0 / candidates if candidates >= 1.0 else None

    def groups(self, name: str, run: str) -> list[list[dict[str, Any]] | None]:
        """Every row's `sources` or `tasks`, each a list of `GROUP_FIELDS`; None where a row logged none."""
        return self._of(run)[name].to_pylist()

    def weight_counts(self, run: str, share: float = 0.1) -> tuple[WeightCounts, WeightCounts] | None:
        """Histograms over the first and the last `share` of the rows whose weights vary; None when none do.

        Rows with all weights equal (the scorer's warm-up, or α = 0) are left out: their histogram is one bar at 1.
        """
        table = self._of(run)
        varied = self.column("weight_max", run) > self.column("weight_min", run)
        rows = [row for row, keep in zip(table.to_pylist(), varied, strict=True) if keep and _has_histogram(row)]
        if not rows:
            return None
        size = max(1, round(share * len(rows)))
        return _count(rows[:size]), _count(rows[-size:])

    def _of(self, run: str) -> pa.Table:
        if run not in self.runs:
            raise ValueError(f"No run {run!r} in these dynamics, expected one of {list(self.runs)}.")
        return self.table.filter(pc.equal(self.table["run"], run)).sort_by("step")

    @staticmethod
    def join(*parts: "Dynamics") -> "Dynamics":
        """The rows of several files together, e.g. an SFT run beside a PTR run; ValueError on a repeated run."""
        names = [run for part in parts for run in part.runs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"The runs {repeated} appear in more than one of the files, give each run its own name.")
        return Dynamics(pa.concat_tables([part.table for part in parts]))


class DynamicsLog:
    """Appends the rows of one run to a dynamics file; after every call the file on disk is complete.

    Rows of other runs in the file stay. Rows of this run stay up to `start_step` (a resumed run logs the later ones
    again); with the default 0 the run starts anew. A damaged file is put aside. Only one process may write: the main one.

    Example:
        log = DynamicsLog(output_dir / DYNAMICS_FILE, run="ptr")
        log.append({"step": 10, "loss": 0.41, "accuracy": 0.12})
    """

    def __init__(self, path: str | Path, run: str = "ptr", start_step: int = 0) -> None:
        self.path = Path(path)
        self.run = run
        self._table = DYNAMICS_SCHEMA.empty_table()
        self._last_step = -1
        if not self.path.exists():
            return
        try:
            table = read_dynamics(self.path).table
        except ValueError as error:
            put_aside(self.path, error)
            return
        mine = pc.equal(table["run"], run)
        # Step 0 resumes nothing, so a fresh run keeps none of an earlier run's rows.
        kept = pc.less_equal(table["step"], start_step if start_step > 0 else -1)
        self._table = table.filter(pc.or_(pc.invert(mine), kept))
        if run in self.dynamics.runs:
            self._last_step = int(self.dynamics.steps(run)[-1])

    @property
    def dynamics(self) -> Dynamics:
        """What the file holds, or will hold after the first append."""
        return Dynamics(self._table)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add rows, columns left out being null and what is no column left out, and replace the file in one move.

        Rows that could not be written (OSError) are kept and written with the next ones. Raises ValueError on a step that does
        not come after the last one.
        """
        last_step, added = self._last_step, []
        for row in rows:
            added.append(self._complete(row, last_step))
            last_step = int(row["step"])
        new = pa.Table.from_pylist(added, schema=DYNAMICS_SCHEMA)
        table = pa.concat_tables([self._table, new]).combine_chunks()
        self._table, self._last_step = table, last_step
        with replacing(self.path) as temporary:
            pq.write_table(table, temporary)

    def _complete(self, row: Mapping[str, Any], last_step: int) -> dict[str, Any]:
        if "step" not in row or int(row["step"]) <= last_step:
            raise ValueError(
                f"A dynamics row needs a step after {last_step}, got {row.get('step')}; "
                "to log a resumed run, open the log with start_step set to the checkpoint's step."
            )
        complete = {name: _plain(row.get(name), column.kind) for name, column in DYNAMICS_COLUMNS.items()}
        return complete | {"run": self.run}


def read_dynamics(path: str | Path) -> Dynamics:
    """Read a dynamics file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another kind of file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No training dynamics at {path}: train first, or give the run's output folder.")
    try:
        # A single file, not a dataset: a folder named run=... above it must not become a column.
        table = pq.ParquetFile(path).read()
        for name in _ADDED:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), DYNAMICS_COLUMNS[name].kind))
        missing = [name for name in DYNAMICS_COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"the columns {missing} are missing")
        table = table.select(list(DYNAMICS_COLUMNS)).cast(DYNAMICS_SCHEMA)
        empty = [name for name in ("step", "run") if table[name].null_count]
        if empty:
            raise ValueError(f"the columns {empty} have empty rows")
    # pyarrow raises its own errors, OSError and ValueError for what it cannot decode
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} is not a PTR dynamics file, or is damaged: {error}. Remove it, or restore it."
        ) from error
    return Dynamics(table)


def _plain(value: Any, kind: pa.DataType) -> Any:
    """Python value of the column's type; accepts 0-d and 1-d arrays and tensors."""
    if value is None or pa.types.is_string(kind):
        return value
    if kind.equals(_GROUPS):
        return [{name: _plain(group.get(name), field.kind) for name, field in GROUP_FIELDS.items()} for group in value]
    if pa.types.is_list(kind):
        convert = int if pa.types.is_integer(kind.value_type) else float
        return [convert(entry) for entry in value]
    return int(value) if pa.types.is_integer(kind) else float(value)


def _has_histogram(row: Mapping[str, Any]) -> bool:
    counts, edges = row["weight_histogram"], row["weight_bin_edges"]
    return bool(counts) and edges is not None and len(edges) == len(counts) + 1


def _count(rows: Sequence[Mapping[str, Any]]) -> WeightCounts:
    """Sum the histograms of the rows that share the last row's bins; a resumed run may have other bounds."""
    edges = rows[-1]["weight_bin_edges"]
    same = [row["weight_histogram"] for row in rows if row["weight_bin_edges"] == edges]
    counts = np.asarray(same, dtype=np.int64).sum(axis=0)
    return WeightCounts(counts, np.asarray(edges, dtype=np.float64), int(rows[0]["step"]), int(rows[-1]["step"]))
