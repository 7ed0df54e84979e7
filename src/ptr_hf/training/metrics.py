"""Metrics of a logging window: summed on the device, read once."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.method import GROUP_STATISTICS, ObjectiveOutput, group_statistics, share_bound, weight_bounds
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.report.dynamics import MOST_TASKS, weight_bin_edges, weight_histogram

_SMALLEST, _LARGEST = "weight_min", "weight_max"
_SUM, _WEIGHTS, _COUNT, _GROUPS = "sum.", "weights", "count", "groups."


class MetricsWindow:
    """Accumulates 0-d metrics and the step's weights until `flush`, which averages over steps and ranks.

    Every rank must add the same names; the extreme weights are the window's extremes, everything else its mean. What weighing
    does to every source and task is added up beside it, where there are several.

    Args:
        config: the run's hyperparameters, which bound its weights; without them no group is looked at.
        sources: names of the mixture's sources, in the order of their numbers.
        tasks: instructions, in the order of their numbers.
    """

    _sums: dict[str, Tensor]
    _weights: list[Tensor]
    _groups: dict[str, Float[Tensor, "groups statistics"]]
    _count: int

    def __init__(
        self, config: PTRHyperparameters | None = None, sources: Sequence[str] = (), tasks: Sequence[str] = ()
    ) -> None:
        self._config = config
        named = {"sources": tuple(sources), "tasks": tuple(tasks)} if config is not None else {}
        self._names = {kind: names for kind, names in named.items() if len(names) > 1}
        self.weight_range: tuple[float, float] | None = None
        """Of weights that are known before training, which the hyperparameters do not bound."""
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
            if self._config is not None:
                self._add_groups(output, self._config)
        self._count += 1

    def _add_groups(self, output: ObjectiveOutput, config: PTRHyperparameters) -> None:
        bounds = weight_bounds(config.alpha, config.weight_min, config.weight_max)
        for kind, group in (("sources", output.source), ("tasks", output.task)):
            if kind in self._names and group is not None:
                sums = group_statistics(output, group, len(self._names[kind]), bounds)
                self._groups[kind] = self._groups[kind] + sums if kind in self._groups else sums

    def flush(
        self, accelerator: Accelerator, bounds: tuple[float, float, float] | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The window's metrics, and what is no single number: the weight histogram, sources and tasks.

        Both are over all ranks, by name of their column in `ptr_dynamics.parquet`; the window starts anew.

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
        columns: dict[str, Any] = {}
        if bounds is not None and self._weights:
            edges = weight_bin_edges(*weight_bounds(*bounds))
            weights = accelerator.gather(torch.cat(self._weights))
            counts = weight_histogram(weights.double().cpu().numpy(), edges)
            columns = {"weight_histogram": counts.tolist(), "weight_bin_edges": list(edges)}
        for kind, sums in self._groups.items():
            everywhere = accelerator.gather(sums[None]).sum(dim=0)
            rows = _group_rows(self._names[kind], everywhere, scored=self._config is None or self._config.scorer)
            if kind == "tasks":
                rows = sorted(rows, key=lambda row: -row["chunks"])[:MOST_TASKS]
            columns[kind] = rows
        if self._groups and self._config is not None:
            low, high = self.weight_range or self._config.weight_range
            # a weight of 0 bounds nothing (Eq. 30)
            columns["share_bound"] = share_bound(low, high)[1] if low > 0 else None
        self.clear()
        return values, columns

    def state(self) -> dict[str, Tensor]:
        """What has been added since the last `flush`, for a checkpoint of this rank."""
        sums = {f"{_SUM}{name}": value for name, value in self._sums.items()}
        weights = {_WEIGHTS: torch.cat(self._weights)} if self._weights else {}
        groups = {f"{_GROUPS}{kind}": value for kind, value in self._groups.items()}
        return sums | weights | groups | {_COUNT: torch.tensor(self._count)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.clear()
        self._sums = {name.removeprefix(_SUM): value for name, value in state.items() if name.startswith(_SUM)}
        self._weights = [state[_WEIGHTS]] if _WEIGHTS in state else []
        groups = {kind: state[f"{_GROUPS}{kind}"] for kind in self._names if f"{_GROUPS}{kind}" in state}
        # the data may have got another source since; what is summed up then starts anew
        self._groups = {kind: sums for kind, sums in groups.items() if len(sums) == len(self._names[kind])}
        self._count = int(state[_COUNT])

    def clear(self) -> None:
        """Forget what was added."""
        self._sums = {}
        self._weights = []
        self._groups = {}
        self._count = 0


def logged_bounds(policy: PTRPolicy) -> tuple[float, float, float] | None:
    """(alpha, weight_min, weight_max) of the weights that a policy trains with, for the log; None without any."""
    if policy.frame_weights is not None:
        return (1.0, *policy.frame_weights.bounds)
    if policy.objective is None:
        return None
    config = policy.objective.config
    return config.alpha, config.weight_min, config.weight_max


def _group_rows(
    names: Sequence[str], sums: Float[Tensor, "groups statistics"], scored: bool = True
) -> list[dict[str, Any]]:
    """What the log keeps of every group, without a score where chunks are not scored; see `GROUP_FIELDS`."""
    groups = [dict(zip(GROUP_STATISTICS, row, strict=True)) for row in sums.tolist()]
    chunks, weight = (sum(group[name] for group in groups) for name in ("chunks", "weight"))
    return [
        {
            "name": name,
            "chunks": group["chunks"],
            "targets": group["targets"],
            "share": _ratio(group["chunks"], chunks),
            "weight_share": _ratio(group["weight"], weight),
            "weight": _ratio(group["weight"], group["chunks"]),
            "score": _ratio(group["score"], group["targets"]) if scored else None,
            "loss": _ratio(group["loss"], group["chunks"]),
            "at_floor": _ratio(group["at_floor"], group["targets"]),
            "at_ceiling": _ratio(group["at_ceiling"], group["targets"]),
        }
        for name, group in zip(names, groups, strict=True)
    ]


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
