"""The weights that a run trains with from its first step: those of a file, or of an inspection made before it."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rich.console import Console

from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.hyperparameters import AUTO
from ptr_hf.scores import FrameWeights
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, DatasetScores, weights_by_frame
from ptr_hf.scoring.weight_files import FrameTable, digest, frame_tables, in_training_order, read_weights, weights_file

INSPECTION_FOLDER = "inspection"
KEY_FILE = "key.json"
HASHED = 512 * 2**20
"""Bytes of a dataset's tables up to which their content is compared, above it their sizes and times."""
BINS = 20

logger = logging.getLogger(__name__)

type Metadata = LeRobotDatasetMetadata | MixtureMetadata


def training_weights(
    config: PTRConfig,
    given: Any,
    meta: Metadata,
    *,
    folder: Path | None = None,
    revision: str | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> FrameWeights | None:
    """The weights that a configuration names, for the data that is trained on.

    Args:
        config: its `weights` name a file, or ask for an inspection (`auto`); its `alpha` says how far they may leave 1.
        given: the data as the user gave it; what is inspected.
        meta: of the data.
        folder: where an inspection is kept and looked for; None keeps none.
        revision: of the dataset on the Hub.
        seed: of an inspection.
        console: that shows what an inspection found; None shows nothing.

    Returns:
        None where the configuration names none.

    Raises:
        ValueError: the file does not match the data, or the data cannot be inspected.
    """
    if config.weights is None:
        return None
    chosen = given.episodes if isinstance(given, LeRobotDataset) else None
    tables = frame_tables(meta, chosen)
    if config.weights == AUTO:
        scores = _inspected(config, given, meta, tables, chosen, folder, revision, seed, console)
        weights = [np.ones(table.size, np.float32) for table in tables]
        for number, own in enumerate(weights):
            index, weight = weights_by_frame(scores, number)
            own[index] = weight
        record: dict[str, Any] = {"origin": "inspection", "file": f"{INSPECTION_FOLDER}/{CHUNKS_FILE}"}
        record |= {"sha256": hashlib.sha256(np.concatenate(weights).tobytes()).hexdigest()}
    else:
        path = weights_file(config.weights)
        weights = read_weights(path, tables)
        record = {"origin": "file", "file": path.name, "sha256": digest(path)}
    scaled = [1.0 + config.alpha * (own - 1.0) if config.alpha != 1.0 else own for own in weights]
    return FrameWeights.of_array(in_training_order(meta, scaled), record=record | summary(scaled, tables))


def summary(weights: Sequence[np.ndarray], tables: Sequence[FrameTable]) -> dict[str, Any]:
    """What the weights of all chunks that training reads are in sum.

    Args:
        weights: (frames,) of every dataset.
        tables: of the datasets.

    Returns:
        shares in [0, 1]: `moved`, the weight that training takes from what weighs less than 1, `below` the chunks that do,
        `episodes_below` the episodes with such a chunk, `effective_sample_size`; the smallest, mean and largest weight; and
        `histogram`, shares of the chunks between the weights `edges`.
    """
    read = np.concatenate([own[table.read] for own, table in zip(weights, tables, strict=True)]).astype(np.float64)
    below, episodes = 0, 0
    for own, table in zip(weights, tables, strict=True):
        flagged = table.read[own[table.read] < 1.0]
        below += len(np.unique(table.episode_of(flagged)))
        episodes += len(np.unique(table.episode_of(table.read)))
    edges = np.linspace(0.0, max(1.0, float(read.max())), BINS + 1)
    counts = np.histogram(read, edges)[0]
    return {
        "moved": max(0.0, 1.0 - float(np.minimum(read, 1.0).mean())),
        "below": float((read < 1.0).mean()),
        "episodes_below": below / max(1, episodes),
        "effective_sample_size": float(read.sum() ** 2 / (len(read) * np.square(read).sum())),
        "smallest": float(read.min()),
        "mean": float(read.mean()),
        "largest": float(read.max()),
        "edges": [round(float(edge), 6) for edge in edges],
        "histogram": (counts / len(read)).tolist(),
    }


def _inspected(
    config: PTRConfig,
    given: Any,
    meta: Metadata,
    tables: Sequence[FrameTable],
    episodes: Sequence[int] | None,
    folder: Path | None,
    revision: str | None,
    seed: int,
    console: Console | None,
) -> DatasetScores:
    """The inspection of the data: a new one, or the one in the folder where it is of the same data and settings."""
    from ptr_hf.scoring.inspection import inspect_dataset

    settings: dict[str, Any] = {
        "false_alarms": config.false_alarms,
        "weight_min": config.weight_min,
        "group": "none" if config.standardize_by == "all" else config.standardize_by,
        "seed": seed,
    }
    key = {"settings": settings, "datasets": _identities(meta, tables), "code": _code()}
    if folder is not None and _read_key(folder / KEY_FILE) == key:
        scores = DatasetScores.load(folder)
        if console is not None:
            console.print(f"The data are those of the inspection in {folder}, which is reused.", soft_wrap=True)
    else:
        # where nothing is kept every process inspects for itself, and all have to find the same
        device = None if folder is not None else "cpu"
        data = [source.config for source in meta.sources] if isinstance(meta, MixtureMetadata) else given
        scores = inspect_dataset(
            data,
            episodes=episodes,
            revision=revision,
            **settings,
            device=device,
            progress=console is not None,
        )
        if folder is not None:
            (folder / KEY_FILE).unlink(missing_ok=True)
            scores.save(folder)
            (folder / KEY_FILE).write_text(json.dumps(key, indent=2) + "\n")
    if console is not None:
        console.print(scores)
    return scores


def _read_key(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _identities(meta: Metadata, tables: Sequence[FrameTable]) -> list[dict[str, Any]]:
    """What tells the datasets from others, or from themselves after a change."""
    metas = [source.meta for source in meta.sources] if isinstance(meta, MixtureMetadata) else [meta]
    return [
        {
            "repo_id": table.repo_id,
            "revision": table.revision,
            "read": hashlib.sha256(table.read.tobytes()).hexdigest(),
            "content": fingerprint(own),
        }
        for own, table in zip(metas, tables, strict=True)
    ]


def fingerprint(meta: LeRobotDatasetMetadata) -> str:
    """The sha256 of a dataset's tables: the files under data/ and meta/ that are on this machine, no video."""
    files = sorted(path for part in ("data", "meta") for path in (Path(meta.root) / part).rglob("*") if path.is_file())
    whole = sum(path.stat().st_size for path in files) <= HASHED
    found = hashlib.sha256()
    for path in files:
        stat = path.stat()
        found.update(f"{path.relative_to(meta.root)} {stat.st_size}\n".encode())
        found.update((digest(path) if whole else str(stat.st_mtime_ns)).encode())
    return found.hexdigest()


def _code() -> str:
    """The sha256 of the code that inspects: another release may judge otherwise."""
    import ptr_hf.scoring

    found = hashlib.sha256()
    for path in sorted(Path(ptr_hf.scoring.__path__[0]).glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def other_weights(record: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str | None:
    """The sentence where a run goes on with other weights than its checkpoint was trained with.

    Args:
        record: of the run's weights.
        checkpoint: of the checkpoint's.
    """
    if record.get("sha256") == checkpoint.get("sha256"):
        return None
    old, new = (f"{own['file']} ({own['sha256'][:12]})" if own else "none" for own in (checkpoint, record))
    return f"The checkpoint was trained with the weights {old}, and the run goes on with {new}."
