"""From a diagnosis to plain advice; every rule and its threshold stands here, with the reason for it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ptr_hf.diagnosis.diagnose import ACTIONS, INSTRUCTIONS, OUT_SHARE, OUT_Z, Diagnosis, Effect, Identifiability

MIN_FOLD_EPISODES = 10
ABOVE_CHANCE = 0.1
STANDS_OUT = 0.05
FOLLOWS = 0.5
TASK_LOSS = 0.5

RULES = (
    (
        f"at least {MIN_FOLD_EPISODES} episodes in either fold",
        "Every head learns from one fold alone; from fewer episodes it memorises, and the interval of a median of fewer is "
        "wider than any effect one would act on.",
    ),
    (
        f"identifiable: more than {ABOVE_CHANCE} nats above chance, with 95 % confidence",
        "0.1 nats is a label that is 10 % likelier than a guess; an episode's mean over a few chunks does not show less.",
    ),
    (
        "consequences count: the typical episode's own future adds something, with 95 % confidence",
        "An action can often be guessed from what is seen before it. A verdict that stays the same under another chunk's "
        "future is about how usual an action is, and the policy's own loss says that too.",
    ),
    (
        f"something stands out: more than {STANDS_OUT:.0%} of the episodes lie below z = {OUT_Z:.0f} within their task and "
        f"get less than {OUT_SHARE:.0%} of the typical episode's nats, by T_a or T_l",
        "Maps that compare episodes with each other always find some that lie lowest. Leaving out one good episode in twenty "
        "changes a policy less than another seed does.",
    ),
    (
        f"follows motion or length: rank correlation of the weights beyond {FOLLOWS}",
        "Then more than a quarter of what the weights say is how fast or how long an episode is, which is style rather "
        "than quality.",
    ),
    (
        f"task at risk: its share of the weight falls below {TASK_LOSS:.0%} of its share of the data",
        "A task that is merely harder to recognise would be forgotten.",
    ),
)

Verdict = Literal["may help", "will not help", "unclear"]
OURS = ("ptr_consequence", "ptr_calibrated")
NAMES = {ACTIONS: "actions (T_a)", INSTRUCTIONS: "instructions (T_l)"}


@dataclass(frozen=True)
class Advice:
    """What to do: a verdict on PTR, the headline, and sentences that say why and what next."""

    verdict: Verdict
    headline: str
    sentences: tuple[str, ...]


def advise(diagnosis: Diagnosis) -> Advice:
    """Go through the rules in the order of `RULES`; the first that fails decides the headline.

    Features that have learned nothing cannot show that others would fail too: what they do not find stays unclear.
    """
    advice = _advise(diagnosis)
    sentences = (*map(_identified, diagnosis.identifiability, diagnosis.identifiability.values()), *advice.sentences)
    if diagnosis.trained:
        return replace(advice, sentences=sentences)
    return Advice(
        "unclear" if advice.verdict == "will not help" else advice.verdict,
        f"{advice.headline}, says an untrained policy",
        (
            *sentences,
            "The policy that was read with is untrained: its features see little, and its loss says nothing. Give "
            "--policy_path for a verdict that counts.",
        ),
    )


def _advise(diagnosis: Diagnosis) -> Advice:
    identifiable = [name for name, of in diagnosis.identifiability.items() if of.nats.low > ABOVE_CHANCE]
    counting = [name for name in identifiable if diagnosis.identifiability[name].gain.low > 0]
    if min(diagnosis.folds) < MIN_FOLD_EPISODES:
        few = (
            f"The two folds hold {diagnosis.folds[0]} and {diagnosis.folds[1]} episodes with a verdict; below "
            f"{MIN_FOLD_EPISODES} a cross-fitted score is mostly chance. Record more, or train plainly (preset=sft)."
        )
        return Advice("unclear", "Too few episodes to tell", (few,))
    if not identifiable:
        noise = (
            "PTR will not help here: nothing that is seen before and after a chunk tells its label from another one's, so its "
            "weights would be noise. Check that the cameras show what the actions do, try another policy's features or a "
            "longer --chunk_size; otherwise train plainly (preset=sft) or with preset=small_loss."
        )
        return Advice("will not help", "Consequences are not identifiable on this data", (noise,))
    if not counting:
        habit = (
            "PTR will not help here: the labels are as identifiable under another chunk's future as under their own, so the "
            "verdicts are not about consequences. preset=small_loss asks much the same question at a lower price."
        )
        return Advice("will not help", "What followed adds nothing to the verdicts", (habit,))
    sentences = [f"What followed counts for {' and '.join(NAMES[name] for name in counting)}."]
    out, episodes = len(diagnosis.standing_out), len(diagnosis.episodes)
    if out <= STANDS_OUT * episodes:
        sentences.append(
            f"Consequences are identifiable, but only {out} of {episodes} episodes stand out: reweighting has nothing to gain "
            "here and would cost effective sample size (ptr_consequence would leave "
            f"{_effect(diagnosis, 'ptr_consequence').effective_share:.0%} of it). Train plainly (preset=sft)."
        )
        return Advice("will not help", "Nothing stands out: PTR will not help here", tuple(sentences))
    sentences += _tasks_at_risk(diagnosis)
    style = _style(diagnosis)
    if style:
        followed = " and ".join(style)
        sentences.append(
            f"The weights would follow {followed}: {'; '.join(style.values())}. Look at the episodes at the bottom of the list "
            "before training: if they are good but slow or long, group them (standardize_by a column of the episodes' metadata) "
            "or train plainly."
        )
        return Advice("unclear", f"The weights would follow {followed}", tuple(sentences))
    sentences.append(
        f"{out} of {episodes} episodes stand out: {_some(diagnosis.standing_out)}. Look at them; if they are bad, train with "
        "preset=ptr_calibrated (cautious: on these verdicts it would halve the weight of "
        f"{_effect(diagnosis, 'ptr_calibrated').below_half:.0%} of the episodes) or ptr_consequence (strong: "
        f"{_effect(diagnosis, 'ptr_consequence').below_half:.0%}), beside preset=small_loss and preset=sft on the same seeds."
    )
    return Advice("may help", "Some episodes stand out: PTR may help", tuple(sentences))


def _identified(name: str, of: Identifiability) -> str:
    label = NAMES[name]
    if math.isnan(of.nats.value):
        return f"There is no verdict on {label}: too few chunks have a recorded future."
    told = "" if of.nats.low > ABOVE_CHANCE else "not clearly "
    return (
        f"{label[0].upper()}{label[1:]} are {told}identifiable above chance: {of.nats.value:.2f} nats "
        f"({of.nats.low:.2f} to {of.nats.high:.2f}) in the typical episode; the own label is the likeliest of "
        f"{of.candidates:.0f} in {of.accuracy.value:.0%} of the chunks (chance {of.chance:.1%}). Its own future adds "
        f"{of.gain.value:.2f} nats ({of.gain.low:.2f} to {of.gain.high:.2f})."
    )


def _style(diagnosis: Diagnosis) -> dict[str, str]:
    """What the weights of our presets would follow, and how closely."""
    found: dict[str, str] = {}
    for preset in OURS:
        effect = _effect(diagnosis, preset)
        for name, value in (("motion", effect.motion), ("length", effect.length)):
            if abs(value) > FOLLOWS:
                found.setdefault(name, f"rank correlation {value:.2f} with {name} under {preset}")
    return found


def _tasks_at_risk(diagnosis: Diagnosis) -> Iterator[str]:
    for preset in OURS:
        for share in _effect(diagnosis, preset).shares:
            if share.weight_share < TASK_LOSS * share.chunk_share:
                yield (
                    f"Under {preset} the task '{share.name}' would keep {share.weight_share:.0%} of the weight for "
                    f"{share.chunk_share:.0%} of the data: compare within tasks (standardize_by=task)."
                )


def _effect(diagnosis: Diagnosis, preset: str) -> Effect:
    return next(effect for effect in diagnosis.effects if effect.preset == preset)


def _some(episodes: tuple[int, ...]) -> str:
    return ", ".join(map(str, episodes[:20])) + (", …" if len(episodes) > 20 else "")
