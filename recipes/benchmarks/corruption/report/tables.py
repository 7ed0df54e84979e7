"""The tables of the page; every number comes from the runs, and a cell without one says so."""

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.corruption.report.document import MISSING, Table
from benchmarks.corruption.report.presets import PAPER_SUCCESS, by_origin
from benchmarks.corruption.report.runs import Runs
from benchmarks.corruption.report.statistics import Estimate, estimate, gap_share, paired

POOLED = "mean of the corrupted"


def spell(seeds: Sequence[int]) -> str:
    """Seeds in words: `seeds 0–4`, `seeds 0, 2`, `seed 3`."""
    seeds = sorted(seeds)
    if not seeds:
        return "no seed"
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"seeds {seeds[0]}–{seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def points(found: Estimate) -> str:
    """A difference of success rates in percentage points with its interval."""
    if math.isnan(found.low):
        return f"{signed(found.mean)} (one seed)"
    return f"{signed(found.mean)} ({signed(found.low)} to {signed(found.high)})"


def percent(share: float) -> str:
    """A share of 1 in whole percent; what rounds to 0 has no sign."""
    text = f"{share:.0%}"
    return "0%" if text == "-0%" else text


def signed(share: float) -> str:
    """A share of 1 in percentage points with its sign; what rounds to 0 has none."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def spread(found: Estimate, factor: float = 1.0, digits: int = 2) -> str:
    """Mean ± standard error."""
    mean = f"{factor * found.mean:.{digits}f}"
    return mean if math.isnan(found.se) else f"{mean} ± {factor * found.se:.{digits}f}"


def pivot(
    runs: Runs,
    names: Sequence[str],
    columns: Sequence[str],
    cell: Callable[[str, str], tuple[str, Sequence[int]] | None],
) -> tuple[tuple[str, ...], ...]:
    """A row a name, a column each; cells that rest on other seeds than the track's name theirs."""
    rows = []
    for name in names:
        texts = []
        for column in columns:
            found = cell(name, column)
            usual = found is not None and tuple(found[1]) == runs.seeds
            texts.append(MISSING if found is None else found[0] if usual else f"{found[0]} [{spell(found[1])}]")
        rows.append((name, *texts))
    return tuple(rows)


def success_table(runs: Runs) -> Table:
    """Success in % ± SE."""

    def cell(name: str, condition: str) -> tuple[str, Sequence[int]] | None:
        found = estimate(runs.corrupted_mean(name) if condition == POOLED else runs.success(name, condition))
        return found and (spread(found, 100.0, 1), found.seeds)

    columns = _with_pooled(runs)
    caption = f"Success in % ± standard error. {_seeds(runs)}"
    return Table(("preset", *columns), pivot(runs, runs.presets, columns, cell), caption)


def difference_table(runs: Runs, pairs: Mapping[str, tuple[str, str]], caption: str) -> Table:
    """Paired differences in percentage points; `pairs` is row → (preset, what is taken off)."""

    def cell(row: str, condition: str) -> tuple[str, Sequence[int]] | None:
        sides = pairs[row]
        if condition == POOLED:
            found = paired(*(runs.corrupted_mean(name) for name in sides))
        else:
            found = paired(*(runs.success(name, condition) for name in sides))
        return found and (points(found), found.seeds)

    columns = _with_pooled(runs)
    return Table(("difference", *columns), pivot(runs, tuple(pairs), columns, cell), caption)


def sft_differences(runs: Runs) -> Table:
    """Every preset against SFT."""
    names = [name for name in runs.presets if name != "sft"]
    caption = (
        "Success minus SFT's, paired by seed, in percentage points with 95 % confidence intervals (Student's t). "
        f"The column of the clean data is the cost there. {_seeds(runs)}"
    )
    return difference_table(runs, {name: (name, "sft") for name in names}, caption)


def contrasts(runs: Runs) -> dict[str, tuple[str, str]]:
    """Row → the methods against the controls that matter most, PTR-consequence against small loss first."""
    papers = [name for name in by_origin(runs, "paper") if name != "sft_belief"]
    methods = dict.fromkeys(["ptr_consequence", *by_origin(runs, "ours"), *papers])
    controls = ["small_loss", "small_loss_calibrated", "ptr_consequence_shuffled", "random_weights"]
    controls = [name for name in controls if name == "small_loss" or name in runs.presets]
    return {f"{name} − {control}": (name, control) for control in controls for name in methods}


def control_differences(runs: Runs) -> Table:
    """What the consequence adds to controls that do without it."""
    return difference_table(runs, contrasts(runs), f"The same differences, to controls in place of SFT. {_seeds(runs)}")


def gap_table(runs: Runs) -> Table:
    """Share of the SFT → oracle gap that is closed."""
    columns = runs.corrupted
    names = [name for name in runs.presets if name not in ("sft", "oracle")]

    def cell(name: str, condition: str) -> tuple[str, Sequence[int]] | None:
        found = gap_share(*(runs.success(side, condition) for side in (name, "sft", "oracle")))
        if not found.seeds:
            return None
        if found.reason:
            return found.reason, found.seeds
        return f"{percent(found.share)} ({percent(found.low)} to {percent(found.high)})", found.seeds

    caption = (
        "Share of the gap between SFT and the oracle that is closed, with 95 % intervals (Fieller's, for a ratio of paired "
        f"means). Where the oracle is not clearly above SFT, no share can be told. {_seeds(runs)}"
    )
    return Table(("preset", *columns), pivot(runs, names, columns, cell), caption)


def paper_table(runs: Runs) -> Table | None:
    """PTR minus SFT here and in the paper, for the conditions that the paper has too."""
    names = [name for name in by_origin(runs, "paper") if name != "sft_belief"]
    rows = []
    for condition in runs.conditions:
        if condition not in PAPER_SUCCESS:
            continue
        called, *measured = PAPER_SUCCESS[condition]
        cells = []
        for name in names:
            found = paired(runs.success(name, condition), runs.success("sft", condition))
            cells.append(MISSING if found is None else f"{points(found)} [{spell(found.seeds)}]")
        rows.append((f"{condition} ({called})", *cells, *(f"{ptr - sft:+.1f}" for sft, ptr in measured)))
    caption = (
        "The paper's PTR minus SFT in percentage points, here and in the paper. The paper's benchmarks, policies and severities "
        "are others (its action noise has a standard deviation of 0.1); only the sign and the rough size compare."
    )
    header = ("condition", *(f"{name}, here" for name in names), "paper, LIBERO", "paper, RoboCasa")
    return Table(header, tuple(rows), caption) if rows and names else None


def number_table(
    runs: Runs,
    number: str,
    caption: str,
    columns: Sequence[str] | None = None,
    early: str | None = None,
) -> Table | None:
    """One measured number, mean ± SE; with `early` its mean before that and an arrow. None where no run has it."""
    columns = runs.conditions if columns is None else columns
    names = [name for name in runs.presets if any(runs.values(number, name, condition) for condition in columns)]
    if not names:
        return None

    def cell(name: str, condition: str) -> tuple[str, Sequence[int]] | None:
        found = estimate(runs.values(number, name, condition))
        if found is None:
            return None
        before = estimate(runs.values(early, name, condition)) if early else None
        first = "" if early is None else f"{before.mean:.2f} → " if before else f"{MISSING} → "
        return f"{first}{spread(found)}", found.seeds

    return Table(("preset", *columns), pivot(runs, names, columns, cell), caption)


def kind_table(runs: Runs) -> Table | None:
    """Episode AUC of every kind of corruption, for conditions that mix several; None without any."""
    mixed: list[tuple[str, str]] = []
    for condition in runs.conditions:
        here = [
            kind
            for kind in runs.entries("auc_by_kind")
            if any(runs.values(f"auc_by_kind:{kind}", name, condition) for name in runs.presets)
        ]
        mixed += [(condition, kind) for kind in here if len(here) > 1]
    columns = {f"{condition}: {kind.replace('_', ' ')}": (condition, kind) for condition, kind in mixed}

    def values(name: str, column: str) -> dict[int, float]:
        condition, kind = columns[column]
        return runs.values(f"auc_by_kind:{kind}", name, condition)

    def cell(name: str, column: str) -> tuple[str, Sequence[int]] | None:
        found = estimate(values(name, column))
        return found and (spread(found), found.seeds)

    names = [name for name in runs.presets if any(values(name, column) for column in columns)]
    caption = (
        "Episode AUC by kind of corruption, where a condition mixes several; elsewhere it is the condition's own. An episode "
        f"with two kinds counts for both. {_seeds(runs)}"
    )
    return Table(("preset", *columns), pivot(runs, names, tuple(columns), cell), caption) if columns else None


def score_table(runs: Runs) -> Table | None:
    """Episode AUC of every single score, by the preset whose run computed it; None without any."""
    columns = runs.corrupted
    rows = {
        f"{name}: {score.replace('_', ' ')}": (name, f"auc_by_score:{score}")
        for name in runs.presets
        for score in runs.entries("auc_by_score")
        if any(runs.values(f"auc_by_score:{score}", name, condition) for condition in columns)
    }

    def cell(row: str, condition: str) -> tuple[str, Sequence[int]] | None:
        name, number = rows[row]
        found = estimate(runs.values(number, name, condition))
        return found and (spread(found), found.seeds)

    caption = (
        "Episode AUC of single scores at the end of training, before any map or weight. The same score differs between "
        f"presets because the policy in training does. {_seeds(runs)}"
    )
    return Table(("preset: score", *columns), pivot(runs, tuple(rows), columns, cell), caption) if rows else None


def rare_table(runs: Runs, condition: str, tasks: Sequence[str]) -> Table:
    """Success on the tasks that have few demonstrations, and on the others."""
    others = [task for task in runs.entries("by_task") if task not in tasks]
    rows = []
    for name in runs.presets:
        if not runs.success(name, condition):
            continue
        cells = []
        for group in (tasks, others):
            values = runs.task_mean(name, condition, group)
            found, change = estimate(values), paired(values, runs.task_mean("sft", condition, group))
            cells.append(MISSING if found is None else f"{spread(found, 100.0, 1)} [{spell(found.seeds)}]")
            cells.append("" if name == "sft" else MISSING if change is None else points(change))
        rows.append((name, *cells))
    caption = (
        f"The tasks with few demonstrations ({', '.join(tasks)}) apart from the others: success in % ± standard error, and its "
        "paired difference to SFT in pp with a 95 % interval."
    )
    header = ("preset", "rare tasks", "difference to SFT", "other tasks", "difference to SFT")
    return Table(header, tuple(rows), caption)


def _with_pooled(runs: Runs) -> tuple[str, ...]:
    """The conditions, and their mean where there is more than one to take it of."""
    return (*runs.conditions, POOLED) if len(runs.corrupted) > 1 else runs.conditions


def _seeds(runs: Runs) -> str:
    return f"{spell(runs.seeds).capitalize()} where a cell names no others."
