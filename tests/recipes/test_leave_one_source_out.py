"""Leaving one source out: the arithmetic by hand, what is refused, and the recipe as a user runs it."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from demonstrations import write_dataset
from lerobot.policies.factory import make_pre_post_processors
from small_policies import base_policy, stats_of

RECIPE = Path(__file__).parents[2] / "recipes" / "leave_one_source_out.py"
ROBOT = (
    "{action: [right_ee_delta_x, right_ee_delta_y], "
    "state: [right_arm_joint_1, right_arm_joint_2, right_arm_joint_3, right_arm_joint_4]}"
)
QUICK = [
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--segment_length", "2", "--head_dim", "16"),
    *("--heldout", "0.25", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--save_strategy", "no"),
]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    specification = importlib.util.spec_from_file_location("leave_one_source_out", RECIPE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["leave_one_source_out"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of one robot, their mixture, and a policy."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, (name, lengths) in enumerate({"bench": (16, 14), "lab": (15, 17)}.items()):
        write_dataset(folder / name, lengths, seed=seed)
    policy = base_policy("smolvla", folder / "bench")
    policy.save_pretrained(folder / "policy")
    for processor in make_pre_post_processors(policy.config, dataset_stats=stats_of(folder / "bench")):
        processor.save_pretrained(folder / "policy")
    mixture(folder)
    return folder


def mixture(
    folder: Path, name: str = "mixture.yaml", extra: str = "", sources: tuple[str, ...] = ("bench", "lab")
) -> str:
    lines = [f"  - {{dataset: {source}, embodiment: {ROBOT}}}\n" for source in sources]
    (folder / name).write_text(f"sources:\n{''.join(lines)}action_space: compact\n{extra}")
    return str(folder / name)


def test_effects_by_hand(recipe: ModuleType) -> None:
    values = {
        (recipe.ALL, 0): {"a": 1.0, "b": 2.0}, (recipe.ALL, 1): {"a": 3.0, "b": 2.0}, (recipe.ALL, 2): {"a": 5.0},
        ("b", 0): {"a": 1.5}, ("b", 1): {"a": 4.5}, ("a", 0): {"b": 1.0},
    }  # fmt: skip
    measured = [
        recipe.Measured(left_out, seed, recipe.LOSS, on, value)
        for (left_out, seed), row in values.items()
        for on, value in row.items()
    ]
    without_b, without_a = recipe.effects(measured)
    # pairs of seeds 0 and 1: +0.5 and +1.5
    assert without_b[:6] == ("b", "action loss", "a", 2.0, 3.0, 1.0)
    assert without_b.standard_error == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert without_b.seeds == 2
    assert without_a[:6] == ("a", "action loss", "b", 2.0, 1.0, -1.0)
    assert math.isnan(without_a.standard_error)
    assert recipe.cell_text(without_b) == "+50.0 ± 25.0"
    assert recipe.cell_text(without_a) == "-50.0"
    assert recipe.cell_text(None) == "–"
    success = recipe.Effect("b", recipe.SUCCESS, "reach", 0.5, 0.25, -0.25, 0.1, 3)
    assert recipe.cell_text(success) == "-25.0 ± 10.0"


def test_held_out_episodes_are_spread_and_leave_some(recipe: ModuleType) -> None:
    assert recipe.heldout_episodes(range(20), 0.1) == [5, 15]
    assert recipe.heldout_episodes([3, 9, 12], 0.1) == [9]
    with pytest.raises(ValueError, match="leave none to train on"):
        recipe.heldout_episodes([7], 0.5)


def test_the_picture_has_what_was_left_out_on_its_diagonal(recipe: ModuleType) -> None:
    found = [
        recipe.Effect("a", recipe.LOSS, "c", 1.0, 1.2, 0.2, 0.1, 2),
        recipe.Effect("a", recipe.LOSS, "b", 1.0, 0.9, -0.1, math.nan, 1),
        recipe.Effect("b", recipe.LOSS, "a", 1.0, 1.0, 0.0, 0.1, 2),
        recipe.Effect("b", recipe.SUCCESS, "reach $x$", 0.5, 0.4, -0.1, 0.1, 2),
    ]
    picture = recipe.effects_figure(found)
    loss, success = picture.axes
    assert [label.get_text() for label in loss.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in loss.texts] == ["–", "-10.0", "+20.0 ± 10.0", "+0.0 ± 10.0", "–", "–"]
    assert [text.get_text() for text in success.texts] == ["-10.0 ± 10.0"]
    # a loss that rises and a success that falls have the same colour
    assert loss.images[0].get_array()[0, 2] > 0
    assert success.images[0].get_array()[0, 0] > 0
    picture.canvas.draw()


@pytest.mark.full
def test_the_recipe_from_training_to_picture(
    recipe: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["--mixture", str(folder / "mixture.yaml"), "--policy_path", str(folder / "policy"), *QUICK]
    command += ["--output_dir", str(output)]
    recipe.main(command)
    with (output / "effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["left_out"], row["on"]) for row in rows] == [("bench", "lab"), ("lab", "bench")]
    whole = json.loads((output / "all" / "seed_0" / "result.json").read_text())
    alone = json.loads((output / "without_0_bench" / "seed_0" / "result.json").read_text())
    assert list(whole["action loss"]) == ["bench", "lab"]
    assert list(alone["action loss"]) == ["lab"]
    assert float(rows[0]["difference"]) == alone["action loss"]["lab"] - whole["action loss"]["lab"]
    assert (output / "effects.png").read_bytes()[:4] == b"\x89PNG"
    # finished runs are not trained again: the numbers are those on the disk
    capsys.readouterr()
    whole["action loss"]["lab"] = 1.0
    (output / "all" / "seed_0" / "result.json").write_text(json.dumps(whole))
    recipe.main(command)
    assert "run 1 of" not in capsys.readouterr().out
    with (output / "effects.csv").open() as file:
        assert float(next(csv.DictReader(file))["complete"]) == 1.0
    with pytest.raises(SystemExit, match=r"other settings \(optimisation\)"):
        recipe.main([*command, "--learning_rate", "0.5"])


def test_what_cannot_be_compared_is_refused(recipe: ModuleType, folder: Path, tmp_path: Path) -> None:
    def run(path: str, *more: str) -> None:
        recipe.main(
            ["--mixture", path, "--policy_path", str(folder / "policy"), "--output_dir", str(tmp_path), *QUICK, *more]
        )

    with pytest.raises(SystemExit, match="set statistics: source"):
        run(mixture(folder, "pooled.yaml", "statistics: pooled\n"))
    with pytest.raises(SystemExit, match="The sources are bench"):
        run(mixture(folder, "one.yaml", sources=("bench",)))
    with pytest.raises(SystemExit, match="nowhere has to be one"):
        run(str(folder / "mixture.yaml"), "--only", "nowhere")
    with pytest.raises(SystemExit, match="give --max_steps"):
        run(str(folder / "mixture.yaml"), "--max_steps", "-1", "--num_train_epochs", "1")
