"""One self-contained HTML page about a run: table, figures, hyperparameters, and what they mean."""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ptr_hf.report.chunk_scores import SCORES_FILE, ChunkScores, read_scores
from ptr_hf.report.dynamics import DYNAMICS_FILE, MOST_TASKS, Dynamics, read_dynamics
from ptr_hf.report.evaluation import (
    Detection,
    corruption_kinds,
    detection,
    main_run,
    number,
    run_label,
    summary_table,
    weight_shares,
)
from ptr_hf.report.figures import (
    check_chance,
    dynamics_figure,
    given_weights_figure,
    weight_histogram_figure,
    weights_by_quality_figure,
)
from ptr_hf.report.files import FIGURES_FOLDER, REPORT_FILE, beside_the_run, replacing
from ptr_hf.report.findings import findings
from ptr_hf.report.given_weights import given_options, weight_sentences
from ptr_hf.report.sources import SOURCES_CAPTION, group_shares, logged_share_bound, sources_figure
from ptr_hf.report.style import save_figure
from ptr_hf.report.text import readable, visible, without_local_paths

CONFIG_FILE = "ptr_config.json"
NO_CURVES = (
    "One step was logged, step {step}, so there are no curves over training: for those, log more often (logging_steps), or train "
    "for longer."
)

CAPTIONS = {
    "ptr_given_weights": "The weights that were known before training, over all chunks of the data; the action loss; and, of the "
    "chunks that each step has read, the effective sample size.",
    "ptr_dynamics": "Training dynamics: faint lines are the logged values, strong ones their running mean. Accuracy: share of "
    "chunks whose true consequence has the top logit. T: log of how much likelier than a uniform guess it was. Margin: its "
    "logit minus the best other. H_tok: how widely a belief token spreads over the chunk's time steps.",
    "ptr_weights": "Weights of the first and the last tenth of training after the scorer's warm-up; dotted lines are the bounds.",
    "ptr_weights_by_quality": "Weights of clean and of corrupted data. Filled: chunks; dots: episode means. AUC: the chance that "
    "a corrupted episode weighs less than a clean one; 0.5 is no difference, below it the weights are inverted.",
    "ptr_sources": SOURCES_CAPTION,
}
"""Of every figure that a report may hold, by the name of its file."""

type Drawing = tuple[str, Callable[[], Figure | None], str]
"""Name of the file in the figures folder, what draws it, and its caption."""


class PageFigure(NamedTuple):
    """A figure of the page: `name` is its file in the figures folder, `data` the same PNG as base64."""

    name: str
    caption: str
    data: str


class DetectionRow(NamedTuple):
    """Detection of one kind of corruption, counted by episode and by chunk."""

    kind: str
    episode: Detection
    chunk: Detection


def write_report(
    output_dir: str | Path,
    *,
    dynamics: Dynamics | None = None,
    scores: ChunkScores | None = None,
    truth: Mapping[int, str] | None = None,
    hyperparameters: Mapping[str, object] | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
    chance: float | None = None,
    weights: Mapping[str, object] | None = None,
    more: Sequence[Drawing] = (),
    title: str = "Posterior-Transition Reweighting: training report",
) -> Path:
    """Write `ptr_report.html` and `figures/*.png` into a run's output folder and return the page's path.

    What is not given is read from the folder: the dynamics (needed), the chunk scores and `ptr_config.json` (if there). Those
    two, where they are damaged, and a figure that cannot be drawn are left out with a warning.
    To set an SFT run of another folder beside this one, give `Dynamics.join(read_dynamics(a), read_dynamics(b))`.

    Args:
        truth: kind of every scored episode, for the detection of known corruptions.
        results: run → name of a measured result → value, e.g. {"sft": {"success rate": 0.51}, "ptr": {...}}.
        chance: identification accuracy of guessing, 1 / |Y|.
        weights: record of the weights that were known before training (`PTRConfig.weights_record`), where there were any.
        more: further figures, which come first.

    Raises:
        FileNotFoundError: no dynamics were given and the folder holds none.
        ValueError: dynamics that are damaged or hold no step, a truth without scores, or one that leaves out scored episodes.
    """
    check_chance(chance)
    folder = Path(output_dir)
    dynamics = (read_dynamics(folder / DYNAMICS_FILE) if dynamics is None else dynamics).identified
    if scores is None and (folder / SCORES_FILE).exists():
        with beside_the_run(f"The report leaves {SCORES_FILE} out"):
            scores = read_scores(folder / SCORES_FILE)
    if truth is not None and scores is None:
        raise ValueError(f"A truth needs chunk scores: give scores, or write {SCORES_FILE} to {folder}.")
    if hyperparameters is None and (folder / CONFIG_FILE).exists():
        with beside_the_run(f"The report leaves {CONFIG_FILE} out"):
            hyperparameters = dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    if weights is None and hyperparameters is not None:
        recorded = hyperparameters.get("weights_record")
        weights = recorded if isinstance(recorded, Mapping) and recorded else None
    hyperparameters = {name: value for name, value in (hyperparameters or {}).items() if name != "weights_record"}
    if weights is not None:
        hyperparameters = given_options(hyperparameters)
    run, curves = main_run(dynamics), has_curves(dynamics)
    identifies = any(dynamics.logged("accuracy", name) for name in dynamics.runs)
    chosen: dict[str, Callable[[], Figure | None]] = {}
    if weights is not None and not identifies:
        chosen["ptr_given_weights"] = partial(given_weights_figure, dynamics, weights)
    elif curves:
        chosen["ptr_dynamics"] = partial(dynamics_figure, dynamics, chance)
    if dynamics.weight_counts(run) is not None and (weights is None or identifies):
        chosen["ptr_weights"] = partial(weight_histogram_figure, dynamics)
    if scores is not None and truth is not None:
        chosen["ptr_weights_by_quality"] = partial(weights_by_quality_figure, scores, truth)
    if curves:
        chosen["ptr_sources"] = partial(sources_figure, dynamics)
    for name in CAPTIONS:
        # of an earlier run
        with suppress(OSError):
            (folder / FIGURES_FOLDER / f"{name}.png").unlink(missing_ok=True)
    own = [(name, draw, CAPTIONS[name]) for name, draw in chosen.items()]
    drawn = [_page_figure(folder, *figure) for figure in (*more, *own)]
    environment = page_templates()
    environment.filters |= {"number": number, "run_label": run_label, "auc": _auc, "percent": _percent}
    page = environment.get_template("report.html.j2").render(
        title=title,
        run=run,
        findings=[
            *(weight_sentences(weights) if weights is not None else ()),
            *findings(dynamics, scores, truth, chance, given=weights is not None),
        ],
        given_weights=weights is not None,
        summary=summary_table(dynamics, results),
        figures=[figure for figure in drawn if figure is not None],
        narrow=("ptr_weights.png", "ptr_weights_by_quality.png"),
        no_curves="" if curves else NO_CURVES.format(step=int(dynamics.steps(run)[-1])),
        source_groups=group_shares(dynamics, run, "sources"),
        task_groups=group_shares(dynamics, run, "tasks"),
        most_tasks=MOST_TASKS,
        share_bound=logged_share_bound(dynamics, run),
        tasks=weight_shares(scores, "task") if scores is not None else (),
        sources=weight_shares(scores, "source") if scores is not None else (),
        detections=_detections(scores, truth),
        hyperparameters=sorted(
            (str(name), readable(value)) for name, value in without_local_paths(dict(hyperparameters or {})).items()
        ),
    )
    path = folder / REPORT_FILE
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def has_curves(dynamics: Dynamics) -> bool:
    """Whether some run logged more than one step: a single one is a dot, which says less than a sentence."""
    return any(len(dynamics.steps(run)) > 1 for run in dynamics.runs)


def page_templates() -> Environment:
    """The templates of this project's pages: what is printed is escaped, and a name that is not there is an error."""
    environment = Environment(
        loader=PackageLoader("ptr_hf.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.finalize = shown
    return environment


def shown(value: object) -> object:
    """What a page prints of a value: text without control and direction characters."""
    return visible(value) if type(value) is str else value


def _page_figure(folder: Path, name: str, draw: Callable[[], Figure | None], caption: str) -> PageFigure | None:
    """Draw and save a figure; one that fails is left out, and said so in the log."""
    with beside_the_run(f"The figure {name} is missing in the report"):
        figure = draw()
        if figure is None:
            return None
        path = save_figure(figure, folder / FIGURES_FOLDER / f"{name}.png")
        return PageFigure(path.name, caption, Markup(base64.b64encode(path.read_bytes()).decode("ascii")))
    return None


def _detections(scores: ChunkScores | None, truth: Mapping[int, str] | None) -> list[DetectionRow]:
    if scores is None or truth is None:
        return []
    kinds = corruption_kinds(truth)
    asked = [*kinds, None] if len(kinds) > 1 else list(kinds)
    return [
        DetectionRow(
            kind or "all of them", detection(scores, truth, "episode", kind), detection(scores, truth, "chunk", kind)
        )
        for kind in asked
    ]


def _auc(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"
