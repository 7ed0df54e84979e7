"""A repo's own code, wherever a file names it: refused in one sentence, never run, and nobody is asked."""

import inspect
import io
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import lerobot.rewards.topreward.processor_topreward  # noqa: F401  registers a step that other tests may have imported
import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.processor import ProcessorStepRegistry
from small_policies import base_policy, ptr_policy
from test_artifact import PREPROCESSOR, SMALL, with_processors
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.models.auto import processing_auto

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.artifacts.checkpoint import widest_vector
from ptr_hf.artifacts.checks import check_artifact
from ptr_hf.artifacts.processor_checks import check_processors
from ptr_hf.files.base_source import check_base
from ptr_hf.files.foreign_code import (
    POLICY_CODE,
    POLICY_REPOS,
    STEP_CODE,
    STEP_LOADS,
    STEP_REPOS,
    check_repo,
    no_foreign_code,
)
from ptr_hf.policies import supported_policies
from ptr_hf.processor_ptr import saved_processors

DESCRIPTIONS = {
    "config.json": {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Own", "AutoModel": "evil.Own"}},
    "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["evil.Own", None]}},
    "processor_config.json": {"processor_class": "Own", "auto_map": {"AutoProcessor": "evil.Own"}},
    "preprocessor_config.json": {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "evil.Own"}},
}


class Asked(io.StringIO):
    """A terminal whose user answers yes."""

    count = 0

    def readline(self, *_: Any) -> str:
        self.count += 1
        return "y\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(sys, "stdin", asked)
    return asked


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder that transformers loads nothing from without running its code."""
    folder = tmp_path / "evil"
    folder.mkdir()
    for name, content in DESCRIPTIONS.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    return folder


@pytest.fixture(scope="module")
def saved(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processors(ptr_policy("smolvla", points, **SMALL), points, tmp_path_factory.mktemp("code") / "smolvla")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "changed"))


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TestNeverAsked:
    def test_transformers_would_ask_and_run_it(self, evil: Path, terminal: Asked, tmp_path: Path) -> None:
        """What the checks are for: transformers alone, on the same folder."""
        with pytest.raises(Exception, match=r"Own|evil|strange"):
            AutoTokenizer.from_pretrained(evil)
        assert terminal.count
        assert (tmp_path / "ran").exists()

    def test_a_backbone_with_code(self, folder: Path, evil: Path, terminal: Asked, tmp_path: Path) -> None:
        edit(folder / "ptr_config.json", lambda own: own["base"].update(vlm_model_name=str(evil)))
        for load in (check_artifact, PTRPolicy.from_pretrained):
            with pytest.raises(
                ValueError, match=r"base.vlm_model_name names .*whose config.json asks for code of its own"
            ):
                load(folder)
        assert not terminal.count
        assert not (tmp_path / "ran").exists()

    def test_a_tokenizer_with_code(self, folder: Path, evil: Path, terminal: Asked, tmp_path: Path) -> None:
        def name_it(own: dict[str, Any]) -> None:
            step = next(step for step in own["steps"] if step["registry_name"] == "tokenizer_processor")
            step["config"]["tokenizer_name"] = str(evil)

        config = check_artifact(folder).config
        edit(folder / PREPROCESSOR, name_it)
        for load in (check_artifact, lambda folder: saved_processors(config, folder)):
            with pytest.raises(
                ValueError, match=r"\(tokenizer_processor\), tokenizer_name names .*asks for code of its own"
            ):
                load(folder)
        assert not terminal.count
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", DESCRIPTIONS)
    def test_each_description(self, evil: Path, name: str) -> None:
        for other in DESCRIPTIONS.keys() - {name}:
            (evil / other).unlink()
        with pytest.raises(ValueError, match=f"x names .*whose {name} asks for code of its own"):
            check_repo(str(evil), "x")

    def test_what_transformers_knows_is_taken_from_transformers(self, tmp_path: Path) -> None:
        """Many released models carry code beside a class that transformers has by now."""
        content = {"model_type": "bert", "auto_map": {"AutoConfig": "evil.Own"}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        check_repo(str(tmp_path), "x")
        with no_foreign_code():
            assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"

    @pytest.mark.parametrize("loader", [AutoConfig, AutoTokenizer, AutoProcessor])
    def test_while_lerobot_loads_transformers_refuses(
        self, evil: Path, terminal: Asked, tmp_path: Path, loader: Any
    ) -> None:
        with pytest.raises(ValueError, match="needs code of its own, which is never run"), no_foreign_code():
            loader.from_pretrained(evil)
        assert not terminal.count
        assert not (tmp_path / "ran").exists()
        # outside, transformers is as it was
        assert processing_auto.resolve_trust_remote_code.__globals__["TIME_OUT_REMOTE_CODE"] > 0

    def test_a_step_that_loads_a_model(self, folder: Path) -> None:
        step = {"registry_name": "reward_classifier_processor", "config": {"pretrained_path": "evil/classifier"}}
        edit(folder / PREPROCESSOR, lambda own: own["steps"].append(step))
        with pytest.raises(ValueError, match="would load the model 'evil/classifier'"):
            check_processors(folder)


class TestBasePolicies:
    def test_code_that_its_file_names(self, points: Path, tmp_path: Path) -> None:
        base = base_policy("act", points)
        base.save_pretrained(tmp_path)
        own = {"type": "pi0_fast", "action_tokenizer_name": "evil/code"}
        edit(tmp_path / "config.json", lambda content: content.update(own))
        for read in (lambda: PTRConfig(base_path=str(tmp_path)).base_config, lambda: widest_vector(tmp_path)):
            with pytest.raises(ValueError, match=r"config.json: pi0_fast would run code of 'evil/code'"):
                read()
        check_base(tmp_path, trusted=["evil/code"])

    def test_a_backbone_with_code(self, points: Path, evil: Path, tmp_path: Path, terminal: Asked) -> None:
        base = base_policy("smolvla", points)
        base.save_pretrained(tmp_path / "base")
        edit(tmp_path / "base" / "config.json", lambda own: own.update(vlm_model_name=str(evil)))
        with pytest.raises(ValueError, match=r"config.json: base.vlm_model_name names .*asks for code of its own"):
            PTRPolicy.from_base(PTRConfig(preset="ptr", base_path=str(tmp_path / "base"), device="cpu", **SMALL))
        # the user's own choice is not a file's, and is not asked for either
        base = {**json.loads((tmp_path / "base" / "config.json").read_text())}
        config = PTRConfig(preset="ptr", base=base, device="cpu", **SMALL)
        with pytest.raises(ValueError, match="needs code of its own, which is never run"):
            PTRPolicy(config)
        assert not terminal.count


LIKELY = ("_name", "_path", "_repo", "_model", "model", "tokenizer", "checkpoint", "_encoder")
NO_REPO = {"scheduler_name", "optimizer_name"}


def test_every_field_that_could_name_a_repo_is_known() -> None:
    """A new one in a later LeRobot has to be looked at and added to the tables."""
    inherited = {item.name for item in fields(PreTrainedConfig)}
    for kind in supported_policies():
        config = PreTrainedConfig.get_known_choices()[kind]
        found = {
            item.name for item in fields(config) if item.type in (str, "str", str | None) and item.name not in inherited
        }
        likely = {name for name in found if name.endswith(LIKELY) or "/" in str(vars(config).get(name))}
        assert likely - NO_REPO <= {*POLICY_CODE.get(kind, ()), *POLICY_REPOS.get(kind, ())} | {
            "prompt_template",
            "output_dir",
        }
    for name in ProcessorStepRegistry.list():
        step = ProcessorStepRegistry.get(name)
        if step.__module__.startswith("lerobot."):
            found = {key for key, item in inspect.signature(step).parameters.items() if "str" in str(item.annotation)}
            known = {*STEP_CODE.get(name, ()), *STEP_REPOS.get(name, ()), *STEP_LOADS.get(name, ())}
            assert {key for key in found if key.endswith(LIKELY)} - NO_REPO <= known
