"""Weights in the file that LeRobot's own sample weighting reads, so that plain `lerobot-train` uses them.

LeRobot 0.6.1 weighs samples by the progress p of a reward model (lerobot.rewards.sarm.rabc). With the change
δ(t) = p(t + chunk_size) - p(t), its index cut at the end of the episode, and with the mean μ and the standard deviation σ of all
δ in the file, a frame weighs

    1                                     where δ > κ, or where the file has no progress of it
    clip((δ - (μ - 2σ)) / (4σ + ε), 0, 1) where 0 ≤ δ ≤ κ
    0                                     where δ < 0.

Here p is chosen so that this is our weight, for LeRobot's own κ and ε and every chunk size of 8 and more:

- frames that weigh 1 are not in the file, unless the frame before needs their progress;
- a frame below 1 and the next frame are an "episode" of the file, so that δ(t) = p(t + 1) - p(t); frames in a row that all have
  the lowest weight share an "episode" in which p is constant, so that δ = 0;
- δ = (w - w₀) κ, with w₀ the lowest weight (at most 0.4), needs 4σ + ε = κ and μ = 2σ - w₀ κ: rows beyond the dataset, which no
  batch asks for, see to that.

The weights act in policies whose loss LeRobot can have by sample (`forward(batch, reduction="none")`): SmolVLA, π₀, π₀.₅, EVO-1
and `ptr`; ACT and Diffusion refuse them.
"""

import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd

from ptr_hf.report.files import replacing
from ptr_hf.scoring.dataset_scores import DatasetScores, weights_by_frame

KAPPA, EPSILON = 0.01, 1e-6
"""LeRobot's defaults."""
SMALLEST_CHUNK = 8
"""Of the rows that set mean and standard deviation so many share an end; with a smaller chunk size they would miss it."""
APART = 100_000
"""Frames between such groups: more than any chunk."""
HIGHEST_BASE = 0.4
"""LeRobot takes no mean below 0, which a higher one would need."""


def export_lerobot(scores: DatasetScores, path: str | Path) -> Path:
    """Write the weights of one dataset for `lerobot-train --sample_weighting.type=rabc`.

    LeRobot divides by the sum of the weights of each batch on each process, as it does with its own.

    Args:
        scores: of one dataset.
        path: of the parquet file.

    Returns:
        the path.

    Raises:
        ValueError: there are several datasets, or the file does not end in .parquet.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"--export_lerobot {path}: LeRobot reads a parquet file; give a name that ends in .parquet.")
    if "source" in scores.chunks:
        raise ValueError("LeRobot's sample weighting is of one dataset: inspect each by itself.")
    table = progress_table(*weights_by_frame(scores))
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)
    return path


def lerobot_options(path: str | Path) -> str:
    """The options of `lerobot-train` that use the file."""
    return f"--sample_weighting.type=rabc --sample_weighting.progress_path={shlex.quote(str(path))}"


def progress_table(index: np.ndarray, weight: np.ndarray) -> pd.DataFrame:
    """The rows of the file: index, episode_index, progress_sparse.

    Args:
        index: (frames,) of the dataset, ascending.
        weight: (frames,) in [0, 1].
    """
    low = weight < 1
    if not low.any():
        rows = pd.DataFrame({"index": index, "episode_index": 0, "progress_sparse": np.nan})
        return rows.astype({"progress_sparse": np.float64})
    base = float(min(weight[low].min(), HIGHEST_BASE))
    weights = dict(zip(index.tolist(), weight.tolist(), strict=True))
    progress: dict[int, float] = {}
    # of each frame in the file its "episode" there, and the last frame of that
    episode: dict[int, int] = {}
    last: dict[int, int] = {}
    for frame in reversed(index[low].tolist()):
        after = frame + 1
        if weights[frame] == base:
            run = weights.get(after) == base
            progress[frame] = 0.0
            last[frame] = last[after] if run else frame
            episode[frame] = -last[frame] - 1
            continue
        if after not in progress:
            # a frame that weighs 1, or the end of the dataset, is needed as a level; its own δ is absent or above κ
            progress[after] = progress[after + 1] - 2 * KAPPA if after + 1 in progress else 0.0
            episode[after], last[after] = after, after + 1
        progress[frame] = progress[after] - (weights[frame] - base) * KAPPA
        episode[frame], last[frame] = frame, after
    deltas = [progress[end] - progress[frame] for frame, end in last.items() if end in progress]
    # a row of another "episode" only marks its end: it comes first, because of a frame's rows the last one counts
    marks = [(end, episode[frame], np.nan) for frame, end in last.items() if episode[frame] == frame]
    rows = [(frame, episode[frame], progress[frame]) for frame in sorted(progress)]
    beyond = _ballast(np.asarray(deltas), base, int(index.max()) + 2 * APART)
    return pd.DataFrame([*marks, *rows, *beyond], columns=["index", "episode_index", "progress_sparse"])


def _ballast(deltas: np.ndarray, base: float, begin: int) -> list[tuple[int, int, float]]:
    """Rows that no batch asks for, with which all δ have the mean and the standard deviation that are needed."""
    sigma = (KAPPA - EPSILON) / 4
    mean = 2 * sigma - base * KAPPA
    square = sigma**2 + mean**2
    number, first, second = len(deltas), float(deltas.sum()), float(np.square(deltas).sum())
    missing = number * mean - first
    linear = number * square - second - 2 * mean * missing
    root = (-linear + math.sqrt(linear**2 + 4 * sigma**2 * missing**2)) / (2 * sigma**2)
    count = 2 * max(1, math.ceil(root / 2))
    while True:
        centre = ((number + count) * mean - first) / count
        spread = ((number + count) * square - second) / count - centre**2
        if spread >= 0:
            break
        count += 2
    values = centre + math.sqrt(spread) * np.where(np.arange(count) % 2, 1.0, -1.0)
    groups = math.ceil(count / SMALLEST_CHUNK)
    never = begin + (groups + 2) * APART
    rows: list[tuple[int, int, float]] = []
    for group in range(groups):
        own = values[group * SMALLEST_CHUNK : (group + 1) * SMALLEST_CHUNK]
        last = begin + group * APART + len(own)
        rows.append((last, last, np.nan))
        rows += [(last - len(own) + place, last, -float(value)) for place, value in enumerate(own)]
        # what follows the end lies beyond every chunk, so that the end has no δ of its own
        rows.append((last, never, 0.0))
    return [*rows, (never, never, np.nan)]
