"""The scores of a dataset: one row per chunk, in `ptr_scores.parquet`."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int, Shaped

from ptr_hf.report.files import replacing

SCORES_FILE = "ptr_scores.parquet"

SCORE_COLUMNS: dict[str, pa.DataType] = {
    "index": pa.int64(),
    "episode_index": pa.int64(),
    "frame_index": pa.int64(),
    "task": pa.string(),
    "source": pa.string(),
    "target_valid": pa.bool_(),
    "score": pa.float64(),
    "weight": pa.float64(),
    "loss": pa.float64(),
}
VERDICT_PREFIX = "score_"
SCORE_SCHEMA = pa.schema(list(SCORE_COLUMNS.items()))


@dataclass(frozen=True)
class ChunkScores:
    """Score T (nats), weight and policy loss of every scored chunk, one array per column of `SCORE_COLUMNS`.

    A chunk whose `target_valid` is False has no recorded future: its weight says nothing about its quality.
    `verdicts` holds every single score's, by name, where the weight comes from other scores than T; in the file they are
    columns `score_<name>`.
    """

    index: Int[np.ndarray, " chunks"]
    episode_index: Int[np.ndarray, " chunks"]
    frame_index: Int[np.ndarray, " chunks"]
    task: Shaped[np.ndarray, " chunks"]
    source: Shaped[np.ndarray, " chunks"]
    target_valid: Bool[np.ndarray, " chunks"]
    score: Float[np.ndarray, " chunks"]
    weight: Float[np.ndarray, " chunks"]
    loss: Float[np.ndarray, " chunks"]
    verdicts: dict[str, Float[np.ndarray, " chunks"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def usable(self) -> Bool[np.ndarray, " chunks"]:
        """Chunks with a recorded future and a finite weight: those whose weight is a judgement."""
        return self.target_valid & np.isfinite(self.weight)

    @staticmethod
    def from_table(table: pa.Table) -> "ChunkScores":
        """Take the columns of an Arrow table, casting them; a task given by number becomes text.

        Raises ValueError when columns are missing, or hold nulls where a value is needed.
        """
        missing = [name for name in SCORE_COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"Chunk scores need the columns {list(SCORE_COLUMNS)}, missing are {missing}.")
        verdicts = {
            name.removeprefix(VERDICT_PREFIX): table[name].cast(pa.float64()).to_numpy()
            for name in table.column_names
            if name.startswith(VERDICT_PREFIX)
        }
        table = table.select(list(SCORE_COLUMNS)).cast(SCORE_SCHEMA)
        measured = ("score", "weight", "loss")
        for name in (name for name in SCORE_COLUMNS if name not in measured):
            if table[name].null_count:
                raise ValueError(f"The column {name!r} of the chunk scores has {table[name].null_count} empty rows.")
        return ChunkScores(**{name: table[name].to_numpy() for name in SCORE_COLUMNS}, verdicts=verdicts)

    def to_table(self) -> pa.Table:
        """The same as an Arrow table in the file's schema."""
        table = pa.table({name: pa.array(self.__dict__[name]) for name in SCORE_COLUMNS}).cast(SCORE_SCHEMA)
        for name, values in self.verdicts.items():
            table = table.append_column(VERDICT_PREFIX + name, pa.array(values, pa.float64()))
        return table


def read_scores(path: str | Path) -> ChunkScores:
    """Read a scores file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another kind of file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There are no chunk scores at {path}, score the dataset first.")
    try:
        return ChunkScores.from_table(pq.ParquetFile(path).read())
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} holds no chunk scores, or is damaged: {error} Score the dataset again.") from error


def write_scores(scores: ChunkScores, path: str | Path) -> Path:
    """Write a scores file in one move and return its path."""
    path = Path(path)
    with replacing(path) as temporary:
        pq.write_table(scores.to_table(), temporary)
    return path
