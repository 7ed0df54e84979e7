"""Checkpoints: what is written loads again exactly, with plain LeRobot where that is promised, or says what is wrong."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_pre_post_processors
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_policies import base_policy, frames_of, ptr_policy, stats_of, tensors_equal, train_batch

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.artifacts.checkpoint import is_ptr_folder
from ptr_hf.processor_ptr import make_ptr_pre_post_processors

ANCHORS = [0, 12, 33, 60]
CASES = {"act": 0, "smolvla": 0, "act-belief": 2, "smolvla-belief": 2}
PLAIN = ("act", "smolvla")


def settings_of(case: str) -> dict[str, Any]:
    return {
        "preset": "ptr",
        "segment_length": 2,
        "num_belief_tokens": CASES[case],
        "scorer_warmup_steps": 0,
        "queue_size": 32,
        "queue_negatives": 8,
    }


def save(policy: PTRPolicy, points: Path, folder: Path) -> Path:
    """Everything a trainer writes of a policy."""
    policy.save_pretrained(folder)
    preprocessor, postprocessor = make_ptr_pre_post_processors(policy.config, stats_of(points))
    preprocessor.save_pretrained(folder, config_filename="policy_preprocessor.json")
    postprocessor.save_pretrained(folder, config_filename="policy_postprocessor.json")
    return folder


def train_a_step(policy: PTRPolicy, batch: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    policy(batch)[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    policy.update()


@pytest.fixture(scope="module")
def trained(points: Path) -> dict[str, PTRPolicy]:
    """One policy per case after an optimiser step, so that average, queue and counters have moved."""
    policies = {}
    for case in CASES:
        policy = ptr_policy(case.split("-")[0], points, **settings_of(case))
        torch.manual_seed(0)
        train_a_step(policy, train_batch(policy, points, ANCHORS))
        assert len(policy.objective.queue) > 0
        policies[case] = policy
    return policies


@pytest.fixture(scope="module")
def folders(trained: dict[str, PTRPolicy], points: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {case: save(policy, points, root / case) for case, policy in trained.items()}


def loss_of(policy: PTRPolicy, batch: dict[str, Any]) -> torch.Tensor:
    policy.eval()
    torch.manual_seed(0)
    return policy(batch)[0]


def actions_of(policy: Any, folder: Path, frames: list[int], points: Path) -> torch.Tensor:
    """Raw observations in, robot actions out, through the processors of the folder."""
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    policy.reset()
    torch.manual_seed(0)
    chunk = policy.predict_action_chunk(preprocessor(raw_observation(points, frames)))
    return postprocessor(chunk)


def raw_observation(points: Path, frames: list[int]) -> dict[str, Any]:
    items = [frames_of(points)[frame] for frame in frames]
    keys = ("observation.image", "observation.state")
    return {key: torch.stack([item[key] for item in items]) for key in keys} | {
        "task": [item["task"] for item in items]
    }


class TestLayout:
    @pytest.mark.full
    @pytest.mark.parametrize("case", CASES)
    def test_files(self, folders: dict[str, Path], case: str) -> None:
        expected = {"ptr_config.json", "ptr_scorer.safetensors", "model.safetensors", "config.json"}
        written = {path.name for path in folders[case].iterdir()}
        assert expected <= written
        assert {path.rsplit(".", 1)[1] for path in written} == {"json", "safetensors"}, "nothing that can execute"
        assert is_ptr_folder(folders[case])
        config = json.loads((folders[case] / "config.json").read_text())
        assert config["type"] == (case if case in PLAIN else "ptr")

    def test_an_act_checkpoint_is_lerobots_own_beside_ptr_files(self, folders: dict[str, Path]) -> None:
        written = {path.name for path in folders["act"].iterdir()}
        other = {name for name in written if not name.startswith("ptr_")}
        assert {name for name in other if "processor" not in name} == {"config.json", "model.safetensors"}
        stored = load_file(folders["act"] / "model.safetensors")
        assert not [name for name in stored if name.startswith("base.")]

    def test_only_the_side_pathway_is_in_the_scorer_file(self, folders: dict[str, Path]) -> None:
        names = load_file(folders["act-belief"] / "ptr_scorer.safetensors")
        assert {name.split(".")[0] for name in names} == {"objective", "target_encoder", "belief"}


class TestRoundTrip:
    @pytest.mark.full
    @pytest.mark.parametrize("case", CASES)
    def test_it_loads_exactly(
        self, folders: dict[str, Path], trained: dict[str, PTRPolicy], points: Path, case: str
    ) -> None:
        loaded, original = PTRPolicy.from_pretrained(folders[case]), trained[case]
        assert not loaded.training
        assert tensors_equal(loaded.state_dict(), original.state_dict())
        assert loaded.objective.step == original.objective.step == 1
        assert loaded.config.hyperparameters() == original.config.hyperparameters()
        batch = train_batch(original, points, ANCHORS)
        assert torch.equal(loss_of(loaded, batch), loss_of(original, batch))
        original.train()

    def test_it_keeps_learning_the_same_way(
        self, folders: dict[str, Path], trained: dict[str, PTRPolicy], points: Path
    ) -> None:
        policies = [PTRPolicy.from_pretrained(folders["smolvla-belief"]), copy.deepcopy(trained["smolvla-belief"])]
        batch = train_batch(policies[0], points, [3, 35, 50])
        for policy in policies:
            torch.manual_seed(1)
            train_a_step(policy.train(), batch)
        assert tensors_equal(policies[0].state_dict(), policies[1].state_dict())

    def test_the_warmup_stays_that_of_the_run(self, points: Path, tmp_path: Path) -> None:
        policy = ptr_policy("act", points, segment_length=2, num_belief_tokens=0, scorer_warmup_steps=0.5)
        policy.set_run_length(2)
        batch = train_batch(policy, points, ANCHORS)
        train_a_step(policy, batch)
        policy.save_pretrained(tmp_path)
        loaded = PTRPolicy.from_pretrained(tmp_path)
        assert loaded.objective.warmup_steps == 1
        weights = loaded.compute(batch).weight
        assert torch.equal(weights, policy.eval().compute(batch).weight)
        assert not torch.equal(weights, torch.ones(8))

    def test_a_policy_without_a_scorer(self, points: Path, tmp_path: Path) -> None:
        policy = ptr_policy("act", points, preset="sft")
        policy.save_pretrained(tmp_path)
        loaded = PTRPolicy.from_pretrained(tmp_path)
        assert loaded.objective is None
        assert tensors_equal(loaded.state_dict(), policy.state_dict())

    def test_a_frozen_tower_is_not_stored_and_still_loads(self, points: Path, tmp_path: Path) -> None:
        """ACT's configuration does not say that its backbone was frozen: a loaded policy averages it again."""
        base = base_policy("act", points)
        base.model.backbone.requires_grad_(False)
        policy = PTRPolicy(PTRConfig(device="cpu", **settings_of("act")), base_policy=base)
        train_a_step(policy, train_batch(policy, points, ANCHORS))
        policy.save_pretrained(tmp_path)
        assert not [
            name for name in load_file(tmp_path / "ptr_scorer.safetensors") if name.startswith("target_encoder")
        ]
        loaded = PTRPolicy.from_pretrained(tmp_path)
        assert not loaded.target_encoder.shared
        batch = train_batch(policy, points, ANCHORS)
        torch.testing.assert_close(loss_of(loaded, batch), loss_of(policy, batch), rtol=1e-4, atol=1e-5)

    def test_a_peft_model_is_stored_merged(self, points: Path, tmp_path: Path) -> None:
        lora = LoraConfig(r=2, target_modules=r".*(action_head|linear1)", init_lora_weights=False)
        peft = get_peft_model(base_policy("act", points), lora)
        policy = PTRPolicy(PTRConfig(device="cpu", **settings_of("act")), base_policy=peft)
        save(policy, points, tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert stored.keys() == base_policy("act", points).state_dict().keys()
        loaded = PTRPolicy.from_pretrained(tmp_path)
        batch = train_batch(policy, points, ANCHORS)
        torch.testing.assert_close(loss_of(loaded, batch), loss_of(policy, batch), rtol=1e-4, atol=1e-5)
        assert any("lora_" in name for name in policy.base.state_dict()), "saving leaves the model in training alone"


PLAIN_LEROBOT = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ptr_hf", "lerobot_policy_ptr"):
            raise ImportError(f"{name} is not installed")


sys.meta_path.insert(0, Blocked())
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

inputs, outputs, *folders = sys.argv[1:]
observation = load_file(inputs)
actions = {}
for policy_class, folder in zip((ACTPolicy, SmolVLAPolicy), folders, strict=True):
    policy = policy_class.from_pretrained(folder)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=folder)
    torch.manual_seed(0)
    batch = preprocessor({**observation, "task": ["reach the goal"] * len(observation["observation.state"])})
    actions[policy_class.name] = postprocessor(policy.predict_action_chunk(batch))
assert not [name for name in sys.modules if name.startswith("ptr_hf")]
save_file(actions, outputs)
"""


class TestLeRobot:
    @pytest.mark.full
    def test_without_belief_plain_lerobot_needs_no_ptr_hf(
        self, folders: dict[str, Path], points: Path, tmp_path: Path
    ) -> None:
        frames = [35, 50]
        observation = raw_observation(points, frames)
        assert set(observation.pop("task")) == {"reach the goal"}
        save_file(observation, tmp_path / "observation.safetensors")
        arguments = [
            tmp_path / "observation.safetensors",
            tmp_path / "actions.safetensors",
            *(folders[case] for case in PLAIN),
        ]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_LEROBOT, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        plain = load_file(tmp_path / "actions.safetensors")
        for case in PLAIN:
            ours = actions_of(PTRPolicy.from_pretrained(folders[case]), folders[case], frames, points)
            torch.testing.assert_close(plain[case], ours, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("case", ["act-belief", "smolvla-belief"])
    def test_with_belief_lerobots_factory_builds_the_ptr_policy(
        self, folders: dict[str, Path], trained: dict[str, PTRPolicy], points: Path, case: str
    ) -> None:
        config = PreTrainedConfig.from_pretrained(folders[case])
        assert isinstance(config, PTRConfig)
        config.pretrained_path = folders[case]
        policy = make_policy(config, ds_meta=LeRobotDatasetMetadata("tests/points", root=points))
        assert isinstance(policy, PTRPolicy)
        assert tensors_equal(policy.state_dict(), trained[case].state_dict())
        assert policy.config.pretrained_path == folders[case]
        expected = actions_of(PTRPolicy.from_pretrained(folders[case]), folders[case], [35, 50], points)
        assert torch.equal(actions_of(policy, folders[case], [35, 50], points), expected)

    @pytest.mark.full
    def test_a_checkpoint_does_not_need_the_policy_it_started_from(self, points: Path, tmp_path: Path) -> None:
        source = tmp_path / "source"
        base = base_policy("act", points)
        base.save_pretrained(source)
        for name, processor in zip(
            ("preprocessor", "postprocessor"),
            make_pre_post_processors(base.config, dataset_stats=stats_of(points)),
            strict=True,
        ):
            processor.save_pretrained(source, config_filename=f"policy_{name}.json")
        policy = PTRPolicy.from_base(PTRConfig(device="cpu", base_path=str(source), **settings_of("act-belief")))
        save(policy, points, tmp_path / "trained")
        shutil.rmtree(source)
        loaded = PTRPolicy.from_pretrained(tmp_path / "trained")
        assert loaded.config.base_path == source.name, (
            "where the weights came from stays on record, without this machine's path"
        )
        config = PreTrainedConfig.from_pretrained(tmp_path / "trained")
        config.pretrained_path = tmp_path / "trained"
        assert config.action_delta_indices == policy.config.action_delta_indices
        made = make_policy(config, ds_meta=LeRobotDatasetMetadata("tests/points", root=points))
        assert tensors_equal(made.state_dict(), policy.state_dict())

    def test_fields_given_beside_a_path_override_the_checkpoints(self, points: Path, tmp_path: Path) -> None:
        base_policy("act", points).save_pretrained(tmp_path)
        policy = PTRPolicy.from_base(PTRConfig(device="cpu", base_path=str(tmp_path), base={"n_action_steps": 2}))
        assert policy.base.config.n_action_steps == 2
        assert policy.base.config.chunk_size == 4
        assert tensors_equal(policy.base.state_dict(), base_policy("act", points).state_dict())
        with pytest.raises(ValueError, match=r"loads no weights, and base_path=.* call PTRPolicy.from_base"):
            PTRPolicy(PTRConfig(device="cpu", base_path=str(tmp_path)))


Damage = Callable[[Path], None]


def truncate(name: str, share: float = 0.6) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def edit_config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "ptr_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


HEAD, QUEUE = "model.action_head.weight", "objective.queue.targets"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated base": (truncate("model.safetensors"), r"model.safetensors"),
    "truncated scorer": (truncate("ptr_scorer.safetensors"), r"ptr_scorer.safetensors"),
    "base that is no safetensors": (truncate("model.safetensors", 0.0), r"model.safetensors"),
    "truncated config": (truncate("ptr_config.json"), r"ptr_config.json is not a PTR configuration"),
    "wrong shape in base": (
        edit_tensors("model.safetensors", lambda tensors: tensors.update({HEAD: torch.zeros(3, 3)})),
        rf"{HEAD}.*shape|shape.*{HEAD}",
    ),
    "missing tensor in base": (edit_tensors("model.safetensors", lambda tensors: tensors.pop(HEAD)), HEAD),
    "unknown tensor in base": (
        edit_tensors("model.safetensors", lambda tensors: tensors.update(stray=torch.zeros(1))),
        "stray",
    ),
    "wrong shape in scorer": (
        edit_tensors("ptr_scorer.safetensors", lambda tensors: tensors.update({QUEUE: torch.zeros(5, 5)})),
        rf"{QUEUE} has shape \(5, 5\), this policy needs \(32, ",
    ),
    "missing tensor in scorer": (
        edit_tensors("ptr_scorer.safetensors", lambda tensors: tensors.pop(QUEUE)),
        rf"lacks \['{QUEUE}'\]",
    ),
    "unknown tensor in scorer": (
        edit_tensors("ptr_scorer.safetensors", lambda tensors: tensors.update(stray=torch.zeros(1))),
        r"unknown \['stray'\]",
    ),
    "unknown field": (edit_config(temprature=0.1), r"ptr_config.json is not a PTR configuration.*temprature"),
    "value out of range": (edit_config(alpha=2.0), r"ptr_config.json is not a PTR configuration.*alpha=2.0"),
    "unknown base policy": (edit_config(base={"type": "robodog"}), r"'robodog' is unknown; LeRobot has act, "),
    "config of another model": (edit_config(num_belief_tokens=5), r"lacks \['belief"),
    "config that is no object": (lambda folder: (folder / "ptr_config.json").write_text("[1]"), r"ptr_config.json"),
}


class TestDamage:
    @pytest.fixture
    def folder(self, folders: dict[str, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(folders["act"], tmp_path / "damaged"))

    # test_artifact.py does more of it, to the check that comes first
    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name == "truncated scorer" else pytest.mark.full) for name in DAMAGES]
    )
    def test_it_says_what_is_wrong(self, folder: Path, name: str) -> None:
        damage, expected = DAMAGES[name]
        damage(folder)
        with pytest.raises(ValueError, match=f"(?s){expected}") as caught:
            PTRPolicy.from_pretrained(folder)
        assert str(folder) in str(caught.value) or "robodog" in name or "base policy" in str(caught.value)

    @pytest.mark.parametrize("name", ["ptr_config.json", "ptr_scorer.safetensors", "model.safetensors"])
    def test_a_missing_file_is_named(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"is no PTR checkpoint: it lacks {name}"):
            PTRPolicy.from_pretrained(folder)

    def test_a_plain_policy_is_sent_to_base_path(self, points: Path, tmp_path: Path) -> None:
        base_policy("act", points).save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"plain LeRobot policy goes into PTRConfig\(base_path=...\)"):
            PTRPolicy.from_pretrained(tmp_path)
