"""An inspection beside the truth, counted by hand."""

import math
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import ptr_rows, sft_rows

from ptr_hf.report.dynamics import DynamicsLog, read_dynamics
from ptr_hf.report.style import save_figure
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.inspected import AUC, SUCCESS, SUCCESS_OF_TASK, inspection_by_truth, inspection_figure


def inspection(z: list[float], weight: list[float]) -> DatasetScores:
    episodes = pd.DataFrame({"episode_index": range(len(z)), "z": z, "weight": weight, "reason": "", "task": ""})
    return DatasetScores(pd.DataFrame({"weight": weight}), episodes, {"questions": []})


def test_auc_and_shares_counted_by_hand() -> None:
    scores = inspection([1.0, -3.0, -5.0, 0.0], [1.0, 0.5, 0.02, 1.0])
    truth = {0: "clean", 1: "clean", 2: "noise+truncation", 3: "noise"}
    # pairs (bad, clean) in the right order: -5 below 1 and -3, 0 below 1: three of four
    assert inspection_by_truth(scores, truth) == {
        AUC: 0.75,
        "AUC, noise": 0.75,
        "AUC, truncation": 1.0,
        "bad episodes that weigh less": 0.5,
        "clean episodes that weigh less": 0.5,
    }


def test_without_bad_episodes_there_is_nothing_to_tell_apart() -> None:
    found = inspection_by_truth(inspection([1.0, 0.0], [1.0, 1.0]), {0: "clean", 1: "clean"})
    assert math.isnan(found[AUC])
    assert math.isnan(found["bad episodes that weigh less"])
    assert found["clean episodes that weigh less"] == 0.0


def test_an_episode_without_truth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"says nothing about 1 of the episodes \(the first is 1\)"):
        inspection_by_truth(inspection([1.0, 0.0], [1.0, 1.0]), {0: "clean"})


def test_the_picture_with_and_without_success(tmp_path: Path) -> None:
    scores = inspection([1.0, -3.0, -5.0], [1.0, 1.0, 0.02])
    truth = {0: "clean", 1: "noise+truncation", 2: "noise"}
    path = tmp_path / "dynamics.parquet"
    DynamicsLog(path, run="sft").append(*sft_rows())
    DynamicsLog(path, run="ptr").append(*ptr_rows())
    measured = {run: {SUCCESS: 0.5, f"{SUCCESS_OF_TASK}push": 0.5} for run in ("sft", "ptr")}
    bars = {}
    for name, results in (("with", measured), ("without", {"sft": {}, "ptr": {}})):
        figure = inspection_figure(scores, truth, read_dynamics(path), results)
        save_figure(figure, tmp_path / f"{name}.png")
        bars[name] = [bar.get_width() for bar in figure.axes[2].patches]
    assert bars == {"with": [0.5] * 4, "without": []}
