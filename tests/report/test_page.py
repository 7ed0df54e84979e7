"""The page is one file that needs nothing else, and says only what the run supports."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import CHANCE, ptr_rows, sft_rows

from ptr_hf.report.chunk_scores import ChunkScores, write_scores
from ptr_hf.report.dynamics import Dynamics, DynamicsLog
from ptr_hf.report.findings import findings
from ptr_hf.report.page import write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags with their attributes, the text of table cells by section, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.words = ""
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self.rows[self._section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data
        if self._open and {"td", "th"} & set(self._open):
            self.rows[self._section][-1][-1] += data


@pytest.fixture
def folder(tmp_path: Path, scores: ChunkScores) -> Path:
    """A run's output folder: SFT and PTR dynamics, scores and configuration."""
    out = tmp_path / "out"
    DynamicsLog(out / "ptr_dynamics.parquet", run="sft").append(*sft_rows())
    DynamicsLog(out / "ptr_dynamics.parquet", run="ptr").append(*ptr_rows())
    write_scores(scores, out / "ptr_scores.parquet")
    (out / "ptr_config.json").write_text(json.dumps({"alpha": 1.0, "cameras": ["top", "wrist"], "score": "posterior"}))
    return out


def test_the_whole_page(folder: Path, truth: dict[int, str]) -> None:
    path = write_report(
        folder, truth=truth, chance=CHANCE, results={"sft": {"success": 0.505}, "ptr": {"success": 0.671}}
    )
    assert path == folder / "ptr_report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.rows["summary"][0] == ["", "SFT", "PTR"]
    assert page.rows["summary"][1] == ["success", "0.505", "0.671"]
    assert [row[0] for row in page.rows["detection"][1:]] == [
        "noise", "truncation", "wrong instruction", "all of them"
    ]  # fmt: skip
    assert page.rows["detection"][2][:3] == ["truncation", "0.57", "10 / 30"]
    assert page.rows["tasks"][1][:3] == ["put the cup away", "20", "200"]
    assert page.rows["hyperparameters"][1:] == [
        ["alpha", "1.0"], ["cameras", '["top", "wrist"]'], ["score", "posterior"]
    ]  # fmt: skip
    assert "The weights do not tell truncation from clean data (AUC 0.57, 10 against 30 clean episodes)." in page.words


@pytest.mark.full
def test_nothing_is_loaded_from_outside(folder: Path, truth: dict[int, str]) -> None:
    text = write_report(folder, truth=truth).read_text(encoding="utf-8")
    page = Page(text)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    files = sorted(entry.name for entry in (folder / "figures").iterdir())
    assert files == ["ptr_dynamics.png", "ptr_weights.png", "ptr_weights_by_quality.png"]
    saved = {(folder / "figures" / name).read_bytes() for name in files}
    assert {base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in images} == saved
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text


@pytest.mark.full
def test_names_from_a_dataset_are_text_and_never_markup(folder: Path) -> None:
    hostile = "<script>alert('x')</script>"
    text = write_report(folder, title=hostile, hyperparameters={'a"b': hostile, hostile: 1}).read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert hostile in page.words
    assert ['a"b', hostile] in page.rows["hyperparameters"]


@pytest.mark.full
def test_a_page_from_dynamics_alone(tmp_path: Path) -> None:
    DynamicsLog(tmp_path / "ptr_dynamics.parquet", run="sft").append(*sft_rows(rows=3))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert set(page.rows) == {"summary"}
    assert "SFT trained without a scorer, so every chunk counted the same." in page.words


@pytest.mark.full
def test_dynamics_of_two_folders_stand_side_by_side(tmp_path: Path, dynamics: Dynamics) -> None:
    page = Page(write_report(tmp_path / "elsewhere", dynamics=dynamics).read_text(encoding="utf-8"))
    assert page.rows["summary"][0] == ["", "SFT", "PTR"]


def test_what_is_missing_is_named(tmp_path: Path, dynamics: Dynamics, truth: dict[int, str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"ptr_dynamics\.parquet"):
        write_report(tmp_path / "empty")
    with pytest.raises(ValueError, match="A truth needs chunk scores"):
        write_report(tmp_path / "empty", dynamics=dynamics, truth=truth)


def test_findings_follow_the_numbers(tmp_path: Path, scores: ChunkScores, truth: dict[int, str]) -> None:
    good = DynamicsLog(tmp_path / "good.parquet")
    good.append(*ptr_rows())
    said = " ".join(findings(good.dynamics, scores, truth, chance=CHANCE))
    assert "in 61% of the cases (guessing: 1.1%)" in said
    assert "hardly better than guessing" not in said
    assert "10.0% of the chunks have no recorded future. They carry weight 1.00" in said
    assert "Episodes with wrong instruction weigh less than clean ones" in said

    swapped = {index: {"clean": "wrong_instruction"}.get(kind, "clean") for index, kind in truth.items()}
    assert "inverted for wrong instruction" in " ".join(findings(good.dynamics, scores, swapped))

    poor = DynamicsLog(tmp_path / "poor.parquet")
    poor.append(*[row | {"accuracy": 0.012, "weight_at_ceiling": 0.8} for row in ptr_rows(rows=20)])
    said = " ".join(findings(poor.dynamics, chance=CHANCE))
    assert "hardly better than guessing" in said
    assert "80% of the weights sit at the upper bound" in said

    warm = DynamicsLog(tmp_path / "warm.parquet")
    warm.append(*ptr_rows(rows=20, warmup=1.0))
    assert "this run trained as plain post-training does" in " ".join(findings(warm.dynamics))
