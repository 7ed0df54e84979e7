"""The paper's experiments as far as they go without their assets: every command of their page parses, every variant trains."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import draccus
import numpy as np
import pytest
import torch
import yaml
from lerobot.configs import PreTrainedConfig
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.envs.configs import EnvConfig, LiberoEnv, RoboCasaEnv
from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.factory import make_policy, make_pre_post_processors
from stand_ins import SCHEMAS, write_smolvla_base, write_stand_in
from transformers import set_seed

from ptr_hf import PTRPolicy, PTRTrainer
from ptr_hf.cli import train_run
from ptr_hf.report.dynamics import read_dynamics

pytestmark = pytest.mark.full

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = RECIPES / "experiments" / "paper"
SWEPT = re.compile(r"_combined_(?P<name>[a-z_]+)_(?P<value>[0-9.]+)$")
VARIANTS = sorted(file.stem for file in (PAPER / "variants").glob("*.yaml"))
# a machine's worth of the paper's run: two steps, one process, weights move from the second step on
SHORT = {
    "max_steps": "2",
    "warmup_steps": "0",
    "scorer_warmup_steps": "1",
    "logging_steps": "1",
    "per_device_train_batch_size": "4",
    "dataloader_num_workers": "0",
    "use_cpu": "true",
    "report_to": "none",
    "save_strategy": "no",
    "seed": "1",
}


def _module(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


corrupt_dataset = _module("corrupt_dataset")


# ---- the page's commands -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Commands:
    """The arguments of every command that the page starts, in order."""

    corrupt: list[list[str]]
    train: list[list[str]]
    evaluate: list[list[str]]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """The page's shell blocks run by bash, with programs that only write down how they were called."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "bin").mkdir()
    for name in ("accelerate", "python", "lerobot-eval"):
        program = folder / "bin" / name
        program.write_text(
            f"#!/bin/bash\n(printf '%s\\x1f' {name} \"$@\"; echo) >> {folder / 'calls'}\n"
            'while [ $# -gt 1 ]; do [ "$1" = --output_dir ] && mkdir -p "$2"; shift; done; exit 0\n'
        )
        program.chmod(0o755)
    script = "\n".join(re.findall(r"```bash\n(.*?)```", (PAPER / "README.md").read_text(), re.DOTALL))
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu", "-c", script], cwd=folder, check=True, env=os.environ | {"PATH": path})
    calls = [line.split("\x1f")[:-1] for line in (folder / "calls").read_text().splitlines()]
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "8", "recipes/train_ptr.py"]
    corrupt = ["python", "recipes/corrupt_dataset.py"]
    found = Commands(
        corrupt=[call[2:] for call in calls if call[:2] == corrupt],
        train=[call[6:] for call in calls if call[:6] == launch],
        evaluate=[call[1:] for call in calls if call[0] == "lerobot-eval"],
    )
    assert len(found.corrupt) + len(found.train) + len(found.evaluate) == len(calls)
    return found


def value(arguments: list[str], name: str) -> str:
    """What follows an option on a command line."""
    return arguments[arguments.index(name) + 1]


def test_the_page_holds_every_cell(commands: Commands) -> None:
    outputs = [value(arguments, "--output_dir") for arguments in commands.train]
    cells = set(outputs)
    assert len(outputs) - len(cells) == 1  # the page shows one cell in full before the loops
    for suite in SCHEMAS:
        grid = {f"{c}_{v}" for c in ("clean", "ani", "tt", "ln", "combined") for v in ("sft", "sft_belief", "ptr")}
        grid |= {f"clean_{variant}" for variant in VARIANTS}
        assert {f"outputs/{suite}_{cell}" for cell in grid} <= cells
        swept = [
            match for cell in cells if cell.startswith(f"outputs/{suite}_combined_") and (match := SWEPT.search(cell))
        ]
        assert {match["name"] for match in swept} == {"temperature", "beta", "weight_max"}
        assert len(swept) == 11


@pytest.mark.full
def test_every_training_command_parses_to_the_papers_settings(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    written = {value(arguments, "--output_dir") for arguments in commands.corrupt}
    for arguments in commands.train:
        recipe, args = train_run.parse_arguments([*arguments, "--use_cpu", "true"])
        cell = Path(args.output_dir).name
        assert recipe.dataset in written
        assert recipe.dataset.startswith(f"data/{cell.split('_')[0]}")
        assert recipe.policy_path == "lerobot/smolvla_base"
        assert 8 * args.per_device_train_batch_size * args.segment_length * args.gradient_accumulation_steps == 128
        assert (args.max_steps, args.chunk_size, args.learning_rate, args.weight_decay) == (60_000, 16, 1e-4, 0.01)
        assert (args.warmup_steps, args.scorer_warmup_steps, args.lr_scheduler_type) == (2000, 3000, "cosine")
        if match := SWEPT.search(cell):
            assert vars(args)[match["name"]] == float(match["value"])
        elif cell.endswith(("_sft", "_sft_belief", "_ptr")):
            assert args.preset == cell.split("_", 2)[2]


def test_table6_is_what_the_library_calls_the_papers_defaults() -> None:
    table = yaml.safe_load((PAPER / "table6.yaml").read_text())
    defaults = train_run.PTRTrainingArguments(output_dir="unused", use_cpu=True, preset="ptr").hyperparameters()
    shared = {name: setting for name, setting in table.items() if name in defaults}
    assert len(shared) > 25
    own = {
        "chunk_size",
        "scorer_warmup_steps",
        "preset",
    }  # the run's length and the policy's chunk are the experiment's
    assert {name: defaults[name] for name in shared if name not in own} == {
        name: setting for name, setting in shared.items() if name not in own
    }


def test_every_copy_is_one_of_the_papers_conditions(commands: Commands) -> None:
    parser = corrupt_dataset.OptionParser(corrupt_dataset.CorruptionArguments)
    shares: dict[str, Any] = {}
    for call in commands.corrupt:
        (arguments,) = parser.parse_args_into_dataclasses(call)
        plan = arguments.plan()
        shares[str(arguments.output_dir)] = dict(plan.shares)
        assert plan.parameters.get("noise", {"std": 0.1, "bounds": [-1, 1]}) == {"std": 0.1, "bounds": [-1, 1]}
    noise, truncation, instruction = {"noise": 0.3}, {"truncation": 0.25}, {"wrong_instruction": 0.2}
    for suite in SCHEMAS:
        assert {name.removeprefix(f"data/{suite}_"): share for name, share in shares.items() if suite in name} == {
            "clean": {},
            "ani": noise,
            "tt": truncation,
            "ln": instruction,
            "combined": noise | truncation | instruction,
        }


@pytest.mark.full
def test_every_evaluation_reads_what_a_training_wrote(commands: Commands) -> None:
    trained = {value(arguments, "--output_dir") for arguments in commands.train}
    evaluated, seen = set(), set()
    for arguments in commands.evaluate:
        given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        policy = given.pop("policy.path")
        evaluated.add(policy)
        suite = policy.removeprefix("outputs/").split("_")[0]
        assert given.pop("output_dir") == policy.replace("outputs/", "eval/")
        if (suite, *given.values()) in seen:
            continue
        seen.add((suite, *given.values()))
        config = draccus.parse(EvalPipelineConfig, args=[f"--{name}={setting}" for name, setting in given.items()])
        assert config.env.type == suite
        assert config.rename_map == yaml.safe_load((PAPER / f"{suite}.yaml").read_text())["rename_map"]
    assert evaluated == trained
    assert len(seen) == len(SCHEMAS)


# ---- two steps of every variant ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stand_ins")
    return {suite: write_stand_in(folder / suite, suite) for suite in SCHEMAS}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stand_in(tmp_path_factory.mktemp("stand_ins") / "short", "libero", (8, 8), videos=False)


@pytest.fixture(scope="module")
def smolvla_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smolvla_base(tmp_path_factory.mktemp("smolvla_base"))


def trainer_of(
    suite: str, variant: str, dataset: Path, base: Path, output: Path, options: dict[str, str] | None = None
) -> PTRTrainer:
    """The trainer that the recipe makes from a variant's files."""
    files = [PAPER / "table6.yaml", PAPER / f"{suite}.yaml", PAPER / "variants" / f"{variant}.yaml"]
    given = SHORT | {"dataset": str(dataset), "policy_path": str(base), "output_dir": str(output)} | (options or {})
    arguments = ["--config", *map(str, files)]
    arguments += [part for name, setting in given.items() for part in (f"--{name}", setting)]
    recipe, args = train_run.parse_arguments(arguments)
    set_seed(args.seed)
    policy = train_run.adapted_policy(recipe.policy_path, recipe.policy_overrides, recipe.dataset, args)
    return PTRTrainer(policy, args, recipe.dataset)


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: torch.nn.Module) -> bool:
    """Whether any tensor differs from its copy."""
    return any(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


FEW = ("ptr", "sft_belief", "frozen_encoder")
"""Variants that the default run trains."""
CHANGED: dict[str, dict[str, Any]] = {
    "ptr": {},
    "sft": {"alpha": 0.0, "num_belief_tokens": 0, "scorer": False},
    "sft_belief": {"alpha": 0.0},
    "no_belief": {"num_belief_tokens": 0},
    "no_gather": {"cross_rank_negatives": False},
    "frozen_encoder": {"ema_decay": 1.0},
    "no_controller": {"controller": False},
    "no_clipping": {"weight_min": 1e-9, "weight_max": 1e6},
}


@pytest.mark.full
@pytest.mark.parametrize(
    "variant", [variant if variant in FEW else pytest.param(variant, marks=pytest.mark.full) for variant in VARIANTS]
)
def test_every_variant_trains(variant: str, datasets: dict[str, Path], smolvla_base: Path, tmp_path: Path) -> None:
    trainer = trainer_of("libero", variant, datasets["libero"], smolvla_base, tmp_path)
    policy = trainer.policy
    config = policy.config
    full = {"alpha": 1.0, "num_belief_tokens": 4, "scorer": True, "cross_rank_negatives": True, "ema_decay": 0.999}
    full |= {"controller": True, "weight_min": 0.25, "weight_max": 4.0}
    assert {name: vars(config)[name] for name in full} == full | CHANGED[variant]
    assert (config.resolved_chunk_size, config.layout.segment_length) == (16, 4)
    assert vars(config.base_config)["num_steps"] == 4

    vision = policy.base.model.vlm_with_expert.get_vlm_model().vision_model
    tower = copied(vision)
    target = None if policy.target_encoder is None else copied(policy.target_encoder)
    trainer.train()
    assert moved(tower, vision)
    dynamics = read_dynamics(tmp_path / "ptr_dynamics.parquet")
    last = {
        name: dynamics.column(name, config.preset)[-1] for name in ("score", "weight_min", "weight_max", "loss_action")
    }
    assert math.isfinite(last["loss_action"])
    if config.scorer:
        assert policy.target_encoder is not None
        assert target is not None
        assert moved(target, policy.target_encoder) == (variant != "frozen_encoder")
        assert last["score"] != 0.0
        assert (last["weight_max"] > last["weight_min"]) == (config.alpha > 0)


OBSERVATIONS: dict[str, dict[str, Any]] = {
    "libero": {
        "pixels": {"image": (256, 256, 3), "image2": (256, 256, 3)},
        "robot_state": {
            "eef": {"pos": (3,), "quat": (4,), "mat": (3, 3)},
            "gripper": {"qpos": (2,), "qvel": (2,)},
            "joints": {"pos": (7,), "vel": (7,)},
        },
    },
    "robocasa": {
        "pixels": {f"robot0_{name}": (256, 256, 3) for name in ("agentview_left", "eye_in_hand", "agentview_right")},
        "agent_pos": (16,),
    },
}
ENVIRONMENTS: dict[str, type[EnvConfig]] = {"libero": LiberoEnv, "robocasa": RoboCasaEnv}


def drawn(shapes: Any, random: np.random.Generator, environments: int) -> Any:
    """An observation of a vector environment with the given shapes."""
    if isinstance(shapes, dict):
        return {key: drawn(shape, random, environments) for key, shape in shapes.items()}
    if len(shapes) == 3:
        return random.integers(0, 256, (environments, *shapes), dtype=np.uint8)
    return random.uniform(-1, 1, (environments, *shapes)).astype(np.float32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("suite", "variant"),
    [
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("libero", "sft"), ("robocasa", "ptr"))),
        ("libero", "ptr"),
    ],
)
def test_a_checkpoint_acts_as_lerobot_eval_drives_it(
    suite: str, variant: str, datasets: dict[str, Path], smolvla_base: Path, tmp_path: Path
) -> None:
    """As `lerobot_eval.eval_main` does, on drawn observations: the simulators are not installed here."""
    trainer = trainer_of(suite, variant, datasets[suite], smolvla_base, tmp_path)
    trainer.train()
    trainer.save_model()
    rename_map = yaml.safe_load((PAPER / f"{suite}.yaml").read_text())["rename_map"]
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.pretrained_path = tmp_path
    environment = ENVIRONMENTS[suite]()
    policy = make_policy(config, env_cfg=environment, rename_map=rename_map).eval()
    assert isinstance(policy, PTRPolicy) == (variant == "ptr")
    overrides = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": rename_map}}
    before, after = make_pre_post_processors(config, pretrained_path=str(tmp_path), preprocessor_overrides=overrides)
    before_environment, _ = make_env_pre_post_processors(env_cfg=environment, policy_cfg=config)
    policy.reset()
    actions = []
    for step in range(17):  # one more than a chunk: the policy has to look again
        observation = preprocess_observation(drawn(OBSERVATIONS[suite], np.random.default_rng(step), environments=2))
        observation["task"] = ["turn on the stove"] * 2
        with torch.no_grad():
            actions.append(after(policy.select_action(before(before_environment(observation)))))
    assert {tuple(action.shape) for action in actions} == {(2, SCHEMAS[suite]["action"])}
    assert torch.stack(actions).isfinite().all()


# ---- reading several files -----------------------------------------------------------------------------------------


def test_later_files_override_earlier_ones_and_the_command_line_all(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("preset: ptr\nbeta: 1.0\nweight_max: 2.0\nalpha: 0.5\noutput_dir: out\nuse_cpu: true\n")
    second.write_text("weight_max: 3.0\nalpha: 0.25\n")
    for command in (["--config", str(first), str(second)], ["--config", str(first), "--config", str(second)]):
        _, args = train_run.parse_arguments([*command, "--alpha", "0.75"])
        assert (args.beta, args.weight_max, args.alpha) == (1.0, 3.0, 0.75)
    _, args = train_run.parse_arguments(["--config", str(second), str(first)])
    assert (args.weight_max, args.alpha) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no such file"),
        ("aplha: 1", "unknown options aplha"),
        ("config: other.yaml", "unknown options config"),
        ("just words", "has lines `name: value`"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("output_dir: out\n")
    if text is not None:
        bad.write_text(text)
    with pytest.raises(SystemExit):
        train_run.parse_arguments(["--config", str(good), str(bad)])
    shown = capsys.readouterr().err
    assert sentence in shown
    assert str(bad) in shown


@pytest.mark.parametrize("override", ["freeze_vision_tower=false", "num_steps", "num_steps=four"])
def test_an_override_that_does_not_fit_the_policy_is_refused(override: str, short: Path, smolvla_base: Path) -> None:
    args = train_run.PTRTrainingArguments(output_dir="unused", use_cpu=True)
    with pytest.raises(ValueError, match=r"policy_overrides=.* do not fit the policy"):
        train_run.adapted_policy(str(smolvla_base), [override], short, args)
