"""What is solid and what is not, per condition: sentences that follow from the numbers alone."""

from collections.abc import Iterator, Sequence

from benchmarks.corruption.report.presets import METHODS, by_origin
from benchmarks.corruption.report.runs import Runs
from benchmarks.corruption.report.statistics import Estimate, estimate, gap_share, paired
from benchmarks.corruption.report.tables import percent, points, spell

LOSS_WANTED = (0.10, 0.40)
CLEAN_COST = 0.01


def overview(runs: Runs) -> list[str]:
    """One sentence a preset: in how many conditions it is above SFT, below it, or not told apart from it."""
    sentences = []
    for name in runs.presets:
        if name in ("sft", "oracle"):
            continue
        found = {condition: _to_sft(runs, name, condition) for condition in runs.conditions}
        known = {condition: value for condition, value in found.items() if value is not None}
        if not known:
            continue
        above = [condition for condition, value in known.items() if value.above_zero]
        below = [condition for condition, value in known.items() if value.below_zero]
        rest = [condition for condition in known if condition not in above and condition not in below]
        parts = (("clearly above SFT", above), ("clearly below SFT", below), ("not told apart", rest))
        said = "; ".join(f"{words} in {len(which)} ({', '.join(which)})" for words, which in parts if which)
        several = len(runs.corrupted) > 1
        pooled = paired(runs.corrupted_mean(name), runs.corrupted_mean("sft")) if several else None
        mean = f" Mean over the corrupted conditions: {points(pooled)} pp ({spell(pooled.seeds)})." if pooled else ""
        sentences.append(f"{name}, {len(known)} condition{'s' if len(known) > 1 else ''}: {said}.{mean}")
    return sentences


def verdict(runs: Runs, condition: str) -> list[str]:
    """Sentences about one condition: how hard it is, then what is solid, then what is not."""
    sft = estimate(runs.success("sft", condition))
    if sft is None:
        return ["SFT has not been run here, so nothing can be compared with it."]
    seeds = spell(sft.seeds)
    sentences = [f"SFT succeeds in {100 * sft.mean:.1f} % of the held-out starts ({seeds})."]
    sentences += _severity(runs, condition) if condition != "clean" else []
    judged = {name: _to_sft(runs, name, condition) for name in runs.presets if name not in ("sft", "oracle")}
    known = {name: value for name, value in judged.items() if value is not None}
    above = {name: value for name, value in known.items() if value.above_zero}
    below = {name: value for name, value in known.items() if value.below_zero}
    undecided = {name: value for name, value in known.items() if value.undecided}
    solid = [f"above SFT: {_with_points(above)}"] if above else []
    solid += [f"below SFT: {_with_points(below)}"] if below else []
    if solid:
        sentences.append(f"Solid (the 95 % interval leaves out 0): {'; '.join(solid)}.")
    elif known:
        sentences.append("Solid: nothing; no interval of a difference to SFT leaves out 0.")
    if undecided:
        sentences.append(f"Not solid: {_with_points(undecided)} cannot be told from SFT.")
    sentences += _clean_cost(known) if condition == "clean" else _controls(runs, condition, list(above))
    if condition != "clean":
        sentences += _recovered(runs, condition, above)
    if missing := sorted({name for name, value in judged.items() if value is None}):
        sentences.append(f"Missing here: {', '.join(missing)}.")
    if fewest := min((len(value.seeds) for value in known.values()), default=0):
        sentences += ["Fewer than three seeds stand behind part of this."] if fewest < 3 else []
    return sentences


def _severity(runs: Runs, condition: str) -> Iterator[str]:
    """Whether the corruption costs SFT what it should, and whether the oracle can win it back."""
    loss = paired(runs.success("sft", "clean"), runs.success("sft", condition))
    if loss is None:
        yield "What SFT loses against clean data is missing."
    else:
        low, high = LOSS_WANTED
        inside = "within" if low <= loss.mean <= high else "outside"
        sure = "" if loss.above_zero else "; the loss itself is not told from 0"
        yield (
            f"Against clean data it loses {points(loss).replace('+', '')} pp, {inside} the {100 * low:.0f} to "
            f"{100 * high:.0f} pp that the severities aim at{sure}."
        )
    gap = _to_sft(runs, "oracle", condition)
    if gap is None:
        yield "The oracle is missing, so how much could be won back is unknown."
    elif gap.above_zero:
        yield f"The oracle stands {points(gap)} pp above SFT: that much can be won back."
    else:
        yield f"The oracle ({points(gap)} pp) is not clearly above SFT: there is little or nothing to win back."


def _controls(runs: Runs, condition: str, above: Sequence[str]) -> Iterator[str]:
    """Which controls do as well as the methods that beat SFT."""
    controls = [name for name in by_origin(runs, "control") if runs.success(name, condition)]
    if not controls:
        yield "No control was run here."
        return
    for name in by_origin(runs, *METHODS):
        if name not in above:
            continue
        beaten: list[str] = []
        equal: list[str] = []
        worse: list[str] = []
        for control in controls:
            found = paired(runs.success(name, condition), runs.success(control, condition))
            if found is not None:
                if found.above_zero:
                    beaten.append(control)
                else:
                    (worse if found.below_zero else equal).append(f"{control} ({points(found)} pp)")
        parts = [f"clearly better than {', '.join(beaten)}"] if beaten else []
        parts += (
            [f"not told apart from {', '.join(equal)}, which does as well as far as these seeds tell"] if equal else []
        )
        parts += [f"clearly worse than {', '.join(worse)}"] if worse else []
        if parts:
            yield f"Against controls, {name} is {'; '.join(parts)}."
    if not set(above) & set(by_origin(runs, *METHODS)):
        helped = [name for name in controls if name in above]
        if helped:
            verb = "is" if len(helped) == 1 else "are"
            yield f"No method is clearly above SFT, but of the controls {', '.join(helped)} {verb}."


def _recovered(runs: Runs, condition: str, above: dict[str, Estimate]) -> Iterator[str]:
    """How much of the gap the methods that beat SFT close."""
    shares = []
    for name in above:
        found = gap_share(*(runs.success(side, condition) for side in (name, "sft", "oracle")))
        if found.seeds and not found.reason:
            shares.append(f"{name} {percent(found.share)} ({percent(found.low)} to {percent(found.high)})")
    if shares:
        yield f"Share of the gap to the oracle that is closed: {', '.join(shares)}."


def _clean_cost(known: dict[str, Estimate]) -> Iterator[str]:
    """Which presets are shown to cost at most one percentage point, and which may cost more."""
    cheap = [name for name, value in known.items() if value.low >= -CLEAN_COST]
    dear = [name for name, value in known.items() if value.below_zero]
    open_ = [name for name in known if name not in cheap and name not in dear]
    limit = f"{100 * CLEAN_COST:.0f} pp"
    if cheap:
        yield f"A cost above {limit} is ruled out for {', '.join(cheap)}."
    if dear:
        yield f"A cost is certain for {', '.join(dear)}."
    if open_:
        yield f"Whether the cost is above {limit} is open for {', '.join(open_)}: the intervals reach further down."


def _to_sft(runs: Runs, name: str, condition: str) -> Estimate | None:
    return paired(runs.success(name, condition), runs.success("sft", condition))


def _with_points(found: dict[str, Estimate]) -> str:
    ordered = sorted(found.items(), key=lambda item: -item[1].mean)
    return ", ".join(f"{name} {points(value)} pp" for name, value in ordered)
