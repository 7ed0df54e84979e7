"""The method's hyperparameters: one schema for `PTRConfig`, `PTRTrainingArguments` and every command line."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

HARD_NEGATIVE_KEYS = ("task", "state", "task_or_state")
PAPER_WARMUP_STEPS = 3000

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's method (Table 6).
    "ptr": {},
    # The paper's SFT + Belief: every part runs, no weight moves.
    "sft_belief": {"alpha": 0.0},
    # Plain post-training: the base policy's own loss, bit for bit.
    "sft": {"alpha": 0.0, "num_belief_tokens": 0, "scorer": False},
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class PTRHyperparameters:
    """Hyperparameters of Posterior-Transition Reweighting; the defaults are the paper's (Table 6).

    Raises:
        ValueError: a value is out of its range; the sentence names the field and the range.
    """

    preset: str = _option("ptr", f"Named configuration that sets the fields it owns: one of {', '.join(PRESETS)}.")

    # Segments (4.1)
    chunk_size: int | None = _option(None, "L, actions per chunk. None: the base policy's own.")
    segment_length: int | None = _option(
        None, "T, consecutive chunks of one episode in a training sample. None: 4 with a scorer, 1 without."
    )
    chunk_stride: int | None = _option(None, "Frames between the starts of two chunks of a segment. None: chunk_size.")
    consequence_offset: int | None = _option(
        None, "Δ, frames from a chunk's start to the observation taken as its consequence. None: chunk_size."
    )

    # Belief (4.1)
    num_belief_tokens: int = _option(4, "M, belief tokens in the backbone's context. 0 leaves an ordinary policy.")
    belief_temperature: float = _option(1.0, "τ_tok, temperature of the tokenizer's softmax over time.")
    entropy_coef: float = _option(1e-3, "λ_ent, coefficient of the assignment entropy H_tok.")
    diversity_coef: float = _option(1e-3, "λ_div, coefficient of the assignment diversity D_tok.")

    # Consequence target (4.2)
    target_layer: int | None = _option(
        None, "Vision-tower layer of the consequence encoder (paper: 12 of 24). None: half of the tower's depth."
    )
    ema_decay: float = _option(0.999, "μ, decay of the consequence encoder's moving average.")
    target_eps: float = _option(1e-6, "Floor of the norm of a consequence embedding.")

    # Scorer and candidates (4.2)
    scorer: bool = _option(True, "False trains the base policy alone (SFT): no futures are read, nothing is scored.")
    score: str = _option("posterior", "What weighs the loss. 'posterior' is the paper's T.")
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

    def apply_preset(self) -> None:
        """Give the fields that the preset owns its values; a field set to something else is a contradiction."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; choose one of {', '.join(PRESETS)}.")
        defaults = {item.name: item.default for item in fields(PTRHyperparameters)}
        for name, value in PRESETS[self.preset].items():
            current = vars(self)[name]
            if current not in (value, defaults[name]):
                raise ValueError(
                    f"preset={self.preset!r} sets {name}={value}, but {name}={current} was given; drop one of the two."
                )
            setattr(self, name, value)
        if self.segment_length is None:
            self.segment_length = 4 if self.scorer else 1

    def check(self) -> None:
        """Refuse values outside their range, naming field, value and range."""
        _require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "in [0, 1]")
        _require(self.weight_min > 0, "weight_min", self.weight_min, "positive")
        _require(
            self.weight_min <= 1.0 <= self.weight_max,
            "weight_min, weight_max",
            (self.weight_min, self.weight_max),
            "ordered as weight_min <= 1 <= weight_max",
        )
        if self.queue_size:
            _require(
                self.queue_negatives <= self.queue_size,
                "queue_negatives",
                self.queue_negatives,
                f"at most queue_size={self.queue_size}, or queue_size=0 to do without a queue",
            )
        for name in ("queue_size", "queue_negatives", "num_belief_tokens", "scorer_warmup_steps"):
            _require(vars(self)[name] >= 0, name, vars(self)[name], "0 or more")
        for name in ("controller_interval", "scorer_dim"):
            _require(vars(self)[name] >= 1, name, vars(self)[name], "1 or more")
        for name in ("segment_length", "chunk_size", "chunk_stride", "consequence_offset", "target_layer"):
            value = vars(self)[name]
            _require(value is None or value >= 1, name, value, "1 or more, or left out")
        for name in ("temperature", "beta", "belief_temperature", "logit_clamp", "target_eps"):
            _require(vars(self)[name] > 0, name, vars(self)[name], "positive")
        for low, start, high in (
            ("temperature_min", "temperature", "temperature_max"),
            ("beta_min", "beta", "beta_max"),
        ):
            values = (vars(self)[low], vars(self)[start], vars(self)[high])
            _require(values[0] <= values[1] <= values[2], f"{low}, {start}, {high}", values, "in rising order")
        for name in ("ema_decay", "controller_decay", "hard_negative_ratio_max", "consequence_discount"):
            _require(0.0 <= vars(self)[name] <= 1.0, name, vars(self)[name], "in [0, 1]")
        key = self.hard_negative_key
        _require(key in HARD_NEGATIVE_KEYS, "hard_negative_key", repr(key), f"one of {', '.join(HARD_NEGATIVE_KEYS)}")
        _require(self.score == "posterior", "score", repr(self.score), "'posterior' (the paper's T)")
        if not self.scorer and (self.alpha != 0.0 or self.num_belief_tokens != 0):
            raise ValueError(
                f"scorer=False trains the base policy alone, so alpha and num_belief_tokens must be 0, not {self.alpha} "
                f"and {self.num_belief_tokens}; use preset='sft'."
            )

    def hyperparameters(self) -> dict[str, Any]:
        """The method's fields alone, by name."""
        return {item.name: vars(self)[item.name] for item in fields(PTRHyperparameters)}


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} is out of range: it must be {expected}.")
