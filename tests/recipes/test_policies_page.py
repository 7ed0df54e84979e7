"""The page about policies: its tables are what was found, and the memory table can be measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import policies_page
from benchmarks.tables import filled
from ptr_hf.policies import supported_policies

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.full
def test_the_committed_page_is_up_to_date() -> None:
    done = run("benchmarks/policies_page.py", "--check", "true")
    assert done.returncode == 0, done.stderr


def test_the_committed_results_cover_every_policy_and_none_failed() -> None:
    found = json.loads((ROOT / "results" / "policies.json").read_text())
    grouped = policies_page.by_type(found)
    assert tuple(sorted(grouped)) == supported_policies()
    for name, capabilities in grouped.items():
        assert {*policies_page.COLUMNS, policies_page.TRAINING} == capabilities.keys(), name
        assert not any(outcome["failed"] for outcomes in capabilities.values() for outcome in outcomes), name


@pytest.mark.full
def test_the_side_pathway_measures_the_same_again(tmp_path: Path) -> None:
    done = run("benchmarks/scaling/side_pathway.py", "--output", str(tmp_path / "again.json"))
    assert done.returncode == 0, done.stderr
    assert "smolvla_base" in done.stdout
    committed = json.loads((ROOT / "results" / "side_pathway.json").read_text())
    assert json.loads((tmp_path / "again.json").read_text()) == committed


@pytest.mark.parametrize(
    ("outcomes", "cell"),
    [
        ([], "not tested"),
        ([{"passed": 1, "failed": 0}], "yes"),
        ([{"passed": 1, "failed": 0, "works": False}], "no"),
        ([{"passed": 1, "failed": 0, "works": False}, {"passed": 1, "failed": 0}], "in part"),
        ([{"passed": 1, "failed": 1}, {"passed": 1, "failed": 0, "works": False}], "**failed**"),
    ],
)
def test_a_cell_says_what_was_found(outcomes: list[dict[str, object]], cell: str) -> None:
    assert policies_page.mark(outcomes) == cell


def test_a_page_without_marks_is_named() -> None:
    with pytest.raises(ValueError, match="begin memory"):
        filled("a page", {"memory": "|"})


@pytest.mark.full
def test_an_outdated_page_fails_the_check(tmp_path: Path) -> None:
    page = tmp_path / "policies.md"
    page.write_text((ROOT / "docs" / "policies.md").read_text().replace("| `act` | yes |", "| `act` | no |"))
    done = run("benchmarks/policies_page.py", "--check", "true", "--page", str(page))
    assert done.returncode != 0
    assert "not up to date" in done.stderr
    assert run("benchmarks/policies_page.py", "--page", str(page)).returncode == 0
    assert page.read_text() == (ROOT / "docs" / "policies.md").read_text()
