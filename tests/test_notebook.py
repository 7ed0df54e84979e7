"""docs/quickstart.ipynb runs from its first cell to its last; `python tests/test_notebook.py` renews its stored outputs."""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.full

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
PICTURE = "image/png"
# absolute paths of a POSIX or Windows machine, and addresses of objects
OF_A_MACHINE = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]+|[A-Z]:\\\\|\bat 0x[0-9a-f]+")


def execute(folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run in a fresh kernel whose working directory is `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    os.environ.setdefault("IPYTHONDIR", str(folder / ".ipython"))
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def renew() -> None:
    """Run the notebook and store what a reader wants to see: printed text and pictures, without progress bars."""
    with TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _for_readers(output)]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n")


def _for_readers(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stdout"
    return PICTURE in output.data or output.output_type == "execute_result"


def texts(notebook: nbformat.NotebookNode) -> str:
    """Everything the cells have printed or shown, without the pictures."""
    return "\n".join(
        output.text
        if output.output_type == "stream"
        else "\n".join(str(value) for kind, value in output.get("data", {}).items() if kind != PICTURE)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def pictures(notebook: nbformat.NotebookNode) -> int:
    """How many pictures the cells show."""
    return sum(PICTURE in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    done = execute(tmp_path)
    assert pictures(done) == 2
    shown = texts(done)
    assert "the same actions: True" in shown
    assert "Not pushed" in shown
    folder = tmp_path / "quickstart_output"
    assert (folder / "ptr_scorer.safetensors").is_file()
    assert json.loads((folder / "config.json").read_text())["type"] == "smolvla"


def test_what_is_stored_is_from_one_run_and_shows_no_machine() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert pictures(stored) == 2
    assert not OF_A_MACHINE.findall(texts(stored))
    assert NOTEBOOK.stat().st_size < 600_000


if __name__ == "__main__":
    renew()
