"""What the presets of the benchmark are, whose they are, and the paper's figures to set beside them."""

import json
from typing import NamedTuple

from benchmarks.corruption.report.runs import Run, Runs
from ptr_hf.presets import PRESETS


class PresetLine(NamedTuple):
    """Whose the runs of a name are, and what they are."""

    origin: str
    text: str


METHODS = ("paper", "ours")
"""Origins of what is being judged; the others are what it is judged against."""

PAPER_SUCCESS: dict[str, tuple[str, tuple[float, float], tuple[float, float]]] = {
    "clean": ("clean", (98.3, 97.8), (54.2, 55.6)),
    "noise": ("ANI", (93.2, 95.4), (46.8, 52.0)),
    "truncation": ("TT", (91.6, 94.0), (44.2, 50.4)),
    "instruction": ("LN", (94.8, 96.2), (48.6, 52.6)),
    "combined": ("Combined", (85.4, 91.0), (36.4, 45.8)),
}
"""Condition → the paper's name for it, and its success in % of SFT and PTR on LIBERO and on RoboCasa."""

PAPER_ABLATIONS: dict[str, tuple[float, float]] = {
    "full": (97.8, 55.6),
    "no_belief": (97.4, 54.0),
    "no_gather": (97.0, 54.3),
    "frozen_encoder": (95.3, 50.2),
    "no_controller": (97.1, 51.9),
    "no_clipping": (95.5, 49.1),
    "alpha_0": (97.5, 54.3),
}
"""Table 5 of the paper: success in % on LIBERO and RoboCasa."""

PAPER_DYNAMICS: dict[str, tuple[str, str]] = {
    "accuracy": ("identification accuracy", "rises, then a plateau"),
    "score": ("mean score T (nats)", "settles at 2.8–3.8"),
    "margin": ("margin (logits)", "grows to 1.9–7.5"),
    "belief_entropy": ("belief entropy (nats)", "0.3–0.5 → below 0.1"),
    "temperature": ("temperature τ", "0.12 → 0.03"),
    "beta": ("weight scale β", "1.5 → about 1.2"),
    "hard_negative_ratio": ("hard-negative ratio ρ", "0 → 0.5"),
}


def origin(runs: Runs, name: str) -> str:
    """Whose the runs of this name are; a preset with other options counts as the preset's."""
    return preset_line(_any(runs, name).base).origin


def describe(runs: Runs, name: str) -> PresetLine:
    """One line on what the runs of this name are."""
    run = _any(runs, name)
    line = preset_line(run.base)
    if name == run.base and not run.options:
        return line
    changed = ", ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in run.options.items()
    )
    return PresetLine(line.origin, f"{run.base} with {changed or 'nothing changed'}")


def preset_line(name: str) -> PresetLine:
    """The line of a preset, also of one that this version does not have."""
    preset = PRESETS.get(name)
    return PresetLine("ours", "no description") if preset is None else PresetLine(preset.origin, preset.summary)


def by_origin(runs: Runs, *origins: str) -> tuple[str, ...]:
    """Names of the runs (ablations and sweeps left out) of these origins."""
    return tuple(name for name in runs.presets if origin(runs, name) in origins)


def _any(runs: Runs, name: str) -> Run:
    return next(run for run in runs.items if run.preset == name)
