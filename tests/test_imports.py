"""What may import what: no circle of modules, and the folders that know little keep knowing little."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def modules() -> dict[str, Path]:
    found = {}
    for path in (SOURCE / "ptr_hf").rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            members = {f"{node.module}.{name.name}" for name in node.names}
            found |= (members & known) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & known


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) - {name} for name, path in known.items()}


def room(module: str) -> str:
    """The folder below ptr_hf, or the module that lies beside the folders."""
    return [*module.split("."), ""][1]


def test_no_circle_of_modules(graph: dict[str, set[str]]) -> None:
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph) > 150


ORDER = (
    *("cli", "training", "scoring", "processor_ptr", "modeling_ptr", "publishing", "artifacts", "pathway"),
    *("configuration_ptr", "envs", "hyperparameters", "presets", "scores", "policies", "data", "files", "report"),
    *("method", "constants", "log_filters"),
)
"""Folders and single modules; each imports what stands after it, and nothing before it."""
STILL_UP = {("report", "hyperparameters"), ("report", "presets"), ("data", "envs")}
"""Arrows that run back up: the benchmark's."""


def test_arrows_point_down(graph: dict[str, set[str]]) -> None:
    arrows = {
        (room(module), room(to)) for module, own in graph.items() for to in own if "" not in (room(module), room(to))
    }
    assert {name for arrow in arrows for name in arrow} <= set(ORDER)
    assert {arrow for arrow in arrows if ORDER.index(arrow[1]) < ORDER.index(arrow[0])} <= STILL_UP


def test_one_trainer() -> None:
    nodes = [node for path in modules().values() for node in ast.parse(path.read_text()).body]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    trainers = [node.name for node in classes if any(ast.unparse(base).endswith("Trainer") for base in node.bases)]
    assert trainers == ["PTRTrainer"]


@pytest.mark.parametrize(
    ("folder", "may"), [("method", set()), ("policies", {"constants"}), ("scores", {"method"}), ("constants", set())]
)
def test_folders_that_know_little(graph: dict[str, set[str]], folder: str, may: set[str]) -> None:
    outside = {room(to) for module, own in graph.items() if room(module) == folder for to in own}
    assert outside - {folder} <= may


@pytest.mark.parametrize(
    ("folder", "by"),
    [("cli", set()), ("training", {"cli"}), ("scoring", {"cli", "training"}), ("publishing", {"training", "cli"})],
)
def test_folders_that_few_know(graph: dict[str, set[str]], folder: str, by: set[str]) -> None:
    importers = {room(module) for module, own in graph.items() if any(room(to) == folder for to in own)}
    assert importers - {folder} <= by
