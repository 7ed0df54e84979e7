"""Files beside a run that are damaged, runs of one row, and names that no page should print."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_runs import ptr_rows

from ptr_hf.report.chunk_scores import ChunkScores, read_scores, write_scores
from ptr_hf.report.console import PlainConsole
from ptr_hf.report.dynamics import DYNAMICS_COLUMNS, DYNAMICS_SCHEMA, DynamicsLog, read_dynamics
from ptr_hf.report.evaluation import number
from ptr_hf.report.figures import dynamics_figure
from ptr_hf.report.findings import findings
from ptr_hf.report.page import write_report
from ptr_hf.report.text import drawable, visible, without_local_paths

HOSTILE = "pick\x00 the \x1b[31mcup\u202e up\n[/b] $x$"
SHOWN = "pick the [31mcup up [/b] $x$"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def of_other_types(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    for place, name in enumerate(table.column_names):
        table = table.set_column(place, name, pa.array(["what?"] * len(table)))
    pq.write_table(table, path)


def with_holes(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    for name in {"step", "index", "run", "task"} & set(table.column_names):
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.nulls(len(table), table.schema.field(place).type))
    pq.write_table(table, path)


DAMAGE: tuple[Callable[[Path], object], ...] = (
    truncated,
    of_other_types,
    with_holes,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("not a table"),
    lambda path: pq.write_table(pa.table({"other": [1]}), path),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables_are_named_and_put_aside(
    tmp_path: Path, scores: ChunkScores, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ptr_dynamics.parquet"
    log = DynamicsLog(path)
    log.append(*ptr_rows(rows=1, total=10))
    write_scores(scores, tmp_path / "ptr_scores.parquet")
    damage(path)
    damage(tmp_path / "ptr_scores.parquet")
    with pytest.raises(ValueError, match=r"ptr_dynamics\.parquet is not a PTR dynamics file, or is damaged"):
        read_dynamics(path)
    with pytest.raises(ValueError, match=r"ptr_scores\.parquet holds no chunk scores, or is damaged"):
        read_scores(tmp_path / "ptr_scores.parquet")
    # a resumed run goes on, and nothing is lost
    with caplog.at_level(logging.WARNING):
        resumed = DynamicsLog(path, start_step=20)
    resumed.append({"step": 21, "loss": 0.5})
    assert read_dynamics(path).steps("ptr").tolist() == [21]
    assert (tmp_path / "ptr_dynamics.parquet.damaged").is_file()
    assert "It is kept as ptr_dynamics.parquet.damaged" in caplog.text


def test_a_report_leaves_out_what_cannot_be_read_or_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "figures" / "ptr_weights.png").mkdir(parents=True)
    (tmp_path / "ptr_scores.parquet").write_text("not a table")
    (tmp_path / "ptr_config.json").write_text("[1, 2")
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(*ptr_rows(rows=1, total=10))
    with caplog.at_level(logging.WARNING):
        text = write_report(tmp_path, dynamics=log.dynamics).read_text(encoding="utf-8")
    for sentence in (
        "The figure ptr_weights is missing in the report",
        "The report leaves ptr_scores.parquet out",
        "The report leaves ptr_config.json out",
    ):
        assert sentence in caplog.text
    assert "ptr_weights.png" not in text
    assert 'id="tasks"' not in text


def test_a_histogram_that_does_not_fit_its_edges_is_left_out(tmp_path: Path) -> None:
    rows = ptr_rows(rows=4, total=40)
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(*[row | {"weight_bin_edges": list(row["weight_bin_edges"])[:-3]} for row in rows])
    assert log.dynamics.weight_counts("ptr") is None


def test_one_row_is_a_sentence_and_not_a_dot(tmp_path: Path) -> None:
    log = DynamicsLog(tmp_path / "ptr_dynamics.parquet", run="ptr")
    log.append(*ptr_rows(rows=1, total=7))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "One step was logged, step 7, so there are no curves over training" in text
    assert not list((tmp_path / "figures").glob("ptr_[ds]*.png"))
    pq.write_table(DYNAMICS_SCHEMA.empty_table(), tmp_path / "ptr_dynamics.parquet")
    with pytest.raises(ValueError, match="No step was logged"):
        write_report(tmp_path)


def test_nothing_that_was_not_compared_is_called_an_accuracy(tmp_path: Path) -> None:
    """`small_loss` compares nothing: its accuracy and its candidates are logged as zeros."""
    rows = [
        row | {"accuracy": 0.0, "margin": 0.0, "score": 0.0, "candidates": 0.0} for row in ptr_rows(rows=1, total=40)
    ]
    log = DynamicsLog(tmp_path / "d.parquet", run="small_loss")
    log.append(*[row | {"run": "small_loss"} for row in rows])
    assert log.dynamics.chance("small_loss") is None
    assert "without comparing their consequences" in findings(log.dynamics.identified)[0]
    text = write_report(tmp_path, dynamics=log.dynamics).read_text(encoding="utf-8")
    assert "picked the true consequence" not in text
    assert DYNAMICS_COLUMNS["accuracy"].meaning not in text
    log = DynamicsLog(tmp_path / "half.parquet")
    log.append(*[row | {"candidates": 0.4} for row in ptr_rows(rows=4, total=40)])
    assert log.dynamics.chance("ptr") is None


def test_weights_that_are_all_zero_and_values_without_end(
    tmp_path: Path, scores: ChunkScores, truth: dict[int, str]
) -> None:
    scores.weight[scores.usable] = 0.0
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(*[row | {"temperature": 0.0, "loss_action": np.inf} for row in ptr_rows(rows=1, total=40)])
    text = write_report(tmp_path, dynamics=log.dynamics, scores=scores, truth=truth).read_text(encoding="utf-8")
    assert "count ∞ times as much as the rest" in text
    assert [number(value) for value in (np.inf, -np.inf, np.nan)] == ["∞", "−∞", "–"]


@pytest.mark.full
def test_no_page_figure_or_terminal_prints_what_nobody_sees(
    tmp_path: Path, scores: ChunkScores, capsys: pytest.CaptureFixture[str]
) -> None:
    scores.task[:] = HOSTILE
    kinds = {episode: "clean" if episode % 2 else f"odd{HOSTILE}" for episode in range(60)}
    log = DynamicsLog(tmp_path / "d.parquet", run=HOSTILE)
    log.append(*[row | {"run": HOSTILE} for row in ptr_rows(rows=1, total=40)])
    dynamics_figure(log.dynamics).canvas.draw()
    page = write_report(tmp_path, dynamics=log.dynamics, scores=scores, truth=kinds, title=HOSTILE)
    text = page.read_text(encoding="utf-8")
    assert SHOWN in text
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    PlainConsole(width=200).print(HOSTILE)
    assert capsys.readouterr().out.strip() == f"{visible('pick the [31mcup up')}\n[/b] $x$"
    assert visible(HOSTILE) == SHOWN
    assert drawable("_a$") == r" _a\$"


def test_paths_of_this_machine_go_nowhere() -> None:
    given = {
        "output_dir": "/home/me/runs/cups",
        "repo": "lab/policy",
        "deep": [r"C:\data\demos", {"a": "~/x/y"}],
        "n": 3,
    }
    assert without_local_paths(given) == {
        "output_dir": "cups",
        "repo": "lab/policy",
        "deep": ["demos", {"a": "y"}],
        "n": 3,
    }
