"""The card that fills itself: the README.md of a PTR policy, from the facts of a run alone.

A fact that is missing is left out or called missing; nothing is guessed. Whatever comes from outside (names of tasks,
datasets, environments) is escaped when a template prints it, and a local folder shows its name, never its path.
"""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from peft import PeftModel

from ptr_hf.artifacts.peft import source_of
from ptr_hf.artifacts.sources import named_source
from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.method import share_bound, weight_bounds
from ptr_hf.policies.base import unwrap
from ptr_hf.presets import PRESETS
from ptr_hf.publishing.card_facts import BasePolicy, CardFacts, Evaluation, library_versions
from ptr_hf.publishing.card_text import fill_card, plain
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import SUMMARY_METRICS, main_run, summary_table
from ptr_hf.report.files import FIGURES_FOLDER
from ptr_hf.report.findings import findings
from ptr_hf.report.given_weights import weight_sentences
from ptr_hf.report.page import CAPTIONS
from ptr_hf.report.sources import GroupShare, group_shares

POLICY_TEMPLATE = "policy_card.md.j2"

ORIGINS = {
    "paper": "the paper's own",
    "ours": "ptr_hf's own, not the paper's",
    "baseline": "plain post-training, the baseline",
    "control": "a control",
    "bound": "a control",
}
DEFINING = ("score", "aggregation", "weight_map", "missing_future", "alpha", "scorer", "shuffle_consequences")

CONTROLLED = ("temperature", "beta", "hard_negative_ratio")


def model_card(facts: CardFacts, folder: str | Path | None = None) -> ModelCard:
    """The card of a policy.

    Args:
        facts: of its run.
        folder: where the card will stand; the figures that a report has left there are shown.
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
            hyperparameters=_hyperparameters(facts),
            bounds=weight_bounds(config.alpha, config.weight_min, config.weight_max)
            if config.is_paper and config.scorer
            else None,
            measured=summary_table(dynamics).rows if dynamics else [],
            statements=_statements(dynamics, config) if dynamics else [],
            sources=_sources(dynamics, facts) if dynamics else [],
            share_bounds=_share_bounds(config),
            pictures=_pictures(Path(folder)) if dynamics and folder is not None else {},
        )
    )


def write_model_card(facts: CardFacts, folder: str | Path) -> Path:
    """Write README.md into a folder, with the figures that a report has left there, and return the card's path."""
    path = Path(folder) / constants.REPOCARD_NAME
    model_card(facts, folder).save(path)
    return path


def policy_facts(policy: Any, *, random_weights: bool = False, **more: Any) -> CardFacts:
    """What a policy itself says of the facts for its card.

    Args:
        policy: a `PTRPolicy`.
        random_weights: whether it started from a configuration alone.
        more: what else is known, as for `CardFacts`.
    """
    base, config = unwrap(policy.base).config, policy.config
    source = config.base_path or (str(base.pretrained_path) if base.pretrained_path else None)
    return CardFacts(
        config=config,
        base=BasePolicy(
            policy_type=base.type,
            source=None if random_weights else source,
            revision=config.base_revision,
            random_weights=random_weights,
        ),
        chunk_size=config.resolved_chunk_size,
        peft=isinstance(policy.base, PeftModel) and source_of(policy.base) is not None,
        versions=library_versions(),
        **more,
    )


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
    """The rows of the run that the card is about, without what means nothing there, such as zeros of a belief that is not."""
    found, config = facts.dynamics, facts.config
    if found is None or not found.runs:
        return None
    run = config.preset if config.preset in found.runs else main_run(found)
    idle: set[str] = set() if config.num_belief_tokens else {"belief_entropy"}
    if not config.scorer:
        weighing = "effective_sample_size" if config.weights is not None else "loss_action"
        idle |= set(SUMMARY_METRICS) - {"loss_action", weighing}
    elif not config.reads_posterior:
        # other scores log something else in these columns, or zeros
        idle |= {"accuracy", "margin", "score", *CONTROLLED}
    return Dynamics(found.table.filter(pc.equal(found.table["run"], run))).without(idle).identified


def _statements(dynamics: Dynamics, config: PTRHyperparameters) -> list[str]:
    """The report's findings, where their words fit the score."""
    if config.weights is not None:
        return weight_sentences(vars(config).get("weights_record", {}))
    fit = config.reads_posterior or not config.scorer
    return findings(dynamics, chance=dynamics.chance(main_run(dynamics))) if fit else []


def _pictures(folder: Path) -> dict[str, str]:
    """The captions of the report's figures that are there, by path in the folder."""
    figures = ((f"{FIGURES_FOLDER}/{name}.png", caption) for name, caption in CAPTIONS.items())
    return {figure: caption for figure, caption in figures if (folder / figure).is_file()}


def _sources(dynamics: Dynamics, facts: CardFacts) -> list[tuple[GroupShare, int | None]]:
    """Every source of a mixture at the end of training, with its episodes."""
    episodes = {part.name: part.episodes for part in facts.data}
    return [(group, episodes.get(group.name)) for group in group_shares(dynamics, main_run(dynamics))]
