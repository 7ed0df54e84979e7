"""The main recipe as a user runs it: real processes, the bundled demonstrations, a folder with somebody's policy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from demonstrations import write_dataset
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.envs.factory import make_env_config
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors.torch import load_file
from small_policies import base_policy

from ptr_hf import PTRPolicy, PTRTrainer
from ptr_hf.cli import train_run
from ptr_hf.cli.export import export
from ptr_hf.policies.bundled import BUNDLED_POLICY
from ptr_hf.report.chunk_scores import read_scores
from ptr_hf.report.dynamics import read_dynamics
from ptr_hf.scoring.dataset_scores import DatasetScores
from ptr_hf.scoring.inspected import SUCCESS, SUCCESS_OF_TASK

RECIPE = Path(__file__).parents[2] / "recipes" / "train_ptr.py"
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", str(RECIPE)]


def run(command: list[str], *options: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """What the command runs, to call its `main` without another start of Python."""
    return train_run


def test_the_demo_from_launch_to_report(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    short = ("--max_steps", "6", "--logging_steps", "2", "--evaluation_starts", "2")
    done = run(LAUNCH, "--output_dir", str(folder), *short)
    # the inspection comes first, and says who is bad and why; then both runs, then the table
    shown = done.stdout
    places = [shown.index(text) for text in ("episodes weigh less", "PTR_OFFLINE:", "SFT: the", "SFT beside PTR")]
    assert places[1] < places[0] < places[2] < places[3]
    assert "rollouts: 100%" in done.stderr
    results = json.loads((folder / "results.json").read_text())
    sft, ptr = results["sft"], results["ptr_offline"]
    for values in (sft, ptr):
        tasks = [value for name, value in values.items() if name.startswith(SUCCESS_OF_TASK)]
        assert len(tasks) == 8
        assert set(tasks) <= {0.0, 0.5, 1.0}
        assert values[SUCCESS] == pytest.approx(sum(tasks) / 8)
        # the policy that both start from solves tasks
        assert values[SUCCESS] > 0.1
    card = (folder / "ptr_offline" / "README.md").read_text()
    reached = 100 * ptr[SUCCESS_OF_TASK + "reach-left"]
    assert f"| metaworld (states) | reach-left | 6 | 2 | {reached:.1f} % |" in card
    assert "clipping" not in card
    assert ptr["AUC, bad episodes have a lower z (chance 0.5)"] > 0.95
    assert ptr["bad episodes that weigh less"] > 0.8
    assert ptr["clean episodes that weigh less"] < 0.05
    inspected = DatasetScores.load(folder / "ptr_offline" / "inspection")
    assert len(inspected.episodes) == 240
    assert read_dynamics(folder / "ptr_offline" / "ptr_dynamics.parquet").steps("ptr_offline").tolist() == [2, 4, 6]
    page = (folder / "ptr_report.html").read_text()
    assert "as the inspection found it before training" in page
    assert SUCCESS in page
    assert (folder / "figures" / "ptr_inspection.png").is_file()
    assert (folder / "summary.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "ptr_offline" / "runs").rglob("events.out.tfevents.*"))
    trained = PTRPolicy.from_pretrained(folder / "ptr_offline")
    assert trained.config.preset == "ptr_offline"
    # both began at the bundled policy, and the weights told them apart
    start = load_file(BUNDLED_POLICY / "model.safetensors")
    ends = [load_file(folder / name / "model.safetensors") for name in ("sft", "ptr_offline")]
    name = next(name for name in start if "action_out_proj.weight" in name)
    assert (ends[0][name] != ends[1][name]).any()
    assert all((end[name] - start[name]).abs().max() < 0.02 for end in ends)


@pytest.mark.full
def test_the_demo_with_a_camera(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = RECIPE.parent / "experiments" / "demo_images.yaml"
    short = ("--max_steps", "2", "--logging_steps", "1", "--report_to", "none")
    recipe.main(["--config", str(images), "--output_dir", str(tmp_path), *short])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sft"]["action loss, held-out clean episodes"] > 0
    assert results["ptr_calibrated"]["action loss, held-out clean episodes"] > 0
    assert "SFT beside PTR" in capsys.readouterr().out
    assert len(set(read_scores(tmp_path / "ptr_scores.parquet").episode_index.tolist())) == 60


@pytest.mark.full
def test_somebodys_policy_and_data_with_a_configuration_file(recipe: ModuleType, points: Path, tmp_path: Path) -> None:
    policy, folder = base_policy("act", points), tmp_path / "policy"
    policy.save_pretrained(folder)
    stats = LeRobotDatasetMetadata("tests/points", root=points).stats
    for processor in make_pre_post_processors(policy.config, dataset_stats=stats):
        processor.save_pretrained(folder)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"policy_path: {folder}\ndataset: {points}\noutput_dir: {tmp_path / 'unused'}\nmax_steps: 50\n"
        "num_belief_tokens: 0\nsegment_length: 2\nreport_to: none\nper_device_train_batch_size: 4\nuse_cpu: true\n"
    )
    given = ("--config", config, "--output_dir", tmp_path / "out", "--max_steps", "3", "--logging_steps", "1")
    recipe.main([str(word) for word in given])
    assert not (tmp_path / "unused").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["type"] == "act"
    assert PTRPolicy.from_pretrained(tmp_path / "out").config.num_belief_tokens == 0
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert any((value != load_file(folder / "model.safetensors")[name]).any() for name, value in trained.items())


@pytest.mark.full
def test_a_policy_from_scratch(recipe: ModuleType, points: Path, tmp_path: Path) -> None:
    small = ["dim_model=32", "n_heads=2", "dim_feedforward=32", "pretrained_backbone_weights=null", "use_vae=false"]
    given = [
        "--policy_type",
        "act",
        "--dataset",
        points,
        "--output_dir",
        tmp_path,
        "--chunk_size",
        "4",
        "--use_cpu",
        "true",
    ]
    steps = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
    recipe.main([str(word) for word in [*given, *steps, "--policy_overrides", *small]])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["type"], config["chunk_size"], config["dim_model"]) == ("act", 4, 32)
    assert PTRPolicy.from_pretrained(tmp_path).config.preset == "ptr_offline"
    assert "ptr_offline" in (tmp_path / "README.md").read_text()
    args = recipe.PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(
        ValueError, match=r"policy_type=acte is none that can be trained here: choose one of act, diffusion"
    ):
        recipe.new_policy("acte", [], args)
    for wrong in ("width=3", "dim_model=x"):
        with pytest.raises(ValueError, match=r"do not fit a policy of type act"):
            recipe.new_policy("act", [wrong], args)
    blind = write_dataset(tmp_path / "blind", (12,) * 8, cameras=())
    with pytest.raises(ValueError, match=r"No act policy can be made for the dataset .*blind: You must provide"):
        PTRTrainer(recipe.new_policy("act", [], args), args, blind)


def test_help_explains_every_option(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["--help_all"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--policy_path", "--dataset", "--config", "--alpha", "--num_belief_tokens", "--preset"):
        assert option in shown
    assert "how far weights may leave 1" in shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--alpha", "2"], "alpha=2.0 is out of range: it must be in [0, 1]."),
        (["--config", "nowhere.yaml"], "there is no such file"),
        (["--dataset", "me/demos"], "--dataset needs a --policy_path"),
        (["--policy_path", "me/policy"], "--policy_path needs a --dataset or a --mixture"),
        (["--policy_path", "me/policy", "--dataset", "me/demos", "--mixture", "m.yaml"], "give one of the two"),
        (["--policy_path", "me/policy", "--policy_type", "act", "--dataset", "me/demos"], "give one of the two"),
        (["--policy_type", "act"], "--policy_type needs a --dataset or a --mixture"),
        (["--only", "arm", "--policy_path", "me/policy", "--dataset", "me/demos"], "--only names a source"),
        (["--mixture", "nowhere.yaml", "--output_dir", "out"], "There is no mixture file nowhere.yaml"),
    ],
)
def test_a_refusal_is_one_sentence(
    recipe: ModuleType, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        recipe.main(options)
    assert sentence in capsys.readouterr().err + str(refusal.value)


@pytest.mark.full
def test_two_robots_from_one_command(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bundled data of two robots: other actions, states, cameras and rates."""
    mixture = Path(__file__).parents[2] / "recipes" / "experiments" / "mixture_demo.yaml"
    recipe.main(
        [
            *("--mixture", str(mixture), "--output_dir", str(tmp_path), "--max_steps", "4", "--logging_steps", "2"),
            *("--use_cpu", "true", "--chunk_size", "4", "--segment_length", "2", "--report_to", "none"),
            *("--per_device_train_batch_size", "4", "--save_strategy", "no"),
        ]
    )
    assert "checkpoint" in capsys.readouterr().out
    row = read_dynamics(tmp_path / "ptr_dynamics.parquet").groups("sources", "ptr_offline")[-1]
    assert row is not None
    assert [source["name"] for source in row] == ["metaworld", "ur5e"]
    assert sum(source["share"] for source in row) == pytest.approx(1.0)
    assert sum(source["weight_share"] for source in row) == pytest.approx(1.0)
    assert (tmp_path / "figures" / "ptr_sources.png").is_file()
    # the checkpoint for one of the two robots, as lerobot-eval takes it: it knows of the environment's own actions alone
    with pytest.raises(ValueError, match=r"say which one it will run on.*one of metaworld, ur5e"):
        export(tmp_path, tmp_path / "nobody")
    export(tmp_path, tmp_path / "arm", robot="metaworld")
    environment = make_env_config("ptr_metaworld", task="reach-left", track="pixels")
    config = PreTrainedConfig.from_pretrained(tmp_path / "arm")
    config.pretrained_path = tmp_path / "arm"
    policy = make_policy(config, env_cfg=environment)
    assert isinstance(policy, PTRPolicy)
    before, after = make_pre_post_processors(config, pretrained_path=str(tmp_path / "arm"))
    seen = {
        "observation.state": torch.zeros(1, 4),
        "observation.image": torch.zeros(1, 3, 84, 84),
        "task": ["reach the goal"],
    }
    assert after(policy.select_action(before(seen))).shape == (1, 4)
    with pytest.raises(ValueError, match=r"names 0 of the policy's sources; choose one of metaworld, ur5e"):
        export(tmp_path, tmp_path / "nobody", robot="nobody")
