"""Who is flagged, by task, source and whatever else an episode is marked with."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

MOST_VALUES = 20
"""A column with more values is shown with those that lose most weight; one in which hardly two episodes agree is not shown."""


@dataclass(frozen=True)
class Row:
    """The episodes that share a value.

    Attributes:
        name: the value.
        episodes, flagged: numbers of episodes.
        frames: number of frames.
        moved: share of their weight that moves, in [0, 1].
        z: the median of the episodes.
    """

    name: str
    episodes: int
    flagged: int
    frames: int
    moved: float
    z: float


@dataclass(frozen=True)
class GroupTable:
    """A table: a row for every value of a column of the episodes."""

    name: str
    rows: tuple[Row, ...]
    left_out: int


def group_tables(episodes: pd.DataFrame, columns: dict[str, np.ndarray]) -> list[GroupTable]:
    """The tables worth showing.

    Args:
        episodes: of `DatasetScores`.
        columns: (episodes,) values by name.
    """
    found = []
    for name, values in columns.items():
        texts = pd.Series([str(value) for value in values], index=episodes.index)
        number = texts.nunique()
        if number < 2 or (number > MOST_VALUES and number > len(texts) / 2):
            continue
        rows = [_row(value, part) for value, part in episodes.groupby(texts)]
        rows.sort(key=lambda row: (-row.moved, row.name))
        found.append(GroupTable(name, tuple(rows[:MOST_VALUES]), max(number - MOST_VALUES, 0)))
    return found


def _row(value: object, part: pd.DataFrame) -> Row:
    frames = part["frames"].to_numpy()
    lost = float((frames * (1 - part["weight"])).sum() / max(frames.sum(), 1))
    z = part["z"].median()
    return Row(str(value), len(part), int((part["weight"] < 1).sum()), int(frames.sum()), lost, float(z))
