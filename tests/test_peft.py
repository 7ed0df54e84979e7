"""PEFT: what trains, what is stored, and how it is loaded again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_pre_post_processors
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small_policies import base_policy, observation, save_alone, stats_of, tensors_equal, train_batch

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments

SMALL = {"segment_length": 2, "queue_size": 16, "queue_negatives": 4, "scorer_warmup_steps": 0, "num_belief_tokens": 0}
PROJECTIONS = r".*(action_in_proj|action_out_proj)"


@pytest.fixture(scope="module")
def base(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained SmolVLA in a folder, as LeRobot saves it."""
    folder = tmp_path_factory.mktemp("bases") / "smolvla"
    policy = base_policy("smolvla", points)
    policy.save_pretrained(folder)
    for name, pipeline in zip(
        ("preprocessor", "postprocessor"),
        make_pre_post_processors(policy.config, dataset_stats=stats_of(points)),
        strict=True,
    ):
        pipeline.save_pretrained(folder, config_filename=f"policy_{name}.json")
    return folder


def arguments(folder: Path, **settings: Any) -> PTRTrainingArguments:
    return PTRTrainingArguments(
        **{
            "preset": "ptr",
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-2,
            **SMALL,
            **settings,
        }
    )


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": PROJECTIONS, **settings})


@pytest.fixture(scope="module")
def trained(points: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    trainer = PTRTrainer(str(base), arguments(folder), points, peft_config=lora())
    trainer.train()
    save_alone(trainer)
    return trainer


def folder_of(trainer: PTRTrainer) -> Path:
    return Path(trainer.args.output_dir)


def losses(policy: PTRPolicy, points: Path) -> torch.Tensor:
    torch.manual_seed(0)
    return policy.eval().compute(train_batch(policy, points, [0, 20, 40])).loss.detach()


class TestTraining:
    def test_only_the_adapter_and_the_side_pathway_train(self, trained: PTRTrainer, base: Path) -> None:
        policy = trained.policy
        before = load_file(base / "model.safetensors")
        trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        in_base = {name for name in trainable if name.startswith("base.")}
        assert in_base
        assert all("lora_" in name for name in in_base)
        assert any(name.startswith("objective.scorer") for name in trainable)
        frozen = {
            name.removeprefix("base.base_model.model.").replace(".base_layer", ""): value
            for name, value in policy.state_dict().items()
            if name.startswith("base.") and "lora_" not in name
        }
        assert tensors_equal({name: frozen[name] for name in before}, before)
        assert any(parameter.abs().sum() > 0 for name, parameter in policy.named_parameters() if "lora_B" in name)

    def test_a_flag_takes_the_policys_own_targets(self, points: Path, base: Path, tmp_path: Path) -> None:
        args = arguments(tmp_path, use_peft=True, peft_r=3)
        adapted = PTRTrainer(str(base), args, points).policy.base
        assert isinstance(adapted, PeftModel)
        config = adapted.peft_config["default"]
        assert config.r == 3
        assert config.target_modules == base_policy("smolvla", points)._get_default_peft_targets()["target_modules"]

    @pytest.mark.full
    def test_resuming_is_going_on(self, points: Path, base: Path, tmp_path: Path) -> None:
        def run(folder: Path) -> PTRTrainer:
            torch.manual_seed(0)
            args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
            return PTRTrainer(str(base), args, points, peft_config=lora())

        undisturbed, resumed = run(tmp_path / "a"), run(tmp_path / "b")
        undisturbed.train()
        shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
        assert tensors_equal(resumed.policy.state_dict(), undisturbed.policy.state_dict())


class TestFiles:
    def test_only_the_adapter_and_the_side_pathway_are_stored(self, trained: PTRTrainer, base: Path) -> None:
        folder = folder_of(trained)
        assert not (folder / "model.safetensors").exists()
        stored = load_file(folder / "adapter_model.safetensors")
        assert stored
        assert all("lora_" in name for name in stored)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        assert sum(path.stat().st_size for path in folder.glob("adapter_model*")) < 0.05 * sum(
            path.stat().st_size for path in base.glob("model*")
        )

    def test_loading_keeps_the_adapter(self, trained: PTRTrainer, points: Path) -> None:
        loaded = PTRPolicy.from_pretrained(folder_of(trained))
        assert isinstance(loaded.base, PeftModel)
        assert tensors_equal(loaded.state_dict(), trained.policy.state_dict())
        assert any("lora_" in name for name, parameter in loaded.named_parameters() if parameter.requires_grad)
        torch.testing.assert_close(losses(loaded, points), losses(trained.policy, points), rtol=0, atol=0)

    def test_loading_merges_it_where_asked(self, trained: PTRTrainer, points: Path, base: Path, tmp_path: Path) -> None:
        merged = PTRPolicy.from_pretrained(folder_of(trained), merge_adapter=True)
        assert not isinstance(merged.base, PeftModel)
        torch.testing.assert_close(losses(merged, points), losses(trained.policy, points), rtol=1e-5, atol=1e-6)
        merged.save_pretrained(tmp_path)
        weights, before = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
        assert weights.keys() == before.keys()
        assert not tensors_equal(weights, before)
        again = PTRPolicy.from_pretrained(tmp_path)
        torch.testing.assert_close(losses(again, points), losses(merged, points), rtol=0, atol=0)

    def test_plain_lerobot_loads_the_adapter(self, trained: PTRTrainer, points: Path) -> None:
        folder = folder_of(trained)
        config = PreTrainedConfig.from_pretrained(folder)
        assert (config.type, config.use_peft) == ("smolvla", True)
        config.pretrained_path, config.device = folder, "cpu"
        policy = make_policy(config, ds_meta=LeRobotDatasetMetadata("tests/points", root=points)).eval()
        own = trained.policy.eval()
        actions = []
        for model in (policy, own):
            torch.manual_seed(0)
            actions.append(model.predict_action_chunk(observation(own, points, [0, 40])))
        torch.testing.assert_close(actions[0], actions[1], rtol=0, atol=0)

    @pytest.mark.full
    def test_a_checkpoint_goes_on_training(self, trained: PTRTrainer, points: Path, tmp_path: Path) -> None:
        again = PTRTrainer(str(folder_of(trained)), arguments(tmp_path, warmup_steps=0), points)
        before = {name: value.clone() for name, value in again.policy.state_dict().items()}
        again.train()
        changed = {name for name, value in again.policy.state_dict().items() if not torch.equal(value, before[name])}
        in_base = {name for name in changed if name.startswith("base.")}
        assert in_base
        assert all("lora_" in name for name in in_base)


class TestRefusals:
    def test_a_base_without_a_source(self, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Hub id or a folder.*pretrained_path"):
            PTRTrainer(base_policy("smolvla", points), arguments(tmp_path), points, peft_config=lora())

    def test_a_configuration(self, points: Path, tmp_path: Path) -> None:
        config = base_policy("smolvla", points).config
        with pytest.raises(ValueError, match="trained weights"):
            PTRTrainer(config, arguments(tmp_path, use_peft=True), points)

    def test_a_finished_ptr_policy(self, trained: PTRTrainer, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="base_policy"):
            PTRTrainer(trained.policy, arguments(tmp_path), points, peft_config=lora())

    def test_a_policy_that_has_an_adapter(self, trained: PTRTrainer, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="adapter already"):
            PTRTrainer(trained.policy.base, arguments(tmp_path), points, peft_config=lora())

    def test_an_adapter_of_another_shape(self, trained: PTRTrainer, tmp_path: Path) -> None:
        shutil.copytree(folder_of(trained), tmp_path / "copy")
        path = tmp_path / "copy" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
        with pytest.raises(
            ValueError, match=r"adapter_model.safetensors.*has shape \(2, 32\), this policy needs \(5, 32\)"
        ):
            PTRPolicy.from_pretrained(tmp_path / "copy")

    def test_an_adapter_without_a_base(self, trained: PTRTrainer, tmp_path: Path) -> None:
        shutil.copytree(folder_of(trained), tmp_path / "copy")
        path = tmp_path / "copy" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
        with pytest.raises(ValueError, match=r"adapter_config.json names no base policy"):
            PTRPolicy.from_pretrained(tmp_path / "copy")
