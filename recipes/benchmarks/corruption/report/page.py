"""The page about the corruption benchmark: one HTML file with its figures inside, and the same in Markdown."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.corruption.report.document import (
    Block,
    Code,
    Picture,
    Points,
    Section,
    Table,
    Text,
    markdown,
    write_html,
)
from benchmarks.corruption.report.figures import (
    auc_figure,
    difference_figure,
    success_figure,
    sweep_figure,
    weight_figure,
)
from benchmarks.corruption.report.findings import overview, verdict
from benchmarks.corruption.report.presets import PAPER_DYNAMICS, describe
from benchmarks.corruption.report.runs import Runs
from benchmarks.corruption.report.tables import (
    control_differences,
    gap_table,
    kind_table,
    number_table,
    paper_table,
    rare_table,
    score_table,
    sft_differences,
    spell,
    success_table,
)
from benchmarks.corruption.report.variants import (
    ABLATION,
    SEARCH,
    SWEEP,
    ablation_table,
    search_table,
    sweep_points,
    sweep_table,
    variant_conditions,
)
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.figures import dynamics_figure
from ptr_hf.report.files import replacing

PAGE_FILE = "corruption.html"
TITLE = "Does reweighting help when demonstrations are corrupted?"
READING = (
    "A run post-trains a pretrained policy on demonstrations of which a part is corrupted and evaluates it on held-out "
    "starts. A seed decides data, order, noise and starts, so presets are compared seed by seed. Clearly above or below SFT "
    "means that the 95 % confidence interval of the paired difference (Student's t over the seeds) leaves out 0. No "
    "correction is made for the number of comparisons: of twenty differences that do not exist, one is expected to look clear."
)
SUCCESS_CAPTION = (
    "Mean success ± standard error; faint dots are single seeds. Dashed: SFT. Dotted: the oracle, which is told which "
    "episodes are corrupted."
)
DIFFERENCE_CAPTION = "Paired differences to SFT with 95 % intervals; filled markers: the interval leaves out 0."
AUC_CAPTION = (
    "AUC of the weights against the truth: the chance that a corrupted one weighs less than a clean one; 0.5 (dashed) is no "
    "difference, below it the weights are inverted. Circles: episodes; squares: chunks. Hollow: after 25 % of training; "
    "filled: at its end."
)
WEIGHT_CAPTION = (
    "Weights of chunks with a recorded future at the end of training, all seeds together, each row scaled to its own highest "
    "bar. Weights below 0.01 or above 4.5 are not counted."
)
NUMBERS = (
    ("ess", "Effective sample size as a share of the chunks, (Σw)² / (n Σw²); 1 means equal weights."),
    ("weight_at_end", "Mean weight of the episodes' last chunks over that of all others; 1 means no difference."),
    ("corr_motion", "Rank correlation of the weights with how much the robot moves."),
    ("corr_length", "Rank correlation of the episodes' mean weights with their lengths."),
    ("corr_loss", "Rank correlation of the chunks' weights with the policy's own loss."),
)


def write_corruption_report(
    tracks: Sequence[Runs],
    output_dir: str | Path,
    markdown_file: str | Path,
    *,
    conditions: Mapping[str, str] | None = None,
    dynamics: Dynamics | None = None,
    commands: Sequence[str] = (),
    notes: Sequence[str] = (),
    rare_tasks: Mapping[tuple[str, str], Sequence[str]] | None = None,
) -> Path:
    """Write `corruption.html` and `figures/*.png` into a folder, and the Markdown file; returns the page's path.

    Args:
        tracks: the runs of each track, from `read_runs`.
        conditions: condition → what is wrong with its data and how severely.
        dynamics: of PTR runs, to set beside the paper's values; the section is left out without them.
        commands: command lines that made results and page.
        notes: sentences for the head of the page, such as what presets were tuned on.
        rare_tasks: (track, condition) → tasks with few demonstrations, whose success is shown on its own.

    Raises:
        ValueError: there are no runs.
    """
    if not any(runs.items for runs in tracks):
        raise ValueError(
            "The results hold no run yet, so there is nothing to report: run recipes/benchmarks/corruption/benchmark.py."
        )
    folder, text_file = Path(output_dir), Path(markdown_file)
    tracks = [runs for runs in tracks if runs.items]
    sections = [*_head(tracks, conditions or {}, commands, notes)]
    for runs in tracks:
        sections += _track(runs, conditions or {}, rare_tasks or {})
    sections += _dynamics(dynamics) if dynamics is not None else []
    page = write_html(folder / PAGE_FILE, TITLE, sections)
    figures = Path(os.path.relpath(folder / "figures", text_file.parent)).as_posix()
    with replacing(text_file) as temporary:
        temporary.write_text(markdown(TITLE, sections, figures), encoding="utf-8")
    return page


def _head(
    tracks: Sequence[Runs], conditions: Mapping[str, str], commands: Sequence[str], notes: Sequence[str]
) -> Iterator[Section]:
    summary: list[Block] = [Text(READING), *map(Text, notes)]
    for runs in tracks:
        summary += [
            Text(f"Track {runs.track}, {spell(runs.seeds)}:"),
            Points(tuple(overview(runs)) or ("Nothing to compare.",)),
        ]
    yield Section("In short", tuple(summary))
    lines = {name: describe(runs, name) for runs in tracks for name in runs.names if not name.startswith(SWEEP)}
    rows = tuple((name, line.origin, line.text) for name, line in lines.items())
    yield Section("Presets", (Table(("preset", "whose", "what it does"), rows, words=True),))
    used = dict.fromkeys(condition for runs in tracks for condition in runs.conditions)
    severities = tuple((name, conditions.get(name, "no description")) for name in used)
    yield Section("Conditions", (Table(("condition", "share of the episodes and severity"), severities, words=True),))
    yield Section("Runs", tuple(_provenance(tracks, commands)))


def _provenance(tracks: Sequence[Runs], commands: Sequence[str]) -> Iterator[Block]:
    for runs in tracks:
        commits = Counter(run.commit or "unknown" for run in runs.items)
        named = ", ".join(f"{commit} ({count})" for commit, count in commits.items())
        lacking = runs.missing()
        text = f"Track {runs.track}: {len(runs.items)} runs, {spell(runs.seeds)}. Commits (runs): {named}."
        if mixed := runs.mixed():
            text += f" From more than one commit: {', '.join(mixed)}."
        if any(commit.endswith("+") for commit in commits):
            text += " A + marks files that differed from the commit."
        absent, partly = [], []
        for name, cells in lacking.items():
            none = [condition for condition, seeds in cells.items() if seeds == runs.seeds]
            absent += [f"{name} on {', '.join(none)}"] if none else []
            partly += [
                f"{name} on {condition} ({spell(seeds)})" for condition, seeds in cells.items() if seeds != runs.seeds
            ]
        text += f" Not run: {'; '.join(absent)}." if absent else ""
        text += f" Seeds missing: {'; '.join(partly)}." if partly else ""
        yield Text(text)
    if commands:
        yield Code("\n".join(commands))
    yield Text("Every row of the results holds the command that repeats it.")


def _track(
    runs: Runs, conditions: Mapping[str, str], rare_tasks: Mapping[tuple[str, str], Sequence[str]]
) -> Iterator[Section]:
    track = runs.track
    yield Section(f"Track: {track}", (), 2, track)
    for condition in runs.conditions:
        about = f" ({conditions[condition]})" if condition in conditions else ""
        tasks = rare_tasks.get((track, condition), ())
        rare = [rare_table(runs, condition, tasks)] if tasks else []
        yield Section(f"{condition}{about}", (Points(tuple(verdict(runs, condition))), *rare), 3)
    success = Picture(f"corruption_{track}_success", SUCCESS_CAPTION, success_figure(runs))
    difference = Picture(f"corruption_{track}_difference", DIFFERENCE_CAPTION, difference_figure(runs))
    compared: list[Block] = [success, success_table(runs), difference, sft_differences(runs), control_differences(runs)]
    paper = paper_table(runs)
    yield Section("Success", (*compared, gap_table(runs), *([paper] if paper else [])), 3)
    yield Section("Detection of the corrupted data", tuple(_detection(runs)), 3)
    yield Section("Weights", tuple(_weights(runs)), 3)
    yield from _variants(runs)


def _detection(runs: Runs) -> Iterator[Block]:
    figure = auc_figure(runs)
    if figure is None:
        yield Text("Missing: no run has weights that could be compared with the truth.")
        return
    yield Picture(f"corruption_{runs.track}_auc", AUC_CAPTION, figure)
    others = f"{spell(runs.seeds)} where a cell names no others"
    for level in ("episode", "chunk"):
        caption = f"AUC by {level}, mean after 25 % of training → mean ± standard error at its end, {others}."
        table = number_table(runs, f"auc_{level}", caption, runs.corrupted, f"auc_{level}_25")
        yield table or Text(f"AUC by {level}: missing.")
    for found, name in ((kind_table(runs), "AUC by kind of corruption"), (score_table(runs), "AUC of single scores")):
        yield found or Text(f"{name}: missing.")


def _weights(runs: Runs) -> Iterator[Block]:
    figure = weight_figure(runs)
    yield (
        Picture(f"corruption_{runs.track}_weights", WEIGHT_CAPTION, figure) if figure else Text("Histograms: missing.")
    )
    for number, caption in NUMBERS:
        full = f"{caption} Mean ± standard error, {spell(runs.seeds)} where a cell names no others."
        yield number_table(runs, number, full) or Text(f"{caption} Missing: no run measured it.")


def _variants(runs: Runs) -> Iterator[Section]:
    ablated, swept = variant_conditions(runs, ABLATION), variant_conditions(runs, SWEEP)
    blocks: list[Block] = [ablation_table(runs, condition) for condition in ablated]
    for condition in swept:
        found = sweep_points(runs, condition)
        if found:
            name = f"corruption_{runs.track}_sweep_{condition}"
            caption = f"Sweeps on the condition {condition}; filled: the preset's own value. Mean ± standard error."
            blocks += [Picture(name, caption, sweep_figure(runs, condition, found)), sweep_table(runs, condition)]
    blocks += [] if ablated else [Text("Missing: no ablation was run on this track.")]
    blocks += [] if swept else [Text("Missing: no sweep was run on this track.")]
    yield Section("Ablations and sweeps", tuple(blocks), 3)
    searched = variant_conditions(runs, SEARCH)
    if searched:
        yield Section("Our own search", tuple(search_table(runs, condition) for condition in searched), 3)


def _dynamics(dynamics: Dynamics) -> Iterator[Section]:
    """PTR's training beside the paper's: first → last logged values of every run."""
    rows = []
    for column, (meaning, paper) in PAPER_DYNAMICS.items():
        cells = []
        for run in dynamics.runs:
            values = dynamics.column(column, run)
            values = values[values == values]
            cells.append(f"{values[0]:.2f} → {dynamics.tail(column, run):.2f}" if len(values) else "missing")
        rows.append((meaning, paper, *cells))
    caption = "First logged value → mean over the last tenth of training, beside what the paper reports."
    table = Table(("", "paper", *dynamics.runs), tuple(rows), caption)
    picture = Picture("corruption_dynamics", "Training dynamics of PTR in this benchmark.", dynamics_figure(dynamics))
    yield Section("Dynamics beside the paper's", (table, picture))
