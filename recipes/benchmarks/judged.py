"""An inspection beside the truth, as columns of a benchmark's results."""

import json
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from ptr_hf.scoring.dataset_scores import DatasetScores


def inspected(scores: DatasetScores, truth: dict[int, str]) -> dict[str, Any]:
    """What an inspection found: AUC of its z against the truth, and how many episodes of either kind it flagged."""
    episodes = scores.episodes
    done = [set(truth[episode].split("+")) - {"clean"} for episode in episodes["episode_index"]]
    bad = np.array([bool(kinds) for kinds in done])
    of_kind = {kind: np.array([kind in kinds for kinds in done]) for kind in sorted(set().union(*done))}
    flagged = (episodes["weight"] < 1).to_numpy()
    first = scores.chunks["episode_index"].to_numpy()
    chunk_is_bad = bad[np.searchsorted(episodes["episode_index"].to_numpy(), first)]
    columns = {"weight": "weight", **{name: name for name in scores.questions}}
    return {
        "auc_chunk": _auc(chunk_is_bad, scores.chunks["z"]),
        "auc_episode": _auc(bad, episodes["z"]),
        "auc_by_kind": json.dumps(
            {kind: _auc(own[own | ~bad], episodes["z"][own | ~bad]) for kind, own in of_kind.items()}
        ),
        "auc_by_score": json.dumps({name: _auc(bad, episodes[column]) for name, column in columns.items()}),
        "flagged_clean": int((flagged & ~bad).sum()),
        "flagged_corrupted": int((flagged & bad).sum()),
        "histogram": json.dumps(
            np.histogram(scores.chunks["weight"], bins=np.geomspace(0.01, 4.5, 21).clip(max=4.5))[0].tolist()
        ),
    }


def _auc(bad: np.ndarray, scores: Any) -> float | str:
    """The chance that a bad one scores lower than a good one; empty where one of the two is missing."""
    known = np.isfinite(np.asarray(scores, dtype=float))
    bad, values = bad[known], np.asarray(scores, dtype=float)[known]
    if not len(bad) or bad.all() or not bad.any():
        return ""
    return round(float(roc_auc_score(bad, -values)), 4)
