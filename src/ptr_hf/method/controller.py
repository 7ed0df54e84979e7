"""AdaptiveScaleController (Section 4.5): temperature and β follow how well the scorer identifies.

At each logging step it takes exponential moving averages of the identification accuracy, the margin, the mean score
and the share of valid targets, then

    acc < 0.05                      ⇒  τ, β × 1.01      the task is too sharp for what the scorer can tell apart
    acc > 0.35 and margin > 0.10    ⇒  τ, β × 0.995     it is solved: sharpen
    ρ = 0.5 · clip((acc - 0.10) / (0.50 - 0.10), 0, 1)  and draw harder negatives

and clips all three to their bounds.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ptr_hf.method.numerics import NeverLowered

Statistic = float | Float[Tensor, ""]


class AdaptiveScaleController(NeverLowered):
    """Holds τ, β and ρ as 0-d float64 buffers and adapts them without reading the device.

    The first update takes the observed values as the averages: averages that start at zero would read as a failing
    scorer and raise τ for the first dozens of updates. An update with a value that is not finite (a window without
    a single target) is ignored.

    Args:
        temperature: initial τ.
        beta: initial β.
        decay: of the averages, in [0, 1).
        temperature_bounds: range of τ.
        beta_bounds: range of β.
        hard_negative_ratio_max: ρ at full accuracy.
        enabled: False keeps τ, β and ρ (at 0) as they are, and only averages.
        accuracy_low: below it τ and β grow.
        accuracy_high: above it, with the margin, they shrink.
        margin_threshold: margin from which a high accuracy counts, in logits.
        increase: factor of growth.
        decrease: factor of shrinking.
        ratio_accuracy_range: accuracies at which ρ leaves 0 and reaches its maximum.

    Raises:
        ValueError: if an initial value lies outside its bounds or a setting outside its range.

    Example:
        >>> controller = AdaptiveScaleController(temperature=0.12)
        >>> controller.update(accuracy=0.6, margin=0.5, score=1.0, valid_ratio=1.0)
        >>> float(controller.temperature) < 0.12
        True
    """

    temperature: Float[Tensor, ""]
    beta: Float[Tensor, ""]
    hard_negative_ratio: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    score: Float[Tensor, ""]
    valid_ratio: Float[Tensor, ""]
    updates: Int[Tensor, ""]

    def __init__(
        self,
        temperature: float = 0.12,
        beta: float = 1.5,
        decay: float = 0.98,
        temperature_bounds: tuple[float, float] = (0.03, 0.20),
        beta_bounds: tuple[float, float] = (0.5, 3.0),
        hard_negative_ratio_max: float = 0.5,
        enabled: bool = True,
        accuracy_low: float = 0.05,
        accuracy_high: float = 0.35,
        margin_threshold: float = 0.10,
        increase: float = 1.01,
        decrease: float = 0.995,
        ratio_accuracy_range: tuple[float, float] = (0.10, 0.50),
    ) -> None:
        super().__init__()
        for name, value, (low, high) in (
            ("temperature", temperature, temperature_bounds),
            ("beta", beta, beta_bounds),
        ):
            if not 0.0 < low <= value <= high:
                raise ValueError(f"{name} is {value}, its bounds are ({low}, {high}); need 0 < low <= {name} <= high.")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"The controller's decay is {decay}; choose it in [0, 1), e.g. 0.98.")
        if not 0.0 <= hard_negative_ratio_max <= 1.0:
            raise ValueError(f"hard_negative_ratio_max is {hard_negative_ratio_max}; it is a share, choose 0 to 1.")
        if not ratio_accuracy_range[0] < ratio_accuracy_range[1]:
            raise ValueError(f"ratio_accuracy_range is {ratio_accuracy_range}; its first value must be the smaller.")
        self.decay = decay
        self.temperature_bounds = temperature_bounds
        self.beta_bounds = beta_bounds
        self.hard_negative_ratio_max = hard_negative_ratio_max
        self.enabled = enabled
        self.accuracy_low = accuracy_low
        self.accuracy_high = accuracy_high
        self.margin_threshold = margin_threshold
        self.increase = increase
        self.decrease = decrease
        self.ratio_accuracy_range = ratio_accuracy_range
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float64))
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))
        for name in ("hard_negative_ratio", "accuracy", "margin", "score", "valid_ratio"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, accuracy: Statistic, margin: Statistic, score: Statistic, valid_ratio: Statistic) -> None:
        """One logging step's statistics, already averaged over the ranks.

        Args:
            accuracy: share of samples whose match has the top logit.
            margin: mean of match logit - best other.
            score: mean T.
            valid_ratio: share of chunks that have a target.
        """
        averages = (self.accuracy, self.margin, self.score, self.valid_ratio)
        values = [
            torch.as_tensor(value, dtype=self.accuracy.dtype, device=self.accuracy.device)
            for value in (accuracy, margin, score, valid_ratio)
        ]
        seen = torch.stack(values).isfinite().all()
        for average, value in zip(averages, values, strict=True):
            moved = torch.where(self.updates == 0, value, self.decay * average + (1.0 - self.decay) * value)
            average.copy_(torch.where(seen, moved, average))
        self.updates.add_(seen)
        if not self.enabled:
            return
        solved = (self.accuracy > self.accuracy_high) & (self.margin > self.margin_threshold)
        failing = self.accuracy < self.accuracy_low
        factor = torch.ones_like(self.temperature)
        factor = factor.masked_fill(seen & failing, self.increase).masked_fill(seen & solved, self.decrease)
        self.temperature.mul_(factor).clamp_(*self.temperature_bounds)
        self.beta.mul_(factor).clamp_(*self.beta_bounds)
        low, high = self.ratio_accuracy_range
        ratio = self.hard_negative_ratio_max * ((self.accuracy - low) / (high - low)).clamp(0.0, 1.0)
        self.hard_negative_ratio.copy_(torch.where(seen, ratio, self.hard_negative_ratio))
