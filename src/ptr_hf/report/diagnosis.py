"""The diagnosis of a dataset as a page: tables, figures and advice; the same sections are shown on the terminal."""

import base64
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text as Words

from ptr_hf.diagnosis import RULES, Advice, Diagnosis, Interval
from ptr_hf.diagnosis.diagnose import ACTIONS, INSTRUCTIONS, LOSS
from ptr_hf.report.corruption.document import Block, Picture, Points, Section, Table, Text
from ptr_hf.report.files import replacing
from ptr_hf.report.page import page_templates
from ptr_hf.report.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    TEXT_SIZE,
    VERMILION,
    board,
    legend,
    name_axes,
    save_figure,
)
from ptr_hf.report.text import visible

DIAGNOSIS_FILE, PAGE_FILE = "diagnosis.json", "diagnosis.html"
LOWEST = 10
"""Episodes at the bottom that the terminal shows; the page shows `LISTED`."""
LISTED = 40
LABELS = {
    ACTIONS: "T_a",
    INSTRUCTIONS: "T_l",
    LOSS: "−loss",
    "motion": "motion",
    "length": "length",
}
COLOURS = (BLUE, GREEN, GREY)
NAMED = {ACTIONS: "actions (T_a)", INSTRUCTIONS: "instructions (T_l)"}
MEANING = (
    "Consequences are embedded by the policy's vision features (a policy without cameras: by its state), with the policy "
    "frozen. Small heads are asked which of the other chunks' actions (T_a), and which of the dataset's instructions (T_l), "
    "belongs to what happened between a chunk's start and the observation that followed. Two folds of episodes: each is judged "
    "by a head that has learned from the other. Verdicts are in nats above a guess: 0 is chance, log 2 = 0.69 twice as likely."
)
PREVIEW = (
    "Weights as the presets would give them on these verdicts, mean 1. A training run goes on learning, and its loss is that "
    "of a policy that has learned from this data, so its weights will differ. The loss of random weights is left out."
)


def sections(diagnosis: Diagnosis, advice: Advice) -> list[Section]:
    """The page from top to bottom; sections of level 3 are left out on the terminal."""
    effects = {effect.preset: effect for effect in diagnosis.effects}
    worst = _worst(diagnosis)
    found = [
        Section(advice.headline, (Points(advice.sentences),)),
        Section("Are consequences identifiable?", (_identifiability(diagnosis), *_detection(diagnosis))),
        Section(
            "In pictures", (Picture("identifiability", IDENTIFIABILITY_CAPTION, identifiability_figure(diagnosis)),), 3
        ),
        Section("What the scores agree on", (_correlations(diagnosis), Text(_agreement(diagnosis)))),
        Section(f"The {min(LOWEST, len(worst))} episodes that lie lowest", (_episodes(diagnosis, worst[:LOWEST]),)),
        Section("How much weight would move", (_effects(diagnosis), Text(PREVIEW))),
        Section("In pictures", (Picture("weights", WEIGHTS_CAPTION, weights_figure(diagnosis)),), 3),
        *(Section(f"Shares under {name}", (_shares(diagnosis, name),), 3) for name in effects),
        Section("More episodes, from the lowest up", (_episodes(diagnosis, worst[:LISTED]),), 3),
        Section("How it was measured", (Text(MEANING),), 3),
        Section("The rules", (Table(("rule", "reason"), RULES, words=True),), 3),
    ]
    return found


def write_diagnosis(diagnosis: Diagnosis, advice: Advice, output_dir: str | Path) -> Path:
    """Write `diagnosis.json`, `diagnosis.html` and `figures/*.png` into a folder, and return the page's path."""
    folder = Path(output_dir)
    content = {"advice": asdict(advice), **asdict(diagnosis), "rules": [{"rule": a, "reason": b} for a, b in RULES]}
    with replacing(folder / DIAGNOSIS_FILE) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page, pictures = sections(diagnosis, advice), {}
    for block in (block for section in page for block in section.blocks):
        if isinstance(block, Picture):
            path = save_figure(block.figure, folder / "figures" / f"{block.name}.png", dpi=110)
            pictures[block.name] = base64.b64encode(path.read_bytes()).decode("ascii")
    environment = page_templates()
    title = f"Will reweighting help on {diagnosis.source}?"
    text = environment.get_template("corruption.html.j2").render(title=title, sections=page, pictures=pictures)
    with replacing(folder / PAGE_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / PAGE_FILE


def show(diagnosis: Diagnosis, advice: Advice, console: Console) -> None:
    """The page's main sections on a terminal."""
    for section in sections(diagnosis, advice):
        if section.level > 2:
            continue
        console.rule(_words(section.title), align="left")
        for block in section.blocks:
            _show(block, console)


def _show(block: Block, console: Console) -> None:
    match block:
        case Text():
            console.print(_words(block.text))
        case Points():
            for item in block.items:
                console.print(_words(f"• {item}"))
        case Table():
            table = TerminalTable(title=_words(block.caption) if block.caption else None, title_justify="left")
            for place, name in enumerate(block.header):
                table.add_column(_words(name), justify="left" if block.words or place == 0 else "right")
            for row in block.rows:
                table.add_row(*map(_words, row))
            console.print(table)


def _words(text: str) -> Words:
    """Text for a terminal as it is: brackets are no markup, and control characters are left out."""
    return Words(visible(text))


def _identifiability(diagnosis: Diagnosis) -> Table:
    header = (
        "",
        "nats above chance",
        "another's label",
        "without its future",
        "the future adds",
        "accuracy",
        "chance",
    )
    rows = []
    for name, of in diagnosis.identifiability.items():
        nats = [_interval(of.nats), _number(of.null), _interval(of.without_future), _interval(of.gain)]
        share = [_interval(of.accuracy, percent=True), _percent(of.chance)]
        rows.append((NAMED[name], *nats, *share))
    return Table(header, tuple(rows), "Of the typical (median) episode, with 95 % confidence intervals.")


def _detection(diagnosis: Diagnosis) -> tuple[Block, ...]:
    if not diagnosis.detection:
        return ()
    rows = tuple((LABELS.get(name, name), _number(auc)) for name, auc in diagnosis.detection.items())
    told = (
        f"The truth about this data is known: {diagnosis.confirmed} of the {len(diagnosis.standing_out)} episodes that stand out "
        "are corrupted. AUC of corrupted episodes lying lower (0.5 is chance):"
    )
    return (Text(told), Table(("score or preset", "AUC"), rows))


def _correlations(diagnosis: Diagnosis) -> Table:
    names = list(diagnosis.correlations)
    rows = tuple((LABELS[a], *(_number(diagnosis.correlations[a][b]) for b in names)) for a in names)
    return Table(
        ("", *(LABELS[name] for name in names)), rows, "Rank correlations of the episodes' means, within tasks."
    )


def _agreement(diagnosis: Diagnosis) -> str:
    called = diagnosis.called_bad
    if not called:
        return "There is no episode that all scores call bad."
    shown = ", ".join(map(str, called[:30])) + (", …" if len(called) > 30 else "")
    return f"All scores call {len(called)} of {len(diagnosis.episodes)} episodes bad: {shown}."


def _worst(diagnosis: Diagnosis) -> list[int]:
    """Rows of the episodes, those first that some score puts lowest within their task."""
    low = [min((v for v in row.z.values() if not math.isnan(v)), default=math.inf) for row in diagnosis.episodes]
    return sorted(range(len(low)), key=low.__getitem__)


def _episodes(diagnosis: Diagnosis, rows: list[int]) -> Table:
    scores = list(diagnosis.episodes[0].z)
    presets = list(diagnosis.episodes[0].weights)
    body = tuple(
        (
            f"{row.episode}: {row.task if len(row.task) < 40 else row.task[:38] + '…'}",
            *(_number(row.z[name], 1) for name in scores),
            *(_number(row.weights[name]) for name in presets),
        )
        for row in (diagnosis.episodes[index] for index in rows)
    )
    header = ("episode: task", *(f"z, {LABELS[name]}" for name in scores), *presets)
    return Table(header, body, "Scores as robust z within the task; weights with mean 1.")


def _effects(diagnosis: Diagnosis) -> Table:
    header = ("preset", "effective sample share", "episodes below half", "with motion", "with length")
    rows = tuple(
        (
            effect.preset,
            _percent(effect.effective_share),
            _percent(effect.below_half),
            _number(effect.motion),
            _number(effect.length),
        )
        for effect in diagnosis.effects
    )
    return Table(header, rows, "Last two columns: rank correlation of the episodes' weights, within tasks.")


def _shares(diagnosis: Diagnosis, preset: str) -> Table:
    effect = next(effect for effect in diagnosis.effects if effect.preset == preset)
    rows = tuple(
        (share.name, str(share.episodes), _percent(share.chunk_share), _percent(share.weight_share))
        for share in effect.shares
    )
    return Table(("task", "episodes", "share of chunks", "share of weight"), rows)


IDENTIFIABILITY_CAPTION = (
    "Left: the typical episode with its 95 % interval, on its own label and future, under another chunk's future, and on a "
    "label that is not its own. Right: every episode; the farther left (and down, unless that is its length), the less its label "
    "fits what followed."
)
WEIGHTS_CAPTION = (
    "Left: weights of the episodes under each preset, lowest first. Right: weights by the episodes' length."
)


def identifiability_figure(diagnosis: Diagnosis) -> Figure:
    """How identifiable labels are, and how the episodes spread."""
    figure, (left, right) = board(1, 2, 11.0, 4.0)
    name_axes(left, "Identified above chance", "nats")
    styles = (("own label and future", BLUE), ("another chunk's future", GREY), ("another label", VERMILION))
    for place, of in enumerate(diagnosis.identifiability.values()):
        null = Interval(of.null, of.null, of.null)
        for shift, (label, colour), value in zip(
            (-0.2, 0.0, 0.2), styles, (of.nats, of.without_future, null), strict=True
        ):
            bars = np.array([[value.value - value.low], [value.high - value.value]])
            text = label if place == 0 else None
            left.errorbar(place + shift, value.value, yerr=bars, fmt="o", color=colour, capsize=3, label=text)
    left.set_xticks(range(len(diagnosis.identifiability)), [NAMED[name] for name in diagnosis.identifiability])
    left.set_xlim(-0.6, len(diagnosis.identifiability) - 0.4)
    left.axhline(0.0, color=INK, linewidth=0.8)
    legend(left)
    # one instruction and an untrained policy leave T_a as the only score
    down = next((name for name in (INSTRUCTIONS, LOSS) if name in diagnosis.episodes[0].z), "length")
    name_axes(right, "Episodes within their task", "robust z", NAMED[ACTIONS])
    right.set_ylabel("frames" if down == "length" else NAMED.get(down, LABELS[down]), fontsize=TEXT_SIZE, color=INK)
    x = np.array([row.z[ACTIONS] for row in diagnosis.episodes])
    y = np.array([row.z.get(down, row.frames) for row in diagnosis.episodes], dtype=np.float64)
    right.axhline(0.0, color=FAINT)
    right.axvline(0.0, color=FAINT)
    out = np.isin([row.episode for row in diagnosis.episodes], diagnosis.standing_out)
    right.scatter(x[~out], y[~out], s=18, color=BLUE, alpha=0.6, linewidths=0)
    right.scatter(x[out], y[out], s=22, color=VERMILION, linewidths=0, label="stands out")
    for row in np.flatnonzero(out & np.isfinite(x) & np.isfinite(y))[:20]:
        name, at = str(diagnosis.episodes[row].episode), (x[row], y[row])
        right.annotate(name, at, xytext=(4, 3), textcoords="offset points", fontsize=TEXT_SIZE)
    legend(right)
    return figure


def weights_figure(diagnosis: Diagnosis) -> Figure:
    """The weights that the presets would give."""
    figure, (left, right) = board(1, 2, 11.0, 4.0)
    name_axes(left, "Weights under each preset", "mean 1", "share of the episodes")
    presets = list(diagnosis.episodes[0].weights)
    for preset, colour in zip(presets, COLOURS, strict=False):
        weights = np.sort([row.weights[preset] for row in diagnosis.episodes])
        left.plot((np.arange(len(weights)) + 0.5) / len(weights), weights, color=colour, label=preset, linewidth=1.8)
    left.axhline(1.0, color=INK, linewidth=0.8)
    legend(left)
    name_axes(right, "Weights by length", "mean 1", "frames")
    frames = [row.frames for row in diagnosis.episodes]
    for preset, colour in zip(presets, COLOURS, strict=False):
        right.scatter(
            frames, [row.weights[preset] for row in diagnosis.episodes], s=18, color=colour, alpha=0.6, linewidths=0
        )
    right.set_ylim(bottom=0.0)
    return figure


def _interval(value: Interval, percent: bool = False) -> str:
    if math.isnan(value.value):
        return "–"
    if percent:
        return f"{value.value:.0%} [{value.low:.0%}, {value.high:.0%}]"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
