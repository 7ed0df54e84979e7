"""The paper index leads somewhere, and leaves out no equation that the code cites."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
ROWS = [line for line in INDEX.splitlines() if line.startswith("| ") and not line.startswith(("| Paper", "| What"))]
PATHS = sorted(set(re.findall(r"`((?:src|tests|recipes|docs|results)/[^`]+)`", INDEX)))
NUMBERS = re.compile(r"Eq\. (\d+)(?:\s*[-–]\s*(\d+))?")


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.replace(r"\|", "").strip("|").split("|")]


def ends(text: str) -> set[int]:
    """Numbers of the equations named in a text; of a range, its ends."""
    return {int(number) for pair in NUMBERS.findall(text) for number in pair if number}


def equations(text: str) -> set[int]:
    """Numbers of the equations named in a text, ranges filled in."""
    pairs = [(int(first), int(last or first)) for first, last in NUMBERS.findall(text)]
    return {number for first, last in pairs for number in range(first, last + 1)}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).is_file(), f"docs/paper_index.md names {path}, which does not exist."


def test_every_row_names_a_file_and_a_test_or_says_not_yet() -> None:
    assert len(ROWS) > 25
    for row in ROWS:
        *_, where, shown = cells(row)
        assert "`src/" in where or "`recipes/" in where or where == "not yet", row
        assert "`tests/" in shown or "`recipes/" in shown or "not yet" in shown, row


def test_everything_known_of_the_paper_is_listed() -> None:
    listed = " ".join(cells(row)[0] for row in ROWS)
    assert equations(listed) == {*range(3, 15), 21, 27, 30, 31, 32}
    for item in ("Proposition 1", "Proposition 2", "Proposition 3", "Table 5", "Table 6", "Fig. 10"):
        assert item in listed
    for item in ("LIBERO", "RoboCasa", "Real robots", "Training dynamics"):
        assert item in listed


def test_every_equation_is_cited_in_the_file_its_row_names() -> None:
    for row in ROWS:
        files = [ROOT / path for path in re.findall(r"`(src/[^`]+)`", row)]
        cited = equations(" ".join(file.read_text(encoding="utf-8") for file in files))
        assert equations(cells(row)[0]) <= cited, row


def test_every_equation_cited_in_the_code_has_a_row() -> None:
    listed = equations(" ".join(cells(row)[0] for row in ROWS))
    for file in sorted((ROOT / "src").rglob("*.py")):
        unlisted = ends(file.read_text(encoding="utf-8")) - listed
        assert not unlisted, f"{file.relative_to(ROOT)} cites Eq. {sorted(unlisted)}, which the index leaves out."
