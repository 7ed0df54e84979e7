"""The method's hyperparameters: one schema for `PTRConfig`, `PTRTrainingArguments` and every command line."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

from ptr_hf.presets import PRESETS
from ptr_hf.scores import (
    AGGREGATIONS,
    MISSING_FUTURE,
    READS_FUTURES,
    READS_POSTERIOR,
    SCORES,
    WEIGHT_MAPS,
    map_range,
)

HARD_NEGATIVE_KEYS = ("task", "state", "task_or_state")
PAPER_WARMUP_STEPS = 3000
OFFLINE = "ptr_offline"
"""The preset that trains with weights which are known before the first step."""
AUTO = "auto"
"""As `weights`: inspect the dataset first."""
DEFAULT_PRESET = OFFLINE
"""The preset unless another is named: level with the oracle in docs/evidence.md, at the cost of plain post-training."""
WEIGHT_BOUNDS = 1e-12, 1e12
"""Weights are squared and summed in single precision."""
MOST = {
    "segment_length": 256,
    "num_belief_tokens": 256,
    "queue_size": 2**20,
    "queue_negatives": 2**16,
    "scorer_dim": 2**14,
    "head_dim": 2**14,
}
"""The largest values of fields that memory or time is proportional to: far above any use, whoever wrote the configuration."""

_WITHOUT_SCORER = {
    *("preset", "scorer", "num_belief_tokens", "chunk_size", "segment_length", "chunk_stride", "consequence_offset"),
    *("standardize_by", "alpha", "weight_min", "weights", "false_alarms"),
}
"""The fields that mean something where no scorer is trained."""


def _option(default: Any, help: str) -> Any:
    # None stands for "not given", whatever the default is; argparse is told of None too
    return field(default=None, metadata={"default": default, "help": help})


@dataclass(kw_only=True)
class PTRHyperparameters:
    """Hyperparameters of Posterior-Transition Reweighting.

    What is given wins; None, or leaving a field out, takes the preset's value, and where the preset sets none the paper's
    (Table 6, `DEFAULTS`). After construction every field holds the value that counts; `given` has those that were chosen.
    `dataclasses.replace` keeps the difference, so that `replace(values, preset="sft")` takes sft's values.

    Raises:
        TypeError: a value is of another type than the field's.
        ValueError: a value is out of its range or contradicts the preset; the sentence names the field and what it may be.

    Example:
        >>> PTRHyperparameters(preset="sft").alpha
        0.0
        >>> PTRHyperparameters(preset="ptr", num_belief_tokens=0).given
        {'preset': 'ptr', 'num_belief_tokens': 0}
    """

    # What was filled in, by name; not a field: `dataclasses.replace` hands it on, nothing else passes it.
    _filled: InitVar[Mapping[str, Any] | None] = None

    preset: str = _option(
        DEFAULT_PRESET, f"Named configuration that sets the fields it owns: one of {', '.join(PRESETS)}."
    )

    # Segments (4.1)
    chunk_size: int | None = _option(None, "L, actions per chunk. Default: the base policy's own.")
    segment_length: int | None = _option(
        None, "T, consecutive chunks of one episode in a training sample. Default: 4 with a scorer, 1 without."
    )
    chunk_stride: int | None = _option(
        None, "Frames between the starts of two chunks of a segment. Default: chunk_size."
    )
    consequence_offset: int | None = _option(
        None, "Δ, frames from a chunk's start to the observation taken as its consequence. Default: chunk_size."
    )

    # Belief (4.1)
    num_belief_tokens: int = _option(4, "M, belief tokens in the backbone's context. 0 leaves an ordinary policy.")
    belief_temperature: float = _option(1.0, "τ_tok, temperature of the tokenizer's softmax over time.")
    entropy_coef: float = _option(1e-3, "λ_ent, coefficient of the assignment entropy H_tok.")
    diversity_coef: float = _option(1e-3, "λ_div, coefficient of the assignment diversity D_tok.")

    # Consequence target (4.2)
    target_layer: int | None = _option(
        None, "Vision-tower layer of the consequence encoder (paper: 12 of 24). Default: half of the tower's depth."
    )
    ema_decay: float = _option(0.999, "μ, decay of the consequence encoder's moving average.")
    target_eps: float = _option(1e-6, "Floor of the norm of a consequence embedding.")

    # Scorer and candidates (4.2)
    scorer: bool = _option(True, "False trains the base policy alone (SFT): no futures are read, nothing is scored.")
    score: str = _option(
        "posterior", f"What weighs the loss: one of {', '.join(SCORES)}. 'posterior' is the paper's T."
    )
    aggregation: Literal["sample", "segment", "trajectory"] = _option(
        "sample",
        "Whose verdict weighs a chunk: its own (sample), its stretch's (segment) or its episode's (trajectory).",
    )
    aggregation_frames: int | None = _option(None, "Frames of a stretch for aggregation=segment. Default: two chunks.")
    standardize_by: str = _option(
        "all", "Whom a verdict is compared with: all, task, or a column of the dataset's episode metadata."
    )
    weight_map: Literal["paper", "rejection", "exponential", "calibrated"] = _option(
        "paper", "From verdict to weight: Eq. 21 on the verdict itself, or a map of its robust z-score."
    )
    missing_future: Literal["one", "episode", "batch"] = _option(
        "one", "Weight of a chunk without a recorded future: 1 (one), its episode's, or the batch's mean."
    )
    shuffle_consequences: bool = _option(False, "Control: give every chunk another chunk's future.")
    cross_fit: bool = _option(True, "Score every episode by a head that was trained on the others (two folds).")
    self_weighting: bool = _option(True, "Multiply the losses of the scores' own heads by the weights.")
    score_refresh_steps: int = _option(20, "Steps between two refreshes of the episodes' weights.")
    score_horizon: float = _option(32.0, "Visits that an episode's mean verdict looks back on.")
    head_dim: int = _option(128, "Hidden width of the heads of action_ and instruction_identification.")
    head_learning_rate: float | None = _option(
        None, "Learning rate of the side pathway (scorer, heads, belief). Default: the run's."
    )
    temperature: float = _option(0.12, "τ, temperature of the identification posterior (start value).")
    logit_clamp: float = _option(20.0, "Identification logits are clamped to ± this value.")
    scorer_dim: int = _option(256, "Hidden width of the scorer's head.")
    queue_size: int = _option(1024, "Past targets kept as candidates (first in, first out). 0: no queue.")
    queue_negatives: int = _option(64, "Negatives drawn from the queue for each sample, at most.")
    cross_rank_negatives: bool = _option(True, "Whether targets of the other processes join the candidates.")
    hard_negative_key: Literal["task", "state", "task_or_state"] = _option(
        "task_or_state",
        "What makes a queue entry a hard negative: the same task, a near proprioceptive state, or either.",
    )
    identification_coef: float = _option(0.05, "λ_id, coefficient of the identification loss.")
    ranking_coef: float = _option(0.25, "λ_rank, coefficient of the action-ranking loss.")
    detach_scorer_inputs: bool = _option(False, "Cut the scorer losses off from the policy (the paper does not).")
    consequence_discount: float = _option(1.0, "γ, factor γ^Δ' on the identification loss, Δ' = Δ / chunk_size.")
    scorer_warmup_steps: float = _option(
        0.05, "Steps with every weight at 1 while the scorer starts; below 1: a share of the run (paper: 3000 of 60k)."
    )

    # Weight (4.4)
    alpha: float = _option(1.0, "α in [0, 1], how far weights may leave 1. 0 is standard post-training.")
    beta: float = _option(1.5, "β, temperature of the weight exp(T/β) (start value).")
    weight_min: float = _option(0.25, "w_min, lower clip of exp(T/β).")
    weight_max: float = _option(4.0, "w_max, upper clip of exp(T/β).")

    # Adaptive scale controller (4.5)
    controller: bool = _option(True, "Whether τ, β and the hard-negative ratio adapt during training.")
    controller_interval: int = _option(10, "Optimiser steps between two controller updates.")
    controller_decay: float = _option(0.98, "Decay of the controller's moving averages.")
    temperature_min: float = _option(0.03, "Lower bound of τ.")
    temperature_max: float = _option(0.20, "Upper bound of τ.")
    beta_min: float = _option(0.5, "Lower bound of β.")
    beta_max: float = _option(3.0, "Upper bound of β.")
    hard_negative_ratio_max: float = _option(0.5, "Upper bound of ρ, the share of hard negatives.")

    # Weights that are known before training
    weights: str | None = _option(
        None,
        "Weights of the demonstrations to train with, known beforehand: auto inspects the dataset first, else a parquet or csv "
        "file (docs/weights.md). Goes with preset ptr_offline.",
    )
    false_alarms: float = _option(0.01, "Share of good episodes that the inspection of weights=auto may flag.")

    def __post_init__(self, _filled: Mapping[str, Any] | None) -> None:
        for name, value in (_filled or {}).items():
            if vars(self)[name] == value:
                setattr(self, name, None)
        vars(self)["_filled"] = {}
        self.apply_preset()
        self.check()

    def _fill(self, name: str, value: Any) -> None:
        if vars(self)[name] is None and value is not None:
            setattr(self, name, value)
            vars(self)["_filled"][name] = value

    def apply_preset(self) -> None:
        """Give the fields that are None the preset's value or the default; done at construction.

        Raises:
            ValueError: the preset is unknown, or a field has another value than the preset is named for.
        """
        self._fill("preset", DEFAULT_PRESET)
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; choose one of {', '.join(PRESETS)}.")
        preset = PRESETS[self.preset]
        self._check_types()
        for name in preset.named:
            value = vars(self)[name]
            if value is not None and value != preset.fields[name]:
                raise ValueError(
                    f"preset={self.preset!r} sets {name}={preset.fields[name]}, but {name}={value} was given; {self._remedy()}."
                )
        for name, default in DEFAULTS.items():
            self._fill(name, preset.fields.get(name, default))
        self._fill("segment_length", 4 if self.reads_futures or self.num_belief_tokens else 1)

    def _check_types(self) -> None:
        for item in fields(PTRHyperparameters):
            check_type(item.name, vars(self)[item.name], item.type)

    def _refuse_idle(self, names: Iterable[str]) -> None:
        """Refuse fields that say something about a scorer where the preset has none."""
        for name in names:
            if self.preset == OFFLINE and name not in _WITHOUT_SCORER:
                raise ValueError(
                    f"{name}={vars(self)[name]} has no effect with preset={OFFLINE!r}, which trains no scorer; {self._remedy()}."
                )

    def _remedy(self) -> str:
        if self.preset == OFFLINE:
            return "drop it, or name a preset that has one, such as preset='ptr' or preset='ptr_calibrated'"
        return "drop one of the two"

    @property
    def given(self) -> dict[str, Any]:
        """The method's fields that were given, not filled in by the preset or the defaults, by name."""
        filled, values = vars(self)["_filled"], self.hyperparameters().items()
        return {name: value for name, value in values if value is not None and (name, value) not in filled.items()}

    def with_options(self, **changes: Any) -> Self:
        """A copy with other options.

        `dataclasses.replace` cannot tell a value that it carries from one that it is given: an explicit value that equals
        what the old preset had filled in follows the new preset there, and is kept here.

        Args:
            changes: fields by name; None takes the preset's value.
        """
        carried = {name: value for name, value in vars(self)["_filled"].items() if name not in changes}
        return replace(self, _filled=carried, **changes)

    def check(self) -> None:
        """Refuse values of another type or outside their range, naming field, value and range; done at construction."""
        self._check_types()
        require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "in [0, 1]")
        require(self.weight_min > 0, "weight_min", self.weight_min, "positive")
        require(
            self.weight_min <= 1.0 <= self.weight_max,
            "weight_min, weight_max",
            (self.weight_min, self.weight_max),
            "ordered as weight_min <= 1 <= weight_max",
        )
        least, most = WEIGHT_BOUNDS
        for name in ("weight_min", "weight_max"):
            require(least <= vars(self)[name] <= most, name, vars(self)[name], f"between {least:g} and {most:g}")
        if self.queue_size:
            require(
                self.queue_negatives <= self.queue_size,
                "queue_negatives",
                self.queue_negatives,
                f"at most queue_size={self.queue_size}, or queue_size=0 to do without a queue",
            )
        for name in ("queue_size", "queue_negatives", "num_belief_tokens", "scorer_warmup_steps"):
            require(vars(self)[name] >= 0, name, vars(self)[name], "0 or more")
        for name in ("controller_interval", "scorer_dim"):
            require(vars(self)[name] >= 1, name, vars(self)[name], "1 or more")
        lengths = ("segment_length", "chunk_size", "chunk_stride", "consequence_offset", "aggregation_frames")
        for name in (*lengths, "target_layer"):
            value = vars(self)[name]
            require(value is None or value >= 1, name, value, "1 or more, or left out")
        for name, most in MOST.items():
            value = vars(self)[name]
            require(value is None or value <= most, name, value, f"at most {most}")
        for name in ("temperature", "beta", "belief_temperature", "logit_clamp", "target_eps"):
            require(vars(self)[name] > 0, name, vars(self)[name], "positive")
        for low, start, high in (
            ("temperature_min", "temperature", "temperature_max"),
            ("beta_min", "beta", "beta_max"),
        ):
            values = (vars(self)[low], vars(self)[start], vars(self)[high])
            require(values[0] <= values[1] <= values[2], f"{low}, {start}, {high}", values, "in rising order")
        for name in ("ema_decay", "controller_decay", "hard_negative_ratio_max", "consequence_discount"):
            require(0.0 <= vars(self)[name] <= 1.0, name, vars(self)[name], "in [0, 1]")
        key = self.hard_negative_key
        require(key in HARD_NEGATIVE_KEYS, "hard_negative_key", repr(key), f"one of {', '.join(HARD_NEGATIVE_KEYS)}")
        for name, known in (
            ("score", tuple(SCORES)),
            ("aggregation", AGGREGATIONS),
            ("weight_map", WEIGHT_MAPS),
            ("missing_future", MISSING_FUTURE),
        ):
            require(vars(self)[name] in known, name, repr(vars(self)[name]), f"one of {', '.join(known)}")
        for name in ("score_refresh_steps", "score_horizon", "head_dim"):
            require(vars(self)[name] >= 1, name, vars(self)[name], "1 or more")
        value = self.head_learning_rate
        require(value is None or value > 0, "head_learning_rate", value, "positive, or left out")
        require(
            self.aggregation != "sample" or self.weight_map == "paper",
            "aggregation, weight_map",
            (self.aggregation, self.weight_map),
            "trajectory or segment with any map, or sample with paper, which needs no comparison with other chunks",
        )
        if self.weights is not None and (self.scorer or self.preset == "sft"):
            does = "trains a scorer that weighs them" if self.scorer else "weighs none of them"
            raise ValueError(
                f"weights={self.weights} are known before training, but preset={self.preset!r} {does}: use "
                f"preset={OFFLINE!r}, or leave weights out."
            )
        self._refuse_idle(name for name in DEFAULTS if vars(self)[name] != DEFAULTS[name])
        require(0 < self.false_alarms <= 0.5, "false_alarms", self.false_alarms, "above 0 and at most 0.5")
        inspects = self.weights == AUTO or self.false_alarms == DEFAULTS["false_alarms"]
        require(
            inspects, "false_alarms", self.false_alarms, "left out where weights is not auto: nothing is inspected then"
        )
        if not self.scorer and self.weights is None and (self.alpha != 0.0 or self.num_belief_tokens != 0):
            raise ValueError(
                f"scorer=False trains the base policy alone, so alpha and num_belief_tokens must be 0, not {self.alpha} "
                f"and {self.num_belief_tokens}; use preset='sft'."
            )

    @property
    def is_paper(self) -> bool:
        """Whether the weight is the paper's own: Eq. 21 on each chunk's T."""
        return (self.score, self.aggregation, self.weight_map, self.missing_future) == (
            "posterior",
            "sample",
            "paper",
            "one",
        )

    @property
    def weight_range(self) -> tuple[float, float]:
        """The range that no chunk's weight can leave: what Eq. 30 bounds the shares of sources with."""
        if not self.scorer:
            return 1.0, 1.0
        return map_range(self.weight_map, self.alpha, self.weight_min, self.weight_max)

    @property
    def reads_posterior(self) -> bool:
        """Whether the paper's scorer f(h, e) has to run."""
        return bool(set(SCORES.get(self.score, ())) & set(READS_POSTERIOR))

    @property
    def reads_futures(self) -> bool:
        """Whether futures have to be read."""
        return self.scorer and bool(set(SCORES.get(self.score, ())) & set(READS_FUTURES))

    def hyperparameters(self) -> dict[str, Any]:
        """The method's fields alone, by name."""
        return {item.name: vars(self)[item.name] for item in fields(PTRHyperparameters)}


DEFAULTS: dict[str, Any] = {item.name: item.metadata["default"] for item in fields(PTRHyperparameters)}
"""The value of every field that neither the caller nor the preset sets: the paper's, by name."""


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than a field's.

    Args:
        name: of the field.
        value: the field's; whole numbers pass for floats, None where the hint allows it.
        hint: bool, int, float, str, a Literal (whose members are looked at elsewhere), or one of them with None.

    Raises:
        TypeError: another type.
        ValueError: a float that is not finite.
    """
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if value is None or len(kinds) != 1:
        return
    (kind,) = kinds
    whole, number = isinstance(value, Integral), isinstance(value, Real)
    fits = {
        bool: isinstance(value, bool),
        int: whole and not isinstance(value, bool),
        float: number and not isinstance(value, bool),
    }
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    if kind in words and not fits.get(kind, isinstance(value, str)):
        raise TypeError(f"{name}={value!r} must be {words[kind]}, not {type(value).__name__}.")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} is out of range: it must be finite.")


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a value out of its range.

    Raises:
        ValueError: `condition` does not hold; the sentence says what is expected.
    """
    if not condition:
        raise ValueError(f"{name}={value} is out of range: it must be {expected}.")
