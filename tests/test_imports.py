"""What may import what: no circle of modules, and the folders that know little keep knowing little."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
RECIPES = SOURCE.with_name("recipes")


def modules() -> dict[str, Path]:
    found = {}
    for path in (SOURCE / "ptr_hf").rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str], later: bool = False) -> set[str]:
    """The modules of ours that a file imports when it is imported itself, or also `later`, inside of functions."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if later else tree.body:
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


def test_arrows_point_down(graph: dict[str, set[str]]) -> None:
    arrows = {
        (room(module), room(to)) for module, own in graph.items() for to in own if "" not in (room(module), room(to))
    }
    assert {name for arrow in arrows for name in arrow} <= set(ORDER)
    assert {arrow for arrow in arrows if ORDER.index(arrow[1]) < ORDER.index(arrow[0])} == set()


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


def test_the_package_imports_no_recipe() -> None:
    names = "|".join(["recipes", "benchmarks", *(path.stem for path in RECIPES.glob("*.py"))])
    recipe = re.compile(rf"^\s*(?:from|import) (?:{names})\b", re.MULTILINE)
    assert [path for path in SOURCE.rglob("*.py") if recipe.search(path.read_text())] == []


def test_every_module_of_the_wheel_serves_a_user() -> None:
    """What only a benchmark or a test needs stays outside: users start at these modules and at the scripts of recipes/."""
    commands = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text())["project"]["scripts"].values()
    known = modules()
    # LeRobot finds the processors of a policy by the name of their file
    reached = {"ptr_hf", "ptr_hf.policies", "ptr_hf.method", "ptr_hf.policies.processor_smolvla_state"}
    reached |= {entry.partition(":")[0] for entry in commands}
    files = [*RECIPES.glob("*.py"), SOURCE / "lerobot_policy_ptr.py", *(known[name] for name in reached)]
    while files:
        found = imports(files.pop(), set(known), later=True)
        found |= {name.rpartition(".")[0] for name in found} & known.keys()
        files += [known[name] for name in found - reached]
        reached |= found
    assert sorted(known.keys() - reached) == []
