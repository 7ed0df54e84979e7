"""Sources and tasks in the dynamics, the figure, the page and the card: numbers by hand, and what earlier files lack."""

import base64
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from card_examples import config_of, everything_known, tables
from PIL import Image
from report.test_page import Page
from synthetic_runs import ptr_rows, sourced_rows

from ptr_hf.publishing.card_facts import TrainingData
from ptr_hf.publishing.model_card import model_card
from ptr_hf.report.dynamics import DYNAMICS_FILE, Dynamics, DynamicsLog, read_dynamics
from ptr_hf.report.findings import findings
from ptr_hf.report.page import write_report
from ptr_hf.report.sources import group_shares, logged_share_bound, sources_figure
from ptr_hf.report.style import save_figure


def group(name: str, chunks: int, targets: int, share: float, weight_share: float, **means: float | None) -> dict:
    nothing = dict.fromkeys(("weight", "score", "loss", "at_floor", "at_ceiling"))
    return {"name": name, "chunks": chunks, "targets": targets, "share": share, "weight_share": weight_share} | (
        nothing | means
    )


@pytest.fixture
def two_rows(tmp_path: Path) -> Dynamics:
    """Two logged windows of 8 and 4 chunks; the second saw nothing of the bench, the first no future of it."""
    log = DynamicsLog(tmp_path / "d.parquet")
    log.append(
        {
            "step": 10,
            "accuracy": 0.5,
            "share_bound": 16.0,
            "sources": [
                group("bench", 2, 0, 0.25, 0.5, weight=3.0, loss=1.0),
                group("lab", 6, 4, 0.75, 0.5, weight=1.0, score=1.0, loss=2.0, at_floor=0.5, at_ceiling=0.0),
            ],
        },
        {
            "step": 20,
            "accuracy": 0.5,
            "share_bound": 16.0,
            "sources": [
                group("bench", 0, 0, 0.0, 0.0),
                group("lab", 4, 2, 1.0, 1.0, weight=0.5, score=4.0, loss=1.0, at_floor=0.5, at_ceiling=0.5),
            ],
        },
    )
    return read_dynamics(tmp_path / "d.parquet")


def test_the_end_of_training_by_hand(two_rows: Dynamics) -> None:
    bench, lab = group_shares(two_rows, "ptr", share=1.0)
    assert (bench.name, bench.chunks, bench.share, bench.weight_share) == ("bench", 2, 0.125, 0.25)
    assert (bench.ratio, bench.weight, bench.loss) == (2.0, 3.0, 1.0)
    assert all(math.isnan(value) for value in (bench.score, bench.at_floor, bench.at_ceiling))
    assert (lab.chunks, lab.share, lab.weight_share) == (10, 0.875, 0.75)
    assert lab.weight == pytest.approx((6 * 1.0 + 4 * 0.5) / 10)
    assert lab.loss == pytest.approx((6 * 2.0 + 4 * 1.0) / 10)
    assert (lab.score, lab.at_floor) == (pytest.approx((4 * 1.0 + 2 * 4.0) / 6), 0.5)
    assert lab.at_ceiling == pytest.approx(2 * 0.5 / 6)
    (last_bench, _) = group_shares(two_rows, "ptr")
    assert math.isnan(last_bench.ratio)
    assert logged_share_bound(two_rows, "ptr") == 16.0
    assert group_shares(two_rows, "ptr", "tasks") == ()


def test_tasks_with_the_most_chunks_come_first(tmp_path: Path) -> None:
    rows = [group("reach", 1, 1, 0.25, 0.25), group("push", 3, 3, 0.75, 0.75)]
    DynamicsLog(tmp_path / "d.parquet").append({"step": 1, "tasks": rows})
    found = group_shares(read_dynamics(tmp_path / "d.parquet"), "ptr", "tasks")
    assert [task.name for task in found] == ["push", "reach"]


def test_files_of_earlier_versions_still_read(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    DynamicsLog(path).append(*ptr_rows(rows=4))
    pq.write_table(pq.read_table(path).drop_columns(["sources", "tasks", "share_bound"]), path)
    old = read_dynamics(path)
    assert old.groups("sources", "ptr") == [None] * 4
    assert group_shares(old, "ptr") == ()
    assert math.isnan(logged_share_bound(old, "ptr"))
    assert sources_figure(old) is None
    DynamicsLog(path, start_step=6000).append({"step": 6001, "sources": [group("a", 1, 1, 1.0, 1.0)]})
    assert [groups is None for groups in read_dynamics(path).groups("sources", "ptr")] == [True] * 4 + [False]


@pytest.fixture(scope="module")
def sourced(tmp_path_factory: pytest.TempPathFactory) -> Dynamics:
    path = tmp_path_factory.mktemp("sourced") / DYNAMICS_FILE
    DynamicsLog(path).append(*sourced_rows())
    return read_dynamics(path)


def test_the_figure_shows_every_source(sourced: Dynamics, tmp_path: Path) -> None:
    figure = sources_figure(sourced)
    assert figure is not None
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.axison]
    assert titles == ["q(m) / π(m) of every source", "so101_bench", "franka_lab", "aloha_play"]
    ratio, bench, *_ = figure.axes
    low, high = ratio.get_ylim()
    # every smoothed curve is inside, and 1 too
    for share in group_shares(sourced, "ptr"):
        assert low < share.ratio < high
    (band,) = bench.collections
    drawn = band.get_paths()[0].vertices
    share = group_shares(sourced, "ptr", share=1.0)[0].share
    assert drawn[:, 1].min() == pytest.approx(share / 16, rel=0.05)
    assert drawn[:, 1].max() == 1.0
    picture = Image.open(save_figure(figure, tmp_path / "sources.png"))
    assert picture.width > 1500


def test_of_many_sources_the_largest_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    names = [f"robot {number} with a name that is much longer than a panel is wide" for number in range(12)]
    sizes = np.arange(1, 13)
    rows = [
        group(name, int(size), int(size), size / 78, size / 78, weight=1.0)
        for name, size in zip(names, sizes, strict=True)
    ]
    DynamicsLog(path).append(*({"step": step, "share_bound": 16.0, "sources": rows} for step in (1, 2)))
    figure = sources_figure(read_dynamics(path))
    assert figure is not None
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.axison]
    assert len(titles) == 9
    assert titles[1].startswith("robot 4 with")
    assert all(len(title) <= 30 for title in titles)


@pytest.mark.full
def test_the_page(sourced: Dynamics, tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, dynamics=sourced).read_text(encoding="utf-8"))
    header, *rows = page.rows["sources"]
    assert header[:4] == ["source", "π(m), of the chunks", "q(m), of the weight", "q / π"]
    assert [row[0] for row in rows] == ["so101_bench", "franka_lab", "aloha_play"]
    shares = [[float(cell.rstrip("%")) for cell in row[1:3]] for row in rows]
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([100, 100], abs=0.2)
    assert [row[0] for row in page.rows["shares_of_tasks"][1:]] == ["stack the cups", "fold the towel"]
    assert "stays between 0.0625\nand 16 (Eq. 30)" in page.words
    sentences = [sentence for sentence in findings(sourced) if "due" in sentence]
    assert sentences[0].startswith("The source aloha_play has ")
    assert all(sentence in page.words for sentence in sentences)
    saved = (tmp_path / "figures" / "ptr_sources.png").read_bytes()
    assert any(base64.b64encode(saved).decode() in (of.get("src") or "") for tag, of in page.tags if tag == "img")


@pytest.mark.full
def test_the_card(sourced: Dynamics, tmp_path: Path) -> None:
    data = [
        TrainingData(source="me/bench", name="so101_bench", episodes=50),
        TrainingData(source="lab/franka", name="franka_lab", episodes=20),
    ]
    facts = replace(everything_known(sourced), data=data)
    card = model_card(facts).text
    header, *rows = next(table for table in tables(card) if table[0][0] == "source" and "q / π" in table[0])
    assert header == [
        "source", "episodes", "π", "q", "q / π", "mean T (nats)", "mean weight", "at the floor", "at the ceiling"
    ]  # fmt: skip
    assert [row[:2] for row in rows] == [["so101_bench", "50"], ["franka_lab", "20"], ["aloha_play", "–"]]
    assert "stays between 0.0625 and 16 (Eq. 30)" in card
    assert ["so101_bench", "me/bench, revision not recorded", "50", "–"] in next(
        table for table in tables(card) if table[0][:2] == ["source", "dataset"]
    )
    write_report(tmp_path, dynamics=sourced)
    assert "(figures/ptr_sources.png)" in model_card(facts, tmp_path).text
    calibrated = model_card(replace(facts, config=config_of("ptr_calibrated"))).text
    assert "stays between 0.01 and 100 (Eq. 30)" in calibrated
    assert "mean score (nats)" in calibrated
    uniform = model_card(replace(facts, config=config_of("sft"))).text
    assert "Does every source get its due" not in uniform


@pytest.mark.full
def test_names_of_sources_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | $x$"
    path = tmp_path / DYNAMICS_FILE
    rows = [group(hostile, 1, 1, 0.5, 0.6, weight=1.0), group("other $\\frac$", 1, 1, 0.5, 0.4, weight=1.0)]
    DynamicsLog(path).append(*({"step": step, "share_bound": 16.0, "sources": rows} for step in (1, 2, 3)))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert hostile in page.words
    assert "script" not in {tag for tag, _ in page.tags}
