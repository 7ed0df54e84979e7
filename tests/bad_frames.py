"""Copies of small real datasets in which some recorded values are not finite."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.compute_stats import get_feature_stats

EPISODES = ((0, 30), (30, 54), (54, 94), (94, 112))
"""First frame and end of the episodes of `write_dataset`."""


def spoiled(root: Path, folder: Path, values: Mapping[tuple[str, int], float], with_statistics: bool = False) -> Path:
    """A copy of a dataset in which the first number of a feature at a frame has another value.

    Args:
        root: of the dataset, with one parquet file.
        folder: where the copy goes.
        values: by feature and frame.
        with_statistics: also renew the feature's statistics as LeRobot does when it records such a value.
    """
    shutil.copytree(root, folder)
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    for key in {key for key, _ in values}:
        column = table[key].to_pylist()
        for (of, frame), value in values.items():
            if of == key:
                column[frame][0] = value
        place = table.schema.get_field_index(key)
        table = table.set_column(place, table.schema.field(place), pa.array(column, table.schema.field(place).type))
        if with_statistics:
            path = folder / "meta" / "stats.json"
            statistics = json.loads(path.read_text())
            with np.errstate(invalid="ignore"):
                renewed = get_feature_stats(np.asarray(column, dtype=np.float32), axis=0, keepdims=False)
            statistics[key] = {name: number.tolist() for name, number in renewed.items()}
            path.write_text(json.dumps(statistics))
    pq.write_table(table, file)
    return folder
