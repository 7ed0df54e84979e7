"""What the inspection of a dataset found: a score, a z and a weight for every frame and episode, and the reasons."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

CHUNKS_FILE = "ptr_chunks.parquet"
EPISODES_FILE = "ptr_episodes.csv"
SETTINGS_FILE = "ptr_scores.json"
ROWS = 1 << 16
"""Rows of the table of frames that are written together."""


@dataclass(frozen=True)
class DatasetScores:
    """Scores of every frame and episode of one or several datasets, and the weights to train with.

    A frame stands for the action chunk that begins there. Everything is better the higher it is.

    Attributes:
        chunks: a row per frame in dataset order: index, episode_index, frame_index, one column a question (its z in a window
            around the frame; NaN where the question says nothing of single frames), z (the worst question's) and weight in
            [w_min, 1]; and `source`, the number of the dataset, where there are several.
        episodes: a row per episode: episode_index, weight (mean over its frames), z (of the worst question: 1 % of good
            episodes lie below -2.33), reason (empty where nothing was found), one column a question (its z), task, frames;
            and `source` where there are several.
        settings: what was asked of which dataset, and how: JSON values alone.
        notes: sentences about what could not be judged, and why.

    Example:
        >>> scores = inspect_dataset("me/my_demos")
        >>> scores.flagged[["episode_index", "z", "reason"]]
        >>> scores.save("out")
    """

    chunks: pd.DataFrame
    episodes: pd.DataFrame
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    @property
    def questions(self) -> tuple[str, ...]:
        """Names of the questions that were asked, which are columns of both tables."""
        return tuple(self.settings["questions"])

    @property
    def flagged(self) -> pd.DataFrame:
        """The episodes that weigh less than 1, the worst first."""
        return self.episodes[self.episodes["weight"] < 1].sort_values("z")

    @property
    def excluded(self) -> pd.DataFrame:
        """The episodes that are bad from end to end, the worst first: those to leave out where weights cannot be used."""
        return self.episodes[self.episodes["weight"] <= self.settings["weight_min"]].sort_values("z")

    @property
    def moved(self) -> float:
        """The share of all weight that training takes from flagged frames, in [0, 1]."""
        return float(1 - self.chunks["weight"].to_numpy().mean(dtype=np.float64)) if len(self.chunks) else 0.0

    def to_pandas(self) -> pd.DataFrame:
        """Give the table of episodes, as `episodes` has it.

        Returns:
            A copy, a row an episode in the order of the data.
        """
        return self.episodes.copy()

    def save(self, folder: str | Path) -> Path:
        """Write ptr_chunks.parquet, ptr_episodes.csv and ptr_scores.json.

        Args:
            folder: where to; made if need be.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(folder / CHUNKS_FILE, pa.Schema.from_pandas(self.chunks, preserve_index=False)) as file:
            for first in range(0, len(self.chunks), ROWS):
                rows = self.chunks.iloc[first : first + ROWS]
                file.write_table(pa.Table.from_pandas(rows, file.schema, preserve_index=False))
        self.episodes.to_csv(folder / EPISODES_FILE, index=False, float_format="%.6g")
        stated = {**self.settings, "notes": list(self.notes)}
        (folder / SETTINGS_FILE).write_text(json.dumps(stated, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "DatasetScores":
        """Read what `save` has written.

        Args:
            folder: of the files.

        Returns:
            The scores.

        Raises:
            ValueError: a file is missing or damaged; the sentence names it.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text())
            notes = tuple(settings.pop("notes"))
            chunks = pd.read_parquet(folder / CHUNKS_FILE)
            episodes = pd.read_csv(folder / EPISODES_FILE, keep_default_na=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} holds no scores of a dataset that can be read: {error}. Run ptr-score again."
            ) from error
        episodes["reason"] = episodes["reason"].fillna("")
        episodes["task"] = episodes["task"].fillna("")
        return cls(chunks, episodes, settings, notes)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The worst episodes as a table, with what was found in all and what could not be judged."""
        flagged = self.flagged
        table = Table(
            title=f"{len(flagged)} of {len(self.episodes)} episodes weigh less; {self.moved:.1%} of the weight moves"
        )
        for name in ("episode", "z", "weight"):
            table.add_column(name, justify="right")
        for name in ("reason", "task"):
            table.add_column(name)
        for row in flagged.head(10).itertuples():
            source = f"{row.source}:" if "source" in flagged else ""
            table.add_row(
                f"{source}{row.episode_index}", f"{row.z:.1f}", f"{row.weight:.2f}", str(row.reason), str(row.task)
            )
        yield table
        yield from self.notes

    def __repr__(self) -> str:
        """One line: how many episodes, how many flagged, how much weight moves."""
        return (
            f"DatasetScores({len(self.episodes)} episodes, {len(self.chunks)} frames, {len(self.flagged)} flagged, "
            f"{self.moved:.1%} of the weight moves)"
        )


def chunks_of(scores: DatasetScores, source: int | None) -> pd.DataFrame:
    """The rows of `chunks` of one of several datasets, or of the only one (None); they are not copied."""
    if source is None:
        return scores.chunks
    return scores.chunks.iloc[slice(*scores.chunks["source"].searchsorted([source, source + 1]))]


def weights_by_frame(scores: DatasetScores, source: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The frames of one dataset that were scored, and their weights.

    Args:
        scores: of one or several datasets.
        source: the number of the dataset.

    Returns:
        the frames' numbers in the dataset (frames,) int64, ascending, and their weights (frames,) float32.
    """
    chunks = chunks_of(scores, source if "source" in scores.chunks else None)
    return chunks["index"].to_numpy(np.int64), chunks["weight"].to_numpy(np.float32)
