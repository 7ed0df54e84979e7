"""Metrics of a logging window: summed on the device, read once."""

from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from ptr_hf.method import ObjectiveOutput, weight_bounds
from ptr_hf.report import weight_bin_edges

_SMALLEST, _LARGEST = "weight_min", "weight_max"
_SUM, _WEIGHTS, _COUNT = "sum.", "weights", "count"


class MetricsWindow:
    """Accumulates 0-d metrics and the step's weights until `flush`, which averages over steps and ranks.

    Every rank must add the same names; the extreme weights are the window's extremes, everything else its mean.
    """

    _sums: dict[str, Tensor]
    _weights: list[Tensor]
    _count: int

    def __init__(self) -> None:
        self.clear()

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, metrics: dict[str, Float[Tensor, ""]], output: ObjectiveOutput | None = None) -> None:
        """Add a micro-batch's metrics; nothing leaves the device."""
        for name, value in metrics.items():
            value = value.detach().double()
            if name not in self._sums:
                self._sums[name] = value
            elif name == _SMALLEST:
                self._sums[name] = torch.minimum(self._sums[name], value)
            elif name == _LARGEST:
                self._sums[name] = torch.maximum(self._sums[name], value)
            else:
                self._sums[name] = self._sums[name] + value
        if output is not None:
            self._weights.append(output.weight.masked_fill(~output.target_valid, torch.nan))
        self._count += 1

    def flush(
        self, accelerator: Accelerator, bounds: tuple[float, float, float] | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The window's metrics and weight histogram, over all ranks; the window starts anew.

        Args:
            accelerator: gathers over ranks.
            bounds: (alpha, weight_min, weight_max), which fix the histogram's bins; None without a scorer.
        """
        names = list(self._sums)
        gathered = accelerator.gather(torch.stack([self._sums[name] for name in names])[None])
        means = gathered.mean(dim=0) / self._count
        values = dict(zip(names, means.tolist(), strict=True))
        for name, pick in ((_SMALLEST, torch.amin), (_LARGEST, torch.amax)):
            if name in values:
                values[name] = float(pick(gathered[:, names.index(name)]))
        histogram: dict[str, Any] = {}
        if bounds is not None and self._weights:
            edges = weight_bin_edges(*weight_bounds(*bounds))
            weights = accelerator.gather(torch.cat(self._weights))
            weights = weights[weights.isfinite()].double().cpu().clamp(float(edges[0]), float(edges[-1]))
            counts = torch.histogram(weights, torch.as_tensor(edges, dtype=torch.float64)).hist
            histogram = {"weight_histogram": counts.long().tolist(), "weight_bin_edges": list(edges)}
        self.clear()
        return values, histogram

    def state(self) -> dict[str, Tensor]:
        """What has been added since the last `flush`, for a checkpoint of this rank."""
        sums = {f"{_SUM}{name}": value for name, value in self._sums.items()}
        weights = {_WEIGHTS: torch.cat(self._weights)} if self._weights else {}
        return sums | weights | {_COUNT: torch.tensor(self._count)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.clear()
        self._sums = {name.removeprefix(_SUM): value for name, value in state.items() if name.startswith(_SUM)}
        self._weights = [state[_WEIGHTS]] if _WEIGHTS in state else []
        self._count = int(state[_COUNT])

    def clear(self) -> None:
        """Forget what was added."""
        self._sums = {}
        self._weights = []
        self._count = 0
