"""The statistics that normalise a dataset's features: those of `meta/stats.json` where they are right, else computed anew.

LeRobot takes whatever the file says. A feature that the file does not name reaches the policy raw, another dataset's statistics
put it anywhere, and where two of them are equal the first value that differs becomes 1e8.
"""

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.compute_stats import (
    RunningQuantileStats,
    auto_downsample_height_width,
    get_feature_stats,
    sample_indices,
)
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import rename_stats
from tqdm.auto import tqdm

from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.pictures import is_depth
from ptr_hf.data.segments import ACTION, SegmentLayout

Stats = Mapping[str, Any]
"""LeRobot's statistics of one feature: mean, std, min, max, count and quantiles."""

READS: dict[NormalizationMode, tuple[str, ...]] = {
    NormalizationMode.IDENTITY: (),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""The statistics that each of LeRobot's modes reads."""
OF_ITSELF = {"groot": {FeatureType.STATE: NormalizationMode.MIN_MAX, FeatureType.ACTION: NormalizationMode.MIN_MAX}}
"""Policies that normalise in steps of their own, whatever their configuration says."""
NOT_FINITE = "are not finite"
LEROBOTS_BINS = 5000
"""Of the histogram from which LeRobot estimates quantiles: two that lie in one bin it cannot tell apart."""
LOOKED_AT = 100_000
"""Most frames that a median or a quantile is taken from; they are spread evenly."""

ONE_FRAME = SegmentLayout(None, (0,), 1, 1, None)

logger = logging.getLogger(__name__)


def normalized_features(config: PreTrainedConfig) -> dict[str, NormalizationMode]:
    """How a base policy normalises its features, by its own names for them; what it takes as it is is left out."""
    mapping = vars(config).get("normalization_mapping", {})
    modes = {FeatureType(kind): NormalizationMode(mode) for kind, mode in mapping.items()}
    modes |= OF_ITSELF.get(config.type, {})
    features = {**(config.input_features or {}), **(config.output_features or {})}
    found = {key: modes.get(feature.type, NormalizationMode.IDENTITY) for key, feature in features.items()}
    return {key: mode for key, mode in found.items() if mode is not NormalizationMode.IDENTITY}


def policy_statistics(
    config: PreTrainedConfig,
    meta: LeRobotDatasetMetadata,
    dataset: LeRobotDataset | None,
    renames: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """`sound_statistics` of all that a base policy normalises, named as in the policy.

    Args:
        config: of the base policy.
        meta, dataset: as there.
        renames: dataset key -> policy key.
    """
    renames = dict(renames or {})
    modes = normalized_features(config)
    wanted = {key: modes[name] for key in meta.features if (name := renames.get(key, key)) in modes}
    relative = bool(vars(config).get("use_relative_actions"))
    return rename_stats(sound_statistics(meta, dataset, wanted, relative), renames)


def with_statistics(meta: LeRobotDatasetMetadata, statistics: dict[str, dict[str, Any]]) -> LeRobotDatasetMetadata:
    """The metadata with other statistics; what was given stays as it is."""
    changed = copy.copy(meta)
    changed.stats = statistics
    return changed


def sound_statistics(
    meta: LeRobotDatasetMetadata,
    dataset: LeRobotDataset | None,
    modes: Mapping[str, NormalizationMode],
    relative_actions: bool = False,
) -> dict[str, dict[str, Any]]:
    """The statistics of `meta/stats.json`, with those of the features named put right.

    What is missing, not finite, of another shape, or certainly not of these data is computed anew, and a warning says so:
    states and actions over all finite frames, pictures over as many as LeRobot takes. The file and `meta` do not change.

    Args:
        meta: of the dataset.
        dataset: open; where it was opened with some episodes, theirs are the frames. None: nothing can be computed.
        modes: dataset key -> how it is normalised.
        relative_actions: the policy reads actions relative to the state, and so are their statistics.

    Raises:
        ValueError: statistics are not right and cannot be computed, or no frame of a feature is finite.
    """
    statistics = dict(meta.stats or {})
    for key, mode in modes.items():
        feature, recorded = meta.features[key], statistics.get(key) or {}
        fault = fault_of(recorded, mode, feature)
        if key == ACTION and relative_actions:
            if fault is not None:
                raise ValueError(
                    f"{_told(meta, key, fault)}, and the policy reads actions relative to the state: write them by "
                    f"`{_command(meta)} --operation.relative_action true`."
                )
        elif dataset is None:
            if fault is not None:
                raise ValueError(f"{_told(meta, key, fault)}: {_remedy(meta, key, fault)}.")
        elif key in meta.camera_keys:
            if fault is not None:
                logger.warning("%s: computed from its pictures.", _told(meta, key, fault))
                statistics[key] = picture_statistics(dataset, key)
        else:
            column = column_of(dataset, key)
            finite = column[np.isfinite(column).all(axis=1)]
            if not len(finite):
                raise ValueError(
                    f"No frame of {meta.repo_id} has a finite {key!r}, so there is nothing to learn from it: record it "
                    "again, or leave the feature out of the policy."
                )
            if fault is None and (found := foreign(recorded, finite, feature, len(column) == meta.total_frames)):
                fault = f"are not of these data ({found})"
            fault = fault or _stale(recorded, finite, mode, feature)
            if fault is not None:
                bad = len(column) - len(finite)
                frames = (
                    f"those {len(finite)} of its {len(column)} frames that are" if bad else f"its {len(column)} frames"
                )
                logger.warning("%s: computed from %s.", _told(meta, key, fault), frames)
                recorded = _statistics_of(finite, tuple(feature["shape"]))
            statistics[key], close = _told_apart(recorded, finite, mode)
            if close.any():
                logger.warning(
                    "%s: exact ones are taken there.",
                    _told(meta, key, f"do not tell {' from '.join(READS[mode])} in {named_dimensions(close, feature)}"),
                )
    return statistics


def column_of(dataset: LeRobotDataset, key: str) -> Float[np.ndarray, "frames numbers"]:
    """All recorded values of a feature that is no picture."""
    column = dataset.hf_dataset.data.column(key)
    values = pa.chunked_array(
        [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    )
    while (
        pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)
    ):
        values = pc.list_flatten(values)
    return values.cast(pa.float64()).to_numpy().reshape(len(column), -1)


def foreign(
    recorded: Stats, values: Float[np.ndarray, "frames numbers"], feature: Mapping[str, Any], whole: bool
) -> str | None:
    """Where values lie, if these cannot be their statistics, whatever their distribution; None if they can.

    Outliers do not matter: a mean lies within one deviation of the median, and nine frames of ten within nine deviations.

    Args:
        recorded: the statistics.
        values: of finite frames.
        feature: as the dataset describes it.
        whole: they are all frames of the dataset, not those of some episodes.
    """
    known = {
        name: np.asarray(value, dtype=np.float64).reshape(-1) for name, value in recorded.items() if name != "count"
    }
    few = values[:: max(1, len(values) // LOOKED_AT)]
    low, middle, high = np.quantile(few, (0.05, 0.5, 0.95), axis=0)
    wrong = np.zeros(values.shape[1], dtype=bool)
    if {"min", "max"} <= known.keys():
        span = known["max"] - known["min"]
        margin = 0.1 * span + 1e-6 * (1.0 + np.abs(known["max"]) + np.abs(known["min"]))
        wrong |= (middle < known["min"] - margin) | (middle > known["max"] + margin) | (high - low > span + 2 * margin)
    if {"mean", "std"} <= known.keys():
        # LeRobot's deviation in single precision is no better than this
        rounding = 1e-3 * (1.0 + np.abs(known["mean"]))
        wrong |= whole & (np.abs(middle - known["mean"]) > 2 * known["std"] + rounding)
        wrong |= whole & (known["std"] > 5 * values.std(axis=0) + rounding)
        wrong |= whole & (high - low > 9 * known["std"] + rounding)
    if not wrong.any():
        return None
    place = int(wrong.argmax())
    bounds = ("min", "max") if {"min", "max"} <= known.keys() else ("mean", "std")
    first, second = (known[name][place] for name in bounds)
    return (
        f"dimension {named_dimensions(wrong, feature)}: most values lie between {low[place]:.4g} and {high[place]:.4g}, by the "
        f"statistics {bounds[0]} is {first:.4g} and {bounds[1]} {second:.4g}"
    )


def constant(recorded: Stats, mode: NormalizationMode) -> Bool[np.ndarray, "*shape"]:
    """Where a feature does not vary by its statistics, to within rounding, so that nothing can be divided by how far it does.

    NaN counts as constant.
    """
    first, second = (np.asarray(recorded[name], dtype=np.float64) for name in READS[mode])
    found = _no_spread(first, second if mode is NormalizationMode.MEAN_STD else second - first)
    if {"min", "max"} <= recorded.keys():
        lowest, highest = (np.asarray(recorded[name], dtype=np.float64) for name in ("min", "max"))
        found = found | _no_spread(lowest, highest - lowest)
    return found


def named_dimensions(chosen: Bool[np.ndarray, " numbers"], feature: Mapping[str, Any] | None = None) -> str:
    """Dimensions of a vector for a message: their numbers, and their names where the dataset has some."""
    names = (feature or {}).get("names")
    if isinstance(names, dict):
        names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
    places = np.flatnonzero(chosen).tolist()
    told = [f"{place} ({names[place]})" if names and len(names) == len(chosen) else str(place) for place in places]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")


def _no_spread(value: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return ~(spread > np.maximum(1e-8, 1e-6 * np.abs(value)))


def fault_of(recorded: Stats, mode: NormalizationMode, feature: Mapping[str, Any]) -> str | None:
    """What is wrong with statistics whatever the data are, as the end of a sentence; None where nothing is.

    Args:
        recorded: of one feature.
        mode: how it is normalised.
        feature: as the dataset describes it.
    """
    if not recorded:
        return "are missing"
    lacking = [name for name in READS[mode] if name not in recorded]
    if lacking:
        return f"lack {', '.join(lacking)}"
    values = {name: np.asarray(value, dtype=np.float64) for name, value in recorded.items() if name != "count"}
    if not all(np.isfinite(value).all() for value in values.values()):
        return NOT_FINITE
    shape = tuple(feature["shape"])
    picture = feature["dtype"] in ("image", "video")
    for name, value in values.items():
        # of pictures one number a channel
        if value.size != (min(shape) if picture else math.prod(shape)):
            return f"are of another shape ({name} has {value.size} numbers, and the feature is {shape})"
    if picture and not is_depth(feature) and any(values[name].max() > 1.5 for name in READS[mode]):
        return "are those of pictures from 0 to 255, and LeRobot reads them from 0 to 1"
    return None


def _stale(
    recorded: Stats, values: Float[np.ndarray, "frames numbers"], mode: NormalizationMode, feature: Mapping[str, Any]
) -> str | None:
    """Why statistics that say that something is constant are wrong: it varies."""
    spread = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
    }
    basis = NormalizationMode.MIN_MAX if mode in (NormalizationMode.QUANTILES, NormalizationMode.QUANTILE10) else mode
    if not set(READS[basis]) <= recorded.keys():
        return None
    wrong = constant(recorded, basis).reshape(-1) & ~constant(spread, basis).reshape(-1)
    return f"say that dimension {named_dimensions(wrong, feature)} is constant, and it varies" if wrong.any() else None


def _told_apart(
    recorded: Stats, values: Float[np.ndarray, "frames numbers"], mode: NormalizationMode
) -> tuple[dict[str, Any], Bool[np.ndarray, " numbers"]]:
    """Statistics whose two quantiles differ wherever the feature varies: exact ones, or the extremes where these agree too.

    A gripper that is closed in 99 of 100 frames has q01 = q99; and so has what is constant in every episode, since LeRobot
    averages the quantiles of episodes.

    Returns:
        the statistics, and where they were changed.
    """
    result = dict(recorded)
    if mode not in (NormalizationMode.QUANTILES, NormalizationMode.QUANTILE10):
        return result, np.zeros(values.shape[1], dtype=bool)
    names = READS[mode]
    low, high = (np.asarray(recorded[name], dtype=np.float64).reshape(-1) for name in names)
    lowest, highest = values.min(axis=0), values.max(axis=0)
    close = (high - low <= (highest - lowest) / LEROBOTS_BINS) & ~_no_spread(lowest, highest - lowest)
    if not close.any():
        return result, close
    few = values[:: max(1, len(values) // LOOKED_AT)]
    exact = np.quantile(few, [int(name[1:]) / 100 for name in names], axis=0)
    same = _no_spread(exact[0], exact[1] - exact[0])
    for name, before, estimate, extreme in zip(names, (low, high), exact, (lowest, highest), strict=True):
        shape = np.shape(recorded[name])
        result[name] = np.where(close, np.where(same, extreme, estimate), before).reshape(shape)
    return result, close


def _statistics_of(values: Float[np.ndarray, "frames numbers"], shape: tuple[int, ...]) -> dict[str, Any]:
    # in double precision, as LeRobot sums squares, which large values overflow in single
    computed = get_feature_stats(values, axis=0, keepdims=False)
    return {name: value if name == "count" else value.reshape(shape) for name, value in computed.items()}


def picture_statistics(dataset: LeRobotDataset, key: str) -> dict[str, np.ndarray]:
    """Per channel, each of shape (channels, 1, 1), over frames that are spread over the dataset, as many as LeRobot takes.

    Args:
        dataset: open; its image transforms are left out.
        key: of the camera.
    """
    plain = open_dataset(dataset, ONE_FRAME)
    plain.clear_image_transforms()
    running = RunningQuantileStats()
    places = sample_indices(len(plain))
    for place in tqdm(places, desc=f"statistics of {key}", unit="frame"):
        picture = plain[place][key]
        scaled = picture.float() / 255.0 if picture.dtype == torch.uint8 else picture.float()
        small = auto_downsample_height_width(scaled.numpy())
        running.update(small.reshape(len(small), -1).T.astype(np.float64))
    found = running.get_statistics()
    return {
        name: np.array([len(places)]) if name == "count" else np.asarray(value).reshape(-1, 1, 1)
        for name, value in found.items()
    }


def _told(meta: LeRobotDatasetMetadata, key: str, fault: str) -> str:
    return f"The statistics of {key!r} in meta/stats.json of {meta.repo_id} {fault}"


def _remedy(meta: LeRobotDatasetMetadata, key: str, fault: str) -> str:
    if fault == NOT_FINITE:
        return (
            "LeRobot computes them over all frames, of which some are not finite; PTRTrainer leaves these out, where it reads "
            "the dataset itself and not a stream of it"
        )
    return f"write them by `{_command_for_pictures(meta) if key in meta.camera_keys else _command(meta)}`"


def _command(meta: LeRobotDatasetMetadata) -> str:
    """What writes a dataset's statistics anew, in place; LeRobot leaves pictures out of it, whatever it is told."""
    place = f"--repo_id {meta.repo_id} --root {meta.root} --new_repo_id {meta.repo_id} --new_root {meta.root}"
    return f"lerobot-edit-dataset {place} --operation.type recompute_stats --operation.overwrite true"


def _command_for_pictures(meta: LeRobotDatasetMetadata) -> str:
    """What writes all statistics anew, by what LeRobot's script does before it pushes the dataset to the Hub."""
    return (
        'python -c "from lerobot.datasets import LeRobotDataset, write_stats; '
        "from lerobot.scripts.augment_dataset_quantile_stats import compute_quantile_stats_for_dataset as compute; "
        f"data = LeRobotDataset('{meta.repo_id}', root='{meta.root}'); write_stats(compute(data), data.root)\""
    )
