"""Statistics of every source of a mixture, as the offset and scale that normalise it: x' = (x - offset) / scale.

One form serves all of LeRobot's normalisation modes, and a row of a batch needs no more than the number of its source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import OBS_STATE
from numpy.typing import NDArray
from torch import Tensor

from ptr_hf.data.mixture.metadata import MixtureMetadata, Source
from ptr_hf.data.normalization import READS, Stats, constant, sound_statistics
from ptr_hf.data.segments import ACTION


@dataclass(frozen=True)
class Placed:
    """One source's statistics of a feature in the shape that all sources share.

    Attributes:
        values: statistic -> (size, ...) array, NaN in the slots that the source does not use.
        count: frames.
    """

    values: dict[str, NDArray[np.float64]]
    count: int

    @classmethod
    def in_slots(cls, stats: Stats, positions: Sequence[int], size: int) -> "Placed":
        """The statistics of a vector, each entry moved to its slot."""
        own = cls.of_frames(stats)
        values: dict[str, NDArray[np.float64]] = {name: np.full(size, np.nan) for name in own.values}
        for name, value in own.values.items():
            values[name][list(positions)] = value.reshape(-1)
        return cls(values, own.count)

    @classmethod
    def of_frames(cls, stats: Stats) -> "Placed":
        """The statistics of a camera, per channel."""
        values = {name: np.asarray(value, dtype=np.float64) for name, value in stats.items() if name != "count"}
        return cls(values, int(np.asarray(stats.get("count", 1)).reshape(-1)[0]))

    def within(self, other: "Placed") -> "Placed":
        """These statistics in the entries that ``other`` has, NaN elsewhere."""
        known = np.isfinite(next(iter(other.values.values())))
        return Placed({name: np.where(known, value, np.nan) for name, value in self.values.items()}, self.count)


def pooled(parts: Sequence[Placed]) -> Placed:
    """Statistics of all frames of several sources, entry by entry over the sources that have it.

    Mean, deviation and extremes are exact; a quantile is the mean of the sources', as in LeRobot. One source's come back
    unchanged.
    """
    if len(parts) == 1:
        return parts[0]
    names = set.intersection(*(set(part.values) for part in parts))
    stacked = {name: np.stack([part.values[name] for part in parts]) for name in names}
    some = next(iter(stacked.values()))
    known = np.isfinite(some)
    weight = known * np.array([part.count for part in parts], dtype=np.float64).reshape(-1, *[1] * (some.ndim - 1))
    nowhere = ~known.any(axis=0)
    weight = weight / np.where(nowhere, 1.0, weight.sum(axis=0))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(nowhere, np.nan, (weight * np.where(known, values, 0.0)).sum(axis=0))

    result = {name: mean(values) for name, values in stacked.items() if name not in ("std", "min", "max")}
    if "std" in stacked:
        square = mean(stacked["std"] ** 2 + stacked["mean"] ** 2)
        result["std"] = np.sqrt(np.maximum(square - result["mean"] ** 2, 0.0))
    for name, pick, empty in (("min", np.min, np.inf), ("max", np.max, -np.inf)):
        if name in stacked:
            result[name] = np.where(nowhere, np.nan, pick(np.where(known, stacked[name], empty), axis=0))
    return Placed(result, sum(part.count for part in parts))


def affine(
    placed: Placed, mode: NormalizationMode, what: str
) -> tuple[Float[Tensor, "size *rest"], Float[Tensor, "size *rest"]]:
    """Offset and scale of LeRobot's normalisation mode; (0, 1) in unused slots, and scale 1 where nothing varies.

    Args:
        placed: the statistics.
        mode: `MEAN_STD` (mean 0, deviation 1), `MIN_MAX` and the quantile modes (to [-1, 1]) or `IDENTITY`.
        what: is normalised, for the error message.

    Raises:
        ValueError: the statistics lack what the mode reads.
    """
    values = placed.values
    missing = [name for name in READS[mode] if name not in values]
    if missing:
        raise ValueError(
            f"The policy normalises {what} by {mode.value}, and its statistics have no {', '.join(missing)}: renew the "
            "dataset's meta/stats.json with LeRobot's augment_dataset_quantile_stats.py."
        )
    shape = next(iter(values.values())).shape
    if mode is NormalizationMode.IDENTITY:
        return torch.zeros(shape), torch.ones(shape)
    first, second = (values[name] for name in READS[mode])
    if mode is NormalizationMode.MEAN_STD:
        offset, scale = first, second
    else:
        offset, scale = (first + second) / 2, (second - first) / 2
    unused = ~np.isfinite(offset)
    offset, scale = np.where(unused, 0.0, offset), np.where(unused | constant(values, mode), 1.0, scale)
    return torch.from_numpy(offset).float(), torch.from_numpy(scale).float()


def mixture_statistics(
    meta: MixtureMetadata,
    modes: Mapping[FeatureType, NormalizationMode] | Mapping[str, NormalizationMode],
    datasets: Sequence[LeRobotDataset] | None = None,
) -> dict[str, Float[Tensor, "sources *rest"]]:
    """What normalises every source's samples: `<key>.offset` and `<key>.scale`, stacked by source.

    Args:
        meta: of the mixture; its configuration says over whom statistics are pooled.
        modes: the policy's normalization_mapping.
        datasets: open, by source; where one's statistics are not right they are computed anew from it.

    Raises:
        ValueError: statistics that a mode needs are missing or wrong, and cannot be computed.
    """
    by_kind = {FeatureType(kind): NormalizationMode(mode) for kind, mode in modes.items()}
    sound = [
        sound_statistics(source.meta, None if datasets is None else datasets[source.number], _modes_of(source, by_kind))
        for source in meta.sources
    ]
    groups: dict[str, list[int]] = {}
    for source in meta.sources:
        key = {"source": source.name, "embodiment": source.robot.name, "pooled": ""}[meta.config.statistics]
        groups.setdefault(key, []).append(source.number)
    tensors: dict[str, Tensor] = {}
    for key in meta.features:
        kind = {ACTION: FeatureType.ACTION, OBS_STATE: FeatureType.STATE}.get(key, FeatureType.VISUAL)
        mode = by_kind.get(kind, NormalizationMode.IDENTITY)
        of: dict[int, Placed] = {}
        size = len(meta.space if key == ACTION else meta.state_space)
        for source, stats in zip(meta.sources, sound, strict=True):
            if kind is FeatureType.VISUAL:
                own = next((name for name, called in source.cameras.items() if called == key), None)
                if own is not None and own in stats:
                    of[source.number] = Placed.of_frames(stats[own])
            elif key in stats and (slots := source.action if key == ACTION else source.state):
                of[source.number] = Placed.in_slots(stats[key], slots, size)
        if mode is NormalizationMode.IDENTITY and kind is FeatureType.VISUAL:
            continue
        shape = (3, 1, 1) if kind is FeatureType.VISUAL else (size,)
        offset, scale = torch.zeros(len(sound), *shape), torch.ones(len(sound), *shape)
        for members in groups.values():
            having = [number for number in members if number in of]
            if having:
                what = f"{key} of {', '.join(meta.names[number] for number in having)}"
                together = pooled([of[number] for number in having])
                for number in having:
                    # a slot that the source lacks holds zeros, which stay zeros
                    offset[number], scale[number] = affine(together.within(of[number]), mode, what)
        tensors[f"{key}.offset"], tensors[f"{key}.scale"] = offset, scale
    return tensors


def _modes_of(source: Source, by_kind: Mapping[FeatureType, NormalizationMode]) -> dict[str, NormalizationMode]:
    """How the features of a source are normalised, those that are not left out."""
    kinds = dict.fromkeys(source.cameras, FeatureType.VISUAL) | {ACTION: FeatureType.ACTION}
    if source.state:
        kinds[OBS_STATE] = FeatureType.STATE
    modes = {key: by_kind.get(kind, NormalizationMode.IDENTITY) for key, kind in kinds.items()}
    return {key: mode for key, mode in modes.items() if mode is not NormalizationMode.IDENTITY}
