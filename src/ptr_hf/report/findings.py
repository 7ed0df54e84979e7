"""What the numbers of a run mean, in sentences; each is said only when the numbers support it."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import Dynamics
from ptr_hf.report.evaluation import corruption_kinds, detection, main_run, number, run_label
from ptr_hf.report.sources import group_shares, logged_share_bound

# An AUC this close to 0.5 is not told apart from chance by a few dozen episodes.
AUC_UNDECIDED = 0.1
# Above this share at one bound, most chunks have the same weight and the scorer decides little.
CLIPPED_SHARE = 0.5
# A source whose share of the weight is within this factor of its share of the chunks is left as it was.
MOVED = 1.1
MOST_MOVED = 4


def findings(
    dynamics: Dynamics,
    scores: ChunkScores | None = None,
    truth: Mapping[int, str] | None = None,
    chance: float | None = None,
    given: bool = False,
) -> list[str]:
    """Plain sentences about the run the report is about, from the last tenth of its rows and, if there are any, the scores.

    Where its weights were `given` before training, nothing is said of a scorer.
    """
    run = main_run(dynamics)
    sentences = [] if given else [*_scorer(dynamics, run, chance), *_weights(dynamics, run)]
    sentences += [*_sources(dynamics, run), *_loss(dynamics, run)]
    if scores is not None:
        sentences += _futures(scores)
        if truth is not None:
            sentences += _corruptions(scores, truth)
    return sentences


def _scorer(dynamics: Dynamics, run: str, chance: float | None) -> Iterator[str]:
    accuracy, score = dynamics.tail("accuracy", run), dynamics.tail("score", run)
    if math.isnan(accuracy):
        weighed = dynamics.logged("effective_sample_size", run)
        yield (
            f"{run_label(run)} weighed its chunks without comparing their consequences."
            if weighed
            else f"{run_label(run)} trained without a scorer, so every chunk counted the same."
        )
        return
    guessing = f" (guessing: {chance:.1%})" if chance is not None else ""
    yield (
        f"Given the context and the action chunk, the scorer picked the true consequence out of its candidates in "
        f"{accuracy:.0%} of the cases{guessing}."
    )
    if chance is not None and accuracy < 2.0 * chance:
        yield "That is hardly better than guessing: the weights of this run carry little information about the data."
    if not math.isnan(score):
        yield (
            f"The mean score T is {score:.2f} nats: on (geometric) average the true consequence was "
            f"{np.exp(score):.1f} times as likely as a uniform guess."
        )


def _weights(dynamics: Dynamics, run: str) -> Iterator[str]:
    size = dynamics.tail("effective_sample_size", run)
    if math.isnan(size):
        return
    if dynamics.tail("weight_max", run) == dynamics.tail("weight_min", run):
        yield (
            "All weights were equal at the end (α = 0, or the scorer was still warming up), so this run trained "
            "as plain post-training does."
        )
        return
    yield f"The weights leave an effective sample size of {size:.0%} of the chunks."
    for column, bound, effect in (
        ("weight_at_ceiling", "upper", "among the good chunks the scorer no longer chooses"),
        ("weight_at_floor", "lower", "the scorer rejects most of the data"),
    ):
        share = dynamics.tail(column, run)
        if share > CLIPPED_SHARE:
            yield f"{share:.0%} of the weights sit at the {bound} bound: {effect}."


def _sources(dynamics: Dynamics, run: str) -> Iterator[str]:
    groups = [group for group in group_shares(dynamics, run) if group.ratio > 0.0]
    if not groups:
        return
    moved = sorted(groups, key=lambda group: -abs(math.log(group.ratio)))
    moved = [group for group in moved if abs(math.log(group.ratio)) > math.log(MOVED)]
    bound = logged_share_bound(dynamics, run)
    kept = f" (Eq. 30 keeps it between {1 / bound:.3g} and {bound:.3g})" if math.isfinite(bound) else ""
    for group in moved[:MOST_MOVED]:
        yield (
            f"The source {group.name} has {group.share:.1%} of the chunks and {group.weight_share:.1%} of the weight, "
            f"{group.ratio:.2f} times its due{kept}."
        )
    if not moved:
        yield f"Each of the {len(groups)} sources has its due: none gained or lost a tenth of its share by the weights."
    elif len(moved) > MOST_MOVED:
        yield f"{len(moved) - MOST_MOVED} more sources gained or lost more than a tenth of their share."


def _loss(dynamics: Dynamics, run: str) -> Iterator[str]:
    if "sft" in dynamics.runs and run != "sft":
        ours, baseline = dynamics.tail("loss_action", run), dynamics.tail("loss_action", "sft")
        if not (math.isnan(ours) or math.isnan(baseline)):
            yield (
                f"The action loss ended at {ours:.3g} ({run_label(run)}, weighted) and {baseline:.3g} (SFT). "
                "The two average over different data, so the lower one is not thereby the better policy: "
                "only an evaluation of both policies decides."
            )


def _futures(scores: ChunkScores) -> Iterator[str]:
    without = ~scores.target_valid
    if not without.any() or not scores.usable.any():
        return
    mean, rest = float(scores.weight[scores.usable].mean()), float(scores.weight[without].mean())
    ratio = rest / mean if mean > 0.0 else math.inf
    yield (
        f"{without.mean():.1%} of the chunks have no recorded future. They carry weight {rest:.2f}, "
        f"the others {mean:.2f} on average"
        + (
            f", so these chunks, mostly the ends of episodes, count {number(ratio)} times as much as the rest."
            if abs(ratio - 1.0) > 0.25
            else "."
        )
    )


def _corruptions(scores: ChunkScores, truth: Mapping[int, str]) -> Iterator[str]:
    for kind in corruption_kinds(truth):
        found, name = detection(scores, truth, kind=kind), kind.replace("_", " ")
        if found.reason:
            yield f"Detection of {name} is undefined: {found.reason}."
            continue
        counts = f"AUC {found.auc:.2f}, {found.corrupted} against {found.clean} clean episodes"
        if found.auc > 0.5 + AUC_UNDECIDED:
            yield f"Episodes with {name} weigh less than clean ones ({counts})."
        elif found.auc < 0.5 - AUC_UNDECIDED:
            yield f"The weights are inverted for {name}: those episodes weigh more than clean ones ({counts})."
        else:
            yield f"The weights do not tell {name} from clean data ({counts})."
