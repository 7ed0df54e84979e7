"""The figures show what was logged, at any length of run, and leave matplotlib's global state alone."""

import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from synthetic_runs import CHANCE, ptr_rows, sft_rows

from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.report.dynamics import Dynamics, DynamicsLog
from ptr_hf.report.evaluation import detection
from ptr_hf.report.figures import dynamics_figure, weight_histogram_figure, weights_by_quality_figure
from ptr_hf.report.style import running_mean, save_figure


@pytest.fixture(autouse=True)
def _drawn_without_a_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [ax for ax in figure.axes if ax.get_title(loc="left").startswith(title)]
    return found


def labels(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for ax in figure.axes for text in ax.texts)


def drawn(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return np.asarray(Image.open(buffer).convert("L"))


@pytest.mark.full
def test_dynamics_panels_show_the_logged_columns(dynamics: Dynamics) -> None:
    figure = dynamics_figure(dynamics, chance=CHANCE)
    assert len(figure.axes) == 9
    raw, smooth = panel(figure, "Margin").lines
    np.testing.assert_array_equal(raw.get_ydata(), dynamics.column("margin", "ptr"))
    np.testing.assert_array_equal(raw.get_xdata(), dynamics.steps("ptr"))
    assert np.std(np.diff(smooth.get_ydata())) < np.std(np.diff(raw.get_ydata()))
    (setting,) = panel(figure, "Temperature").lines
    np.testing.assert_array_equal(setting.get_ydata(), dynamics.column("temperature", "ptr"))
    assert labels(panel(figure, "Action loss")) == ["SFT", "PTR"]
    assert panel(figure, "Mean score T").get_title(loc="left") == "Mean score T (nats)"
    assert {ax.get_xlabel() for ax in figure.axes} == {"training step"}
    assert drawn(figure).std() > 10


def test_chance_is_a_line_only_when_known(dynamics: Dynamics) -> None:
    accuracy = panel(dynamics_figure(dynamics, chance=CHANCE), "Identification accuracy")
    assert list(accuracy.lines[-1].get_ydata()) == [CHANCE, CHANCE]
    assert "chance (1.1%)" in labels(accuracy)
    score = panel(dynamics_figure(dynamics, chance=CHANCE), "Mean score T")
    assert list(score.lines[-1].get_ydata()) == [pytest.approx(math.log(88.0))] * 2
    assert labels(panel(dynamics_figure(dynamics), "Identification accuracy")) == []
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        dynamics_figure(dynamics, chance=88.0)


def test_histogram_marks_the_bounds_and_sums_to_one(dynamics: Dynamics) -> None:
    (ax,) = weight_histogram_figure(dynamics).axes
    assert sorted(line.get_xdata()[0] for line in ax.lines) == [0.25, 4.0]
    assert labels(ax) == ["early (steps 320–860)", "late (steps 5.46k–6k)"]
    for stairs in ax.patches:
        assert stairs.get_data().values.sum() == pytest.approx(1.0)


def test_quality_rows_carry_their_auc(scores: ChunkScores, truth: dict[int, str]) -> None:
    figure = weights_by_quality_figure(scores, truth)
    (ax,) = figure.axes
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert [row.splitlines()[0] for row in rows] == ["wrong instruction", "truncation", "noise", "clean"]
    expected = [detection(scores, truth, level, "truncation").auc for level in ("episode", "chunk")]
    assert f"AUC {expected[0]:.2f}, by chunk {expected[1]:.2f}" in rows[1]
    assert [len(line.get_xdata()) for line in ax.lines] == [30, 10, 10, 10]
    assert drawn(figure).std() > 10


def test_quality_keeps_weights_of_zero_and_equal_weights(scores: ChunkScores, truth: dict[int, str]) -> None:
    oracle = np.array([1.0 if truth[index] == "clean" else 0.0 for index in scores.episode_index])
    (ax,) = weights_by_quality_figure(replace(scores, weight=oracle), truth).axes
    assert "≤ " in ax.get_xticklabels()[0].get_text()
    assert [len(line.get_xdata()) for line in ax.lines] == [30, 10, 10, 10]
    assert drawn(weights_by_quality_figure(replace(scores, weight=np.ones(600)), truth)).std() > 5
    nothing = replace(scores, target_valid=np.zeros(600, dtype=bool))
    assert "no scored chunk" in texts(weights_by_quality_figure(nothing, truth))


def test_a_figure_is_a_png_of_its_size(dynamics: Dynamics, tmp_path: Path) -> None:
    path = save_figure(weight_histogram_figure(dynamics), tmp_path / "assets" / "weights.png")
    with Image.open(path) as image:
        assert image.size == (1024, 576)
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.png"]
    with pytest.raises(ValueError, match=r"weights\.svg"):
        save_figure(weight_histogram_figure(dynamics), tmp_path / "weights.svg")


@pytest.mark.full
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_short_runs_are_drawn(tmp_path: Path, rows: int) -> None:
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(*ptr_rows(rows=rows, total=10 * rows))
    for figure in (dynamics_figure(log.dynamics), weight_histogram_figure(log.dynamics)):
        assert drawn(figure).std() > 5


def test_what_was_not_logged_has_no_panel(tmp_path: Path) -> None:
    log = DynamicsLog(tmp_path / "d.parquet", run="sft")
    log.append(*sft_rows(rows=30))
    figure = dynamics_figure(log.dynamics)
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.axison] == ["Action loss"]
    empty = DynamicsLog(tmp_path / "e.parquet", run="sft")
    empty.append({"step": 1})
    assert "no weights in this run" in texts(weight_histogram_figure(empty.dynamics))
    assert "not logged by these runs" in texts(dynamics_figure(empty.dynamics))


def test_not_a_number_leaves_a_gap(tmp_path: Path) -> None:
    rows = ptr_rows(rows=200)
    for row in rows[50:80]:
        row["score"] = float("nan")
        row["loss_action"] = None
    for row in rows:
        row["belief_entropy"] = float("inf")
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(*rows)
    figure = dynamics_figure(log.dynamics)
    drawn(figure)
    smooth = panel(figure, "Mean score T").lines[1].get_ydata()
    assert np.isnan(smooth[50:80]).all()
    assert np.isfinite(smooth[:50]).all()
    assert not [ax for ax in figure.axes if ax.get_title(loc="left").startswith("Belief")]


def test_weights_during_warm_up_have_no_histogram(tmp_path: Path) -> None:
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(*ptr_rows(rows=20, warmup=1.0))
    assert "all weights are equal" in texts(weight_histogram_figure(log.dynamics))


def test_running_mean_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 3.0, 4.0, np.nan, 4.0])


@pytest.mark.full
def test_global_state_is_left_alone(dynamics: Dynamics, scores: ChunkScores, truth: dict[int, str]) -> None:
    before = dict(matplotlib.rcParams)
    for _ in range(2):
        drawn(weights_by_quality_figure(scores, truth))
        drawn(dynamics_figure(dynamics))
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs
