"""Cards that fill themselves: the README.md of a PTR policy and of a scored dataset, from the facts of a run alone.

A fact that is missing is left out or called missing; nothing is guessed. Whatever comes from outside (names of tasks,
datasets, environments) is escaped when a template prints it, and a local folder shows its name, never its path.
"""

import math
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, constants
from matplotlib.figure import Figure

from ptr_hf.artifacts.sources import named_source
from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.method import share_bound, weight_bounds
from ptr_hf.presets import PRESETS
from ptr_hf.publishing.card_facts import (
    BasePolicy,
    CardFacts,
    Evaluation,
    ScoredDatasetFacts,
    TrainingData,
    TrainingRun,
)
from ptr_hf.publishing.card_text import fill_card, percent, plain
from ptr_hf.report import (
    Dynamics,
    GroupShare,
    dynamics_figure,
    findings,
    group_shares,
    read_dynamics,
    save_figure,
    sources_figure,
    weight_histogram_figure,
)
from ptr_hf.report.dynamics import DYNAMICS_COLUMNS
from ptr_hf.report.evaluation import main_run, number
from ptr_hf.report.files import beside_the_run
from ptr_hf.report.given_weights import weight_sentences
from ptr_hf.report.page import DYNAMICS_CAPTION, GIVEN_HISTOGRAM_CAPTION, HISTOGRAM_CAPTION, has_curves
from ptr_hf.report.panels import clip_panel, loss_panel
from ptr_hf.report.sources import SOURCES_CAPTION
from ptr_hf.report.style import board

__all__ = [
    "BasePolicy",
    "CardFacts",
    "Evaluation",
    "ScoredDatasetFacts",
    "TrainingData",
    "TrainingRun",
    "draw_pictures",
    "library_versions",
    "model_card",
    "preset_changes",
    "scored_dataset_card",
    "write_model_card",
]

POLICY_TEMPLATE, DATASET_TEMPLATE = "policy_card.md.j2", "scored_dataset_card.md.j2"
DYNAMICS_PICTURE, WEIGHTS_PICTURE, SOURCES_PICTURE = "ptr_dynamics.png", "ptr_weights.png", "ptr_sources.png"

ORIGINS = {
    "paper": "the paper's own",
    "ours": "ptr_hf's own, not the paper's",
    "baseline": "plain post-training, the baseline",
    "control": "a control",
    "bound": "a control",
}
DEFINING = ("score", "aggregation", "weight_map", "missing_future", "alpha", "scorer", "shuffle_consequences")

MAIN = (
    "score",
    "aggregation",
    "weight_map",
    "alpha",
    "beta",
    "weight_min",
    "weight_max",
    "temperature",
    "chunk_size",
    "segment_length",
    "consequence_offset",
    "num_belief_tokens",
    "identification_coef",
    "ranking_coef",
    "scorer_warmup_steps",
)
"""Hyperparameters that the card shows without being asked."""
METRICS = (
    "loss_action",
    "accuracy",
    "margin",
    "score",
    "effective_sample_size",
    "weight_at_floor",
    "weight_at_ceiling",
    "valid_target_ratio",
    "belief_entropy",
)
CONTROLLED = {"temperature": "τ", "beta": "β", "hard_negative_ratio": "ρ"}
# what only the identification posterior fills; other scores log something else, or zeros, in these columns
OF_POSTERIOR = ("accuracy", "margin", "score")


class Picture(NamedTuple):
    """A picture of the card; `draw` makes it."""

    file: str
    alt: str
    caption: str
    draw: Callable[[], Figure]


class Trend(NamedTuple):
    """A logged metric at the start and at the end of training, as text."""

    meaning: str
    first: str
    last: str


def model_card(facts: CardFacts, pictures: Collection[str] | None = None) -> ModelCard:
    """The card of a policy; it refers to the pictures that `draw_pictures` writes beside it.

    Args:
        facts: of its run.
        pictures: names of the files that are there; None, all that the facts allow.
    """
    base, config = named_source(facts.base.source), facts.config
    results = [_eval_result(result) for result in facts.measured]
    title = facts.repo_id.split("/")[-1] if facts.repo_id else f"{facts.base.policy_type} post-trained by ptr_hf"
    data = ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        license=plain(facts.license) if facts.license else None,
        base_model=base.name if base.on_hub else None,
        base_model_relation=("adapter" if facts.peft else "finetune") if base.on_hub else None,
        datasets=_on_hub(part.source for part in facts.data) or None,
        tags=["robotics", "lerobot", "ptr", facts.base.policy_type, config.preset],
        model_name=title if results else None,
        eval_results=results or None,
    )
    dynamics = _dynamics(facts)
    origin, weighing = _what_weighs(config)
    return ModelCard(
        fill_card(
            data.to_yaml(),
            POLICY_TEMPLATE,
            facts=facts,
            config=config,
            title=title,
            base=base,
            repo=facts.repo_id or "user/repo",
            origin=origin,
            weighing=weighing,
            changes=preset_changes(config),
            main=[row for row in _hyperparameters(facts) if row[0] in MAIN],
            others=[row for row in _hyperparameters(facts) if row[0] not in MAIN],
            bounds=weight_bounds(config.alpha, config.weight_min, config.weight_max)
            if config.is_paper and config.scorer
            else None,
            trends=_trends(dynamics, config) if dynamics else [],
            statements=_statements(dynamics, config) if dynamics else [],
            controller=_controller(dynamics, config) if dynamics else "",
            sources=_sources(dynamics, facts) if dynamics else [],
            share_bounds=_share_bounds(config),
            pictures=[picture for picture in _pictures(facts) if pictures is None or picture.file in pictures],
        )
    )


def scored_dataset_card(facts: ScoredDatasetFacts) -> DatasetCard:
    """The card of a dataset with a score and a weight for each of its chunks."""
    source, scorer = named_source(facts.data.source), named_source(facts.scorer)
    data = DatasetCardData(
        license=plain(facts.license) if facts.license else None,
        task_categories=["robotics"],
        source_datasets=_on_hub([facts.data.source]) or None,
        tags=["LeRobot", "ptr"],
    )
    return DatasetCard(fill_card(data.to_yaml(), DATASET_TEMPLATE, facts=facts, source=source, scorer=scorer))


def draw_pictures(facts: CardFacts, folder: str | Path) -> list[Path]:
    """Write the card's pictures as PNG files into a folder; without dynamics there are none.

    A picture that cannot be drawn is left out with a warning.
    """
    drawn = []
    for picture in _pictures(facts):
        with beside_the_run(f"The picture {picture.file} is missing in the card"):
            drawn.append(save_figure(picture.draw(), Path(folder) / picture.file, dpi=120))
    return drawn


def write_model_card(facts: CardFacts, folder: str | Path) -> Path:
    """Write README.md and its pictures into a folder and return the card's path."""
    pictures = [path.name for path in draw_pictures(facts, folder)]
    path = Path(folder) / constants.REPOCARD_NAME
    model_card(facts, pictures).save(path)
    return path


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that training rests on, of those that are installed."""
    versions = {"Python": platform.python_version()}
    names = ("lerobot", "transformers", "torch", "accelerate", "peft", "datasets", "huggingface_hub")
    for label, name in {"ptr_hf": "lerobot_policy_ptr", **{name: name for name in names}}.items():
        try:
            versions[label] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def preset_changes(config: PTRHyperparameters) -> dict[str, tuple[Any, Any]]:
    """Hyperparameters that are not as the preset sets them: name → (value, the preset's); what it leaves open is not."""
    preset = PTRHyperparameters(preset=config.preset)
    both = ((name, value, vars(preset)[name]) for name, value in _published(config).items())
    return {name: (value, usual) for name, value, usual in both if usual not in (value, None)}


def _weighs(config: PTRHyperparameters) -> bool:
    return config.weights is not None


def _share_bounds(config: PTRHyperparameters) -> tuple[float, float] | None:
    """What Eq. 30 bounds the shares of sources with; None where a weight is 0, or is not known."""
    if not _weighs(config):
        return share_bound(*config.weight_range)
    record = vars(config).get("weights_record") or {}
    low, high = float(record.get("smallest", 0.0)), float(record.get("largest", 0.0))
    return share_bound(low, high) if 0 < low <= high else None


def _published(config: PTRHyperparameters) -> dict[str, Any]:
    """The hyperparameters, of a weights file the name alone."""
    values = config.hyperparameters()
    return values | {"weights": values["weights"] and Path(values["weights"]).name}


def _what_weighs(config: PTRHyperparameters) -> tuple[str, str]:
    """Whose the preset is and what weighs the data; a preset changed in what defines it is nobody's."""
    if not set(DEFINING) & preset_changes(config).keys():
        return ORIGINS[PRESETS[config.preset].origin], PRESETS[config.preset].summary
    parts = (
        f"score {config.score}, aggregation {config.aggregation}, weight map {config.weight_map}, α = {config.alpha:g}"
    )
    shuffled = ", consequences shuffled" if config.shuffle_consequences else ""
    return "changed in what defines it, so not the method of that name", f"{parts}{shuffled}"


def _on_hub(sources: Iterable[str | Path]) -> list[str]:
    return list(dict.fromkeys(found.name for found in map(named_source, sources) if found.on_hub))


def _eval_result(result: Evaluation) -> EvalResult:
    environment, task = plain(result.environment), plain(result.task)
    counts = {"episodes": result.episodes, "standard_error": result.standard_error}
    return EvalResult(
        task_type="robotics",
        task_name="Robotics",
        dataset_type=environment,
        dataset_name=f"{environment}: {task}",
        # tells the tasks of one environment apart, which would be merged into one entry
        dataset_config=task,
        metric_type="success_rate",
        metric_name="Success rate (fraction of episodes)",
        metric_value=result.success,
        metric_args={name: value for name, value in counts.items() if value is not None},
    )


def _hyperparameters(facts: CardFacts) -> list[tuple[str, object, str]]:
    """(name, value, meaning) of every hyperparameter; what None means, its meaning says."""
    values = _published(facts.config) | {"chunk_size": facts.config.chunk_size or facts.chunk_size}
    helps = {item.name: item.metadata["help"] for item in fields(PTRHyperparameters)}
    return [(name, value, helps[name]) for name, value in values.items()]


# ---- the run's dynamics ---------------------------------------------------------------------------------------------


def _dynamics(facts: CardFacts) -> Dynamics | None:
    """The rows of the run that the card is about."""
    found = facts.dynamics
    if isinstance(found, str | Path):
        path, found = Path(found), None
        if path.is_file():
            with beside_the_run(f"The card says nothing of {path.name}"):
                found = read_dynamics(path)
    if found is None or not found.runs:
        return None
    run = facts.config.preset if facts.config.preset in found.runs else main_run(found)
    table = found.table.filter(pc.equal(found.table["run"], run))
    if not facts.config.num_belief_tokens:
        # zeros of a belief that is not there
        place = table.column_names.index("belief_entropy")
        table = table.set_column(place, table.schema.field(place), pa.nulls(len(table), pa.float64()))
    return Dynamics(table).identified


def _chance(dynamics: Dynamics, config: PTRHyperparameters) -> float | None:
    return dynamics.chance(main_run(dynamics)) if config.reads_posterior else None


def _statements(dynamics: Dynamics, config: PTRHyperparameters) -> list[str]:
    """The report's findings, where their words fit the score."""
    if config.weights is not None:
        return weight_sentences(vars(config).get("weights_record", {}))
    fit = config.reads_posterior or not config.scorer
    return findings(dynamics, chance=_chance(dynamics, config)) if fit else []


def _trends(dynamics: Dynamics, config: PTRHyperparameters) -> list[Trend]:
    trends, run = [], main_run(dynamics)
    for name in METRICS:
        column = DYNAMICS_COLUMNS[name]
        values = dynamics.column(name, run)
        values = values[[math.isfinite(value) for value in values]]
        other_meaning = name in OF_POSTERIOR and not config.reads_posterior
        shown = config.scorer or name == "loss_action" or (name == "effective_sample_size" and _weighs(config))
        if not len(values) or other_meaning or not shown:
            continue
        ends = float(values[0]), dynamics.tail(name, run)
        show = percent if column.unit == "fraction" else number
        unit = f" ({column.unit})" if column.unit not in ("", "fraction") else ""
        trends.append(Trend(f"{column.meaning}{unit}", *("–" if math.isnan(end) else show(end) for end in ends)))
    return trends


def _controller(dynamics: Dynamics, config: PTRHyperparameters) -> str:
    """First → last of what the controller moves; empty where no posterior ran that it could follow."""
    run, parts = main_run(dynamics), []
    for name, symbol in CONTROLLED.items() if config.scorer and config.reads_posterior else ():
        values = [value for value in dynamics.column(name, run).tolist() if math.isfinite(value)]
        if values:
            parts.append(f"{symbol} {number(values[0])} → {number(values[-1])}")
    return ", ".join(parts)


def _sources(dynamics: Dynamics, facts: CardFacts) -> list[tuple[GroupShare, int | None]]:
    """Every source of a mixture at the end of training, with its episodes."""
    episodes = {part.name: part.episodes for part in facts.data}
    return [(group, episodes.get(group.name)) for group in group_shares(dynamics, main_run(dynamics))]


def _pictures(facts: CardFacts) -> list[Picture]:
    dynamics, config = _dynamics(facts), facts.config
    if dynamics is None or not has_curves(dynamics):
        return []
    run = main_run(dynamics)
    weighed = (config.scorer or _weighs(config)) and dynamics.logged("effective_sample_size", run)
    if config.reads_posterior and config.scorer:
        belief = "belief entropy, " if config.num_belief_tokens else ""
        alt = f"Training dynamics: identification accuracy, score T, margin, action loss, {belief}effective sample size and "
        alt += "clipping, temperature, weight scale and hard-negative ratio over the training steps"
        draw = partial(dynamics_figure, dynamics, _chance(dynamics, config))
        pictures = [Picture(DYNAMICS_PICTURE, alt, DYNAMICS_CAPTION, draw)]
    else:
        panels = (loss_panel, clip_panel) if weighed else (loss_panel,)
        clips = ", effective sample size and clipping" if config.scorer else " and effective sample size"
        named = f"Action loss{clips if weighed else ''}"
        draw = partial(_some_panels, dynamics, panels)
        pictures = [Picture(DYNAMICS_PICTURE, f"{named} over the training steps", f"{named} over training.", draw)]
    if weighed and dynamics.weight_counts(run) is not None:
        alt = "Histogram of the weights of the first and of the last tenth of training"
        caption = HISTOGRAM_CAPTION if config.scorer else GIVEN_HISTOGRAM_CAPTION
        pictures.append(Picture(WEIGHTS_PICTURE, alt, caption, partial(weight_histogram_figure, dynamics)))
    if facts.weighed and (figure := sources_figure(dynamics)) is not None:
        alt = "Share of the chunks and of the weight of every source over the training steps"
        pictures.append(Picture(SOURCES_PICTURE, alt, SOURCES_CAPTION, lambda: figure))
    return pictures


def _some_panels(dynamics: Dynamics, panels: Sequence[Callable[..., None]]) -> Figure:
    figure, axes = board(1, len(panels), 5.0 * len(panels), 3.4)
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, dynamics)
    return figure
