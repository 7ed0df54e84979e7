"""What the presets of the benchmark are, whose they are, and the paper's figures to set beside them."""

import json
from typing import NamedTuple

from ptr_hf.presets import PRESETS
from ptr_hf.report.corruption.runs import Run, Runs


class PresetLine(NamedTuple):
    """Whose a preset is (`baseline`, `paper`, `ours`, `control`, `bound`), and what it does."""

    origin: str
    text: str


PRESET_LINES: dict[str, PresetLine] = {
    "sft": PresetLine("baseline", "plain post-training, every chunk counts the same"),
    "sft_belief": PresetLine("paper", "SFT with belief tokens and all losses of the scorer, no weight moves"),
    "ptr": PresetLine("paper", "the paper's PTR (Table 6): T of each chunk, weight by Eq. 21"),
    "ptr_offline": PresetLine("ours", "the dataset inspected before training, a step that costs what sft's costs"),
    "ptr_consequence": PresetLine(
        "ours", "episode means of action and instruction identification from the recorded consequence"
    ),
    "ptr_consequence_loss": PresetLine("ours", "ptr_consequence and the negated loss, compared within a task"),
    "ptr_calibrated": PresetLine(
        "ours", "ptr_consequence and the negated log loss, within a task, with a map meant to leave clean data alone"
    ),
    "ptr_consequence_shuffled": PresetLine("control", "ptr_consequence with every chunk given another chunk's future"),
    "ptr_margin": PresetLine("ours", "episode means of the margin between the recorded and another action chunk"),
    "small_loss": PresetLine("control", "no consequence: episodes with a small loss count more, exponential map"),
    "small_loss_rejection": PresetLine("control", "no consequence: small loss with the rejection map"),
    "small_loss_calibrated": PresetLine(
        "control", "no consequence: the negated log loss with the map of ptr_calibrated"
    ),
    "random_weights": PresetLine("control", "weights drawn at random, the same map as ours"),
    "motion": PresetLine("control", "no consequence: weights from how much the robot moves"),
    "length": PresetLine("control", "no consequence: weights from the episode's length"),
    "oracle": PresetLine("bound", "told which episodes are corrupted, leaves them out"),
}
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


def preset_line(preset: str) -> PresetLine:
    """The line of a preset, also of one that has none yet."""
    if preset in PRESET_LINES:
        return PRESET_LINES[preset]
    fields = PRESETS[preset].fields if preset in PRESETS else {}
    settings = ", ".join(f"{key}={value}" for key, value in fields.items())
    return PresetLine("ours", settings or "no description")


def by_origin(runs: Runs, *origins: str) -> tuple[str, ...]:
    """Names of the runs (ablations and sweeps left out) of these origins."""
    return tuple(name for name in runs.presets if origin(runs, name) in origins)


def _any(runs: Runs, name: str) -> Run:
    return next(run for run in runs.items if run.preset == name)
