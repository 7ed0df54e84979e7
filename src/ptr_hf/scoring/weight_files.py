"""Weights files: anyone's table of how much frames, chunks or episodes count, matched with the data that is trained on.

A parquet or csv file with a column `weight` and, to say what each row weighs,

- per frame: `index` (the frame's number in its dataset), or `episode_index` and `frame_index`, or all three;
- per chunk: the same, of the frames at which the training samples begin;
- per episode: `episode_index` alone;
- `source`, the number (or name) of the dataset, where there are several.

A folder stands for the ptr_chunks.parquet in it. What does not match is refused: a weight that goes to the wrong frame is
worse than none.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lerobot.datasets import LeRobotDatasetMetadata

from ptr_hf.data.frame_columns import episode_column
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, EPISODES_FILE, SETTINGS_FILE

KEYS = ("index", "episode_index", "frame_index")
KINDS = (".parquet", ".csv")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameTable:
    """The frames of a dataset, and those at which a training sample begins.

    Attributes:
        name: of the dataset: its Hub id, or what it is called in a mixture.
        repo_id: its Hub id.
        revision: of its Hub repo, where it has one.
        first: (episodes,) number of each episode's first frame in the dataset.
        length: (episodes,) frames.
        read: (samples,) numbers of the frames at which training samples begin.
    """

    name: str
    repo_id: str
    revision: str | None
    first: np.ndarray
    length: np.ndarray
    read: np.ndarray

    @classmethod
    def of(
        cls,
        meta: LeRobotDatasetMetadata,
        episodes: Sequence[int] | None = None,
        *,
        name: str | None = None,
    ) -> "FrameTable":
        """The table of a LeRobotDataset.

        Args:
            meta: of the dataset.
            episodes: that are read; None for all.
            name: by default the dataset's Hub id.
        """
        first = np.asarray(episode_column(meta, "dataset_from_index"), dtype=np.int64)
        length = np.asarray(episode_column(meta, "length"), dtype=np.int64)
        chosen = range(len(first)) if episodes is None else episodes
        read = [np.arange(first[episode], first[episode] + length[episode]) for episode in chosen]
        revision = getattr(meta, "revision", None)
        return cls(name or meta.repo_id, meta.repo_id, revision, first, length, np.concatenate(read))

    @property
    def frames(self) -> int:
        """Of all episodes."""
        return int(self.length.sum())

    @property
    def size(self) -> int:
        """One more than the largest number of a frame."""
        return int((self.first + self.length).max())

    def episode_of(self, index: np.ndarray) -> np.ndarray:
        """Episodes of frames by their numbers in the dataset."""
        return np.searchsorted(self.first, index, side="right") - 1

    def numbered(self) -> pd.DataFrame:
        """Every frame with its `KEYS`, in order."""
        episode = np.repeat(np.arange(len(self.length)), self.length)
        frame = np.arange(self.frames) - (np.cumsum(self.length) - self.length)[episode]
        return pd.DataFrame({"index": self.first[episode] + frame, "episode_index": episode, "frame_index": frame})

    def located(self, index: int) -> tuple[int, int]:
        """Episode of a frame, and its number in the episode."""
        episode = int(self.episode_of(np.array([index]))[0])
        return episode, index - int(self.first[episode])


def frame_tables(
    meta: LeRobotDatasetMetadata | MixtureMetadata, episodes: Sequence[int] | None = None
) -> list[FrameTable]:
    """A table for every dataset of the training data.

    Args:
        meta: of the data.
        episodes: that are read of a single dataset; a mixture's metadata knows its own.
    """
    if isinstance(meta, MixtureMetadata):
        return [FrameTable.of(source.meta, source.episodes, name=source.name) for source in meta.sources]
    return [FrameTable.of(meta, episodes)]


def in_training_order(meta: LeRobotDatasetMetadata | MixtureMetadata, weights: Sequence[np.ndarray]) -> np.ndarray:
    """The weights of every dataset's frames as one array, at the numbers that `index` has in a training batch.

    Args:
        meta: of the training data.
        weights: (frames,) of every dataset, in dataset order.
    """
    if not isinstance(meta, MixtureMetadata):
        return weights[0]
    parts = []
    for source, own in zip(meta.sources, weights, strict=True):
        spans = zip(*(episode_column(source.meta, name) for name in ("dataset_from_index", "length")), strict=True)
        parts += [own[first : first + length] for first, length in spans]
    return np.concatenate(parts)


def weights_file(path: str | Path) -> Path:
    """The file that a path stands for: itself, or the ptr_chunks.parquet of a folder.

    Raises:
        ValueError: there is none, or it is neither parquet nor csv.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CHUNKS_FILE).is_file():
            raise ValueError(
                f"The folder {path} holds no {CHUNKS_FILE}: give a weights file, or a folder that ptr-score wrote."
            )
        return path / CHUNKS_FILE
    if not path.is_file():
        raise ValueError(
            f"There is no weights file {path}: give a parquet or csv file, or a folder that ptr-score wrote."
        )
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"The weights file {path} is neither .parquet nor .csv: write it as one of them.")
    return path


def read_weights(path: str | Path, tables: Sequence[FrameTable]) -> list[np.ndarray]:
    """Read a weights file for the data that is trained on.

    Args:
        path: file, or folder with a ptr_chunks.parquet.
        tables: the datasets, in the order of their numbers.

    Returns:
        for every dataset (size,) float32, the weight of the chunk that begins at each frame; 1 where none is read.

    Raises:
        ValueError: the file cannot be read, or does not match the data; one sentence says what to do.
    """
    path = weights_file(path)
    try:
        rows = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"The weights file {path} cannot be read: {error}. Write it anew.") from error
    _check_columns(path, rows)
    _check_origin(path, tables)
    weights = [_matched(path, part, table) for part, table in zip(_by_source(path, rows, tables), tables, strict=True)]
    if not any(own[table.read].any() for own, table in zip(weights, tables, strict=True)):
        raise ValueError(
            f"The weights file {path} gives weight 0 to all that is trained on: nothing would be learned. Give some of it more."
        )
    return weights


def _check_columns(path: Path, rows: pd.DataFrame) -> None:
    if "weight" not in rows or not {"index", "episode_index"} & set(rows.columns):
        raise ValueError(
            f"The weights file {path} has the columns {', '.join(map(str, rows.columns)) or 'none'}; it needs `weight` and "
            "`index`, `episode_index` with `frame_index`, or `episode_index` alone."
        )
    if not len(rows):
        raise ValueError(f"The weights file {path} has no rows: list every frame or episode that is trained on.")
    keys = [name for name in KEYS if name in rows]
    for name in ("weight", *keys):
        values = rows[name]
        if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            raise ValueError(
                f"The column {name} of the weights file {path} holds {values.dtype}: it must hold numbers."
            )
    for name in keys:
        wrong = ~(np.isfinite(rows[name].to_numpy(float)) & (rows[name].to_numpy(float) % 1 == 0))
        if wrong.any():
            raise ValueError(
                f"The column {name} of the weights file {path} holds {rows[name].to_numpy()[wrong][0]} in row "
                f"{int(wrong.argmax())}: it must hold whole numbers."
            )
    weight = rows["weight"].to_numpy(float)
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if wrong.any():
        raise ValueError(
            f"The weights file {path} holds the weight {weight[wrong][0]} in row {int(wrong.argmax())}: weights must be finite "
            "and 0 or more."
        )


def _by_source(path: Path, rows: pd.DataFrame, tables: Sequence[FrameTable]) -> list[pd.DataFrame]:
    """The rows of every dataset."""
    if "source" not in rows:
        if len(tables) > 1:
            raise ValueError(
                f"The weights file {path} has no column `source`, and training reads {len(tables)} datasets: add it, with each "
                f"row's number of the dataset, 0 to {len(tables) - 1}."
            )
        return [rows]
    numbers = {table.name: number for number, table in enumerate(tables)}
    source = rows["source"]
    if not pd.api.types.is_numeric_dtype(source):
        source = source.map(lambda name: numbers.get(str(name), name))
    unknown = [value for value in source.unique() if value not in range(len(tables))]
    if unknown:
        known = ", ".join(f"{number} ({table.name})" for number, table in enumerate(tables))
        raise ValueError(
            f"The weights file {path} weighs the source {unknown[0]}, which is not trained on: sources here are {known}."
        )
    return [rows[source == number] for number in range(len(tables))]


def _matched(path: Path, rows: pd.DataFrame, table: FrameTable) -> np.ndarray:
    """The rows of one dataset as a weight for every frame."""
    where = f"The weights file {path}"
    keys = [name for name in KEYS if name in rows]
    rows = rows[[*keys, "weight"]].astype(dict.fromkeys(keys, np.int64) | {"weight": np.float32})
    twice = rows.duplicated(keys).to_numpy()
    if twice.any():
        raise ValueError(f"{where} weighs {_named(rows[keys], twice)} more than once: list it once.")
    frames = table.numbered()
    unknown = rows.merge(frames[keys].drop_duplicates(), on=keys, how="left", indicator=True)["_merge"] == "left_only"
    if unknown.any():
        raise ValueError(
            f"{where} weighs {_named(rows[keys], unknown.to_numpy())}, which {table.name} does not have (its episodes "
            f"are 0 to {len(table.length) - 1}, its frames 0 to {table.size - 1}): it was made for other data, or contradicts "
            "itself; make it anew."
        )
    values = np.full(table.size, np.nan, np.float32)
    values[frames["index"]] = frames.merge(rows, on=keys, how="left")["weight"]
    missing = table.read[np.isnan(values[table.read])]
    if len(missing):
        number, frame = table.located(int(missing[0]))
        raise ValueError(
            f"{where} says nothing of {len(missing)} of the {len(table.read)} chunks of {table.name} that training reads, which "
            f"begin at every frame (the first is frame {frame} of episode {number}): list them all, or give weights by episode."
        )
    return np.nan_to_num(values, nan=1.0)


def _named(keys: pd.DataFrame, chosen: np.ndarray) -> str:
    """The first of the chosen rows by its keys."""
    return ", ".join(f"{name} {value}" for name, value in keys[chosen].iloc[0].items())


def _check_origin(path: Path, tables: Sequence[FrameTable]) -> None:
    """Compare with what ptr-score has noted beside its files about the datasets that it read."""
    if path.name not in (CHUNKS_FILE, EPISODES_FILE) or not path.with_name(SETTINGS_FILE).is_file():
        return
    try:
        noted: list[dict[str, Any]] = json.loads(path.with_name(SETTINGS_FILE).read_text()).get("datasets", [])
    except ValueError as error:
        raise ValueError(f"{path.with_name(SETTINGS_FILE)} cannot be read: {error}. Run ptr-score again.") from error
    for note, table in zip(noted, tables, strict=False):
        changed = [
            f"{what} {note[what]}, not {value}"
            for what, value in (("repo_id", table.repo_id), ("revision", table.revision))
            if note.get(what) is not None and value is not None and note[what] != value
        ]
        if changed:
            logger.warning(
                "The weights file %s was made for %s; its frames match, so it is used.", path, " and ".join(changed)
            )


def digest(path: str | Path) -> str:
    """The sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
