"""The diagnosis as a user runs it, on a dataset too small for a verdict, with every kind of policy."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from demonstrations import write_dataset
from lerobot.policies.factory import make_pre_post_processors
from small_policies import base_policy, ptr_policy, stats_of

pytestmark = pytest.mark.full

RECIPE = Path(__file__).parents[2] / "recipes" / "diagnose.py"
QUICK = ["--steps", "5", "--segment_length", "2", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The recipe as a module, to call its `main` without another start of Python."""
    specification = importlib.util.spec_from_file_location("diagnose", RECIPE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["diagnose"] = module
    specification.loader.exec_module(module)
    return module


def checkpoint(kind: str, points: Path, folder: Path) -> Path:
    """A saved policy of somebody's: a LeRobot one or a PTR one."""
    policy = base_policy("act", points) if kind == "LeRobot" else ptr_policy("smolvla", points, segment_length=2)
    policy.save_pretrained(folder)
    base = policy.config if kind == "LeRobot" else policy.config.base_config
    for processor in make_pre_post_processors(base, dataset_stats=stats_of(points)):
        processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["LeRobot", "PTR"])
def test_somebodys_policy_on_somebodys_data(
    recipe: ModuleType, points: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, output = checkpoint(kind, points, tmp_path / "policy"), tmp_path / "out"
    recipe.main(["--dataset", str(points), "--policy_path", str(policy), "--output_dir", str(output), *QUICK])
    told = capsys.readouterr().out
    assert "Too few episodes to tell" in told
    assert "Are consequences identifiable?" in told
    assert "says an untrained policy" not in told
    assert (output / "diagnosis.html").stat().st_size > 50_000
    content = json.loads((output / "diagnosis.json").read_text())
    assert content["advice"]["verdict"] == "unclear"
    assert content["policy"] == str(policy)
    assert [row["episode"] for row in content["episodes"]] == [0, 1, 2, 3]
    assert content["chunks"] == 29
    assert content["detection"] == {}


def test_without_a_policy_a_tiny_one_looks_and_says_so(
    recipe: ModuleType, points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--dataset", str(points), "--output_dir", str(tmp_path), "--chunk_size", "4", *QUICK])
    assert "says an untrained policy" in capsys.readouterr().out
    assert json.loads((tmp_path / "diagnosis.json").read_text())["trained"] is False


def test_a_robot_without_cameras(recipe: ModuleType, tmp_path: Path) -> None:
    states = write_dataset(tmp_path / "states", (20, 24, 18, 22), cameras=())
    recipe.main(["--dataset", str(states), "--output_dir", str(tmp_path / "out"), *QUICK])
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["with_future"] > 0


def test_what_is_refused_is_said_in_a_sentence(recipe: ModuleType, points: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"diagnose.py: .*is no LeRobotDataset"):
        recipe.main(["--dataset", str(tmp_path), "--output_dir", str(tmp_path / "out"), *QUICK])
    with pytest.raises(SystemExit, match=r"diagnose.py: There is no truth sidecar"):
        recipe.main(["--dataset", str(points), "--truth", str(points), "--output_dir", str(tmp_path / "out"), *QUICK])
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert all(f"--{name}" in told for name in ("dataset", "policy_path", "max_segments", "truth"))
