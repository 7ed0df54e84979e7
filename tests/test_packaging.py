"""The versions that were tested stand in one file, and the documents link to what is there."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "recipes").rglob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def test_uv_and_pip_read_the_same_versions() -> None:
    pinned = runpy.run_path(str(ROOT / ".ci" / "pins.py"))["pinned"]
    text = (ROOT / "pyproject.toml").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    assert pinned(text, constraints) == text, "run python .ci/pins.py"
    listed = tomllib.loads(text)["tool"]["uv"]["constraint-dependencies"]
    assert listed == constraints.splitlines()
    newer = constraints.replace("absl-py==2.5.1", "absl-py==2.5.2")
    assert tomllib.loads(pinned(text, newer))["tool"]["uv"]["constraint-dependencies"][0] == "absl-py==2.5.2"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_documents(page: Path) -> None:
    """`mkdocs build --strict` checks anchors; this also checks what lies outside docs/."""
    missing = []
    for target in LINK.findall(page.read_text()):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
            missing.append(target)
    assert missing == []
