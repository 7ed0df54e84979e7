"""Copy constraints.txt into pyproject.toml, the only place where `uv run` and `uv sync` read constraints.

python .ci/pins.py            # after constraints.txt has changed
python .ci/pins.py --check    # exit code 1 where the two differ
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST, LAST = "constraint-dependencies = [\n", "]\n"


def pinned(pyproject: str, constraints: str) -> str:
    """The text of pyproject.toml with the versions of constraints.txt.

    Args:
        pyproject: its text, which has a list `constraint-dependencies`.
        constraints: the text of constraints.txt: a requirement a line, and comments.
    """
    before, _, rest = pyproject.partition(FIRST)
    after = rest.partition(f"\n{LAST}")[2]
    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    return before + FIRST + "".join(f'    "{line}",\n' for line in lines) + LAST + after


def main() -> None:
    """Write, or compare."""
    path = ROOT / "pyproject.toml"
    now = path.read_text()
    wanted = pinned(now, (ROOT / "constraints.txt").read_text())
    if "--check" not in sys.argv:
        path.write_text(wanted)
    elif now != wanted:
        raise SystemExit("pyproject.toml and constraints.txt name other versions: run python .ci/pins.py")


if __name__ == "__main__":
    main()
