"""Runs called `ablation:no_belief` or `sweep:temperature=0.03` beside the paper's Table 5, and our own `search:…`."""

from typing import Any, NamedTuple

from benchmarks.corruption.report.document import MISSING, Table
from benchmarks.corruption.report.presets import PAPER_ABLATIONS
from benchmarks.corruption.report.runs import Runs
from benchmarks.corruption.report.statistics import Estimate, estimate, paired
from benchmarks.corruption.report.tables import points, spell, spread
from ptr_hf.hyperparameters import DEFAULTS
from ptr_hf.presets import PRESETS

ABLATION, SWEEP, SEARCH = "ablation:", "sweep:", "search:"
SAME_AS = {"no_belief": "ptr_no_belief", "alpha_0": "sft_belief"}
"""Ablations of the paper that the grid runs under another name."""


class SweepPoint(NamedTuple):
    """One value of a swept setting; `run` is what its runs are called, those of `base` at its own value."""

    setting: str
    value: float
    run: str
    base: str


def variant_conditions(runs: Runs, prefix: str) -> tuple[str, ...]:
    """The conditions that have runs of this kind; ablations may go by another name beside PTR."""

    def there(condition: str) -> bool:
        others = [*SAME_AS.values()] if prefix == ABLATION and runs.success("ptr", condition) else []
        return bool(_names(runs, prefix, condition)) or any(runs.success(name, condition) for name in others)

    return tuple(filter(there, runs.conditions))


def ablation_table(runs: Runs, condition: str) -> Table:
    """What each part is worth here and in the paper; an ablation of the paper that was not run is said to be missing."""
    names = {part: name for part, name in SAME_AS.items() if runs.success(name, condition)}
    names |= {name.removeprefix(ABLATION): name for name in _names(runs, ABLATION, condition)}
    compared = {
        part: "ptr" if name == "sft_belief" else reference(runs, name, condition) for part, name in names.items()
    }
    rows = []
    for full in dict.fromkeys(["ptr", *compared.values()]):
        success = estimate(runs.success(full, condition))
        rows.append((f"full: {full}", _cell(success), "", "", *_paper("full" if full == "ptr" else "")))
    for part in dict.fromkeys([*PAPER_ABLATIONS, *names]):
        if part == "full":
            continue
        values = runs.success(names[part], condition) if part in names else {}
        full = compared.get(part, "")
        change = paired(values, runs.success(full, condition))
        name = f"{part} ({names[part]})" if part in names and not names[part].startswith(ABLATION) else part
        rows.append((name, _cell(estimate(values)), full, MISSING if change is None else points(change), *_paper(part)))
    caption = (
        f"Ablations on the condition {condition}: success in % ± SE, and its paired difference to the full method in pp with "
        "a 95 % interval. Beside it the paper's Table 5, measured on clean data of other benchmarks: success in %, in "
        "brackets the difference to its full method."
    )
    header = ("ablation", "success here", "full method", "difference to it", "paper, LIBERO", "paper, RoboCasa")
    return Table(header, tuple(rows), caption)


def sweep_points(runs: Runs, condition: str) -> tuple[SweepPoint, ...]:
    """The swept values that are numbers, with the base preset's own, by setting and value."""
    found = set()
    for name in _names(runs, SWEEP, condition):
        setting, _, text = name.removeprefix(SWEEP).partition("=")
        base = reference(runs, name, condition)
        own = _number(_setting(runs, base, setting))
        if (value := _number(text)) is not None:
            found.add(SweepPoint(setting, value, name, base))
        if own is not None and runs.success(base, condition):
            found.add(SweepPoint(setting, own, base, base))
    return tuple(sorted(found))


def sweep_table(runs: Runs, condition: str) -> Table:
    """Success at every swept value, and its difference to the preset's own value."""
    rows = []
    for point in sweep_points(runs, condition):
        success = estimate(runs.success(point.run, condition))
        change = paired(runs.success(point.run, condition), runs.success(point.base, condition))
        own = point.run == point.base
        rows.append(
            (
                f"{point.setting} = {point.value:g}" + (f" ({point.base}'s own)" if own else ""),
                _cell(success),
                "" if own else MISSING if change is None else points(change),
            )
        )
    caption = (
        f"Sweeps on the condition {condition}: success in % ± SE, and its paired difference to the preset's own value in pp "
        "with a 95 % interval. The paper sweeps the same settings in its Figure 10."
    )
    return Table(("setting", "success", "difference"), tuple(rows), caption)


def search_table(runs: Runs, condition: str) -> Table:
    """What was tried around our presets: each beside SFT and beside the preset that it changes."""
    rows = []
    for name in _names(runs, SEARCH, condition):
        values, full = runs.success(name, condition), reference(runs, name, condition)
        changes = [paired(values, runs.success(other, condition)) for other in ("sft", full)]
        told = [MISSING if change is None else points(change) for change in changes]
        rows.append((name.removeprefix(SEARCH), _cell(estimate(values)), told[0], full, told[1]))
    caption = (
        f"Our own search on the condition {condition}: success in % ± SE, and its paired differences to SFT and to the preset "
        "that was changed, in pp with 95 % intervals."
    )
    return Table(("tried", "success", "difference to SFT", "changed preset", "difference to it"), tuple(rows), caption)


def reference(runs: Runs, name: str, condition: str) -> str:
    """Whom runs of this name are compared with: of the preset's own runs those that share most of the changed options."""
    run = next(run for run in runs.items if run.preset == name)
    best, shared = run.base, -1
    for other in (run for run in runs.items if run.condition == condition and run.preset in runs.presets):
        missing = object()
        within = all(run.options.get(key, missing) == value for key, value in other.options.items())
        if other.base == run.base and within and shared < len(other.options) < len(run.options):
            best, shared = other.preset, len(other.options)
    return best


def _names(runs: Runs, prefix: str, condition: str) -> tuple[str, ...]:
    return tuple(name for name in runs.names if name.startswith(prefix) and runs.success(name, condition))


def _setting(runs: Runs, name: str, setting: str) -> Any:
    """The value of one hyperparameter in runs of this name; None where there is no such."""
    run = next((run for run in runs.items if run.preset == name), None)
    base, options = (name, {}) if run is None else (run.base, run.options)
    preset = PRESETS[base].fields if base in PRESETS else {}
    return {**DEFAULTS, **preset, **options}.get(setting)


def _cell(found: Estimate | None) -> str:
    return MISSING if found is None else f"{spread(found, 100.0, 1)} [{spell(found.seeds)}]"


def _paper(part: str) -> tuple[str, ...]:
    """The paper's success without this part, and the difference to its full method."""
    paper, full = PAPER_ABLATIONS.get(part), PAPER_ABLATIONS["full"]
    if paper is None:
        return "–", "–"
    return tuple(f"{paper[i]:.1f}" + (f" ({paper[i] - full[i]:+.1f})" if part != "full" else "") for i in (0, 1))


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
