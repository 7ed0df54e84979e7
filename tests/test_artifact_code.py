"""Nothing that a checkpoint names is imported or run; the side pathway loads alone, from folders and over HTTP."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.processor import ProcessorStepRegistry
from small_policies import ptr_policy, train_batch
from test_artifact import PREPROCESSOR, SCORER, SMALL, with_processors

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.artifacts.checks import check_artifact, check_tensors
from ptr_hf.artifacts.processor_checks import check_processors
from ptr_hf.files.foreign_code import LEROBOTS_OWN, POLICY_CODE, STEP_CODE
from ptr_hf.policies import supported_policies


@pytest.fixture(scope="module")
def trained(points: Path) -> PTRPolicy:
    policy = ptr_policy("act", points, **SMALL, scorer_warmup_steps=0)
    policy.compute(train_batch(policy, points, [0, 12, 33, 60]))
    policy.update()
    return policy


@pytest.fixture(scope="module")
def saved(trained: PTRPolicy, points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processors(trained, points, tmp_path_factory.mktemp("saved") / "act")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def steps(folder: Path, change: Callable[[list[Any]], object]) -> None:
    path = folder / PREPROCESSOR
    content = json.loads(path.read_text())
    change(content["steps"])
    path.write_text(json.dumps(content))


def stateful(content: list[Any]) -> dict[str, Any]:
    return next(step for step in content if "state_file" in step)


class TestProcessors:
    def test_a_class_runs_any_program_in_lerobot_and_is_refused_here(self, folder: Path, tmp_path: Path) -> None:
        """The second half shows what the check is for: LeRobot alone, on the same file."""
        ran, policy_config = tmp_path / "ran", check_artifact(folder).config.base_config
        steps(folder, lambda own: own.insert(0, {"class": "os.system", "config": {"command": f"touch {ran}"}}))
        with pytest.raises(ValueError, match=r"step 0 is the class 'os.system', which LeRobot would import and call"):
            check_artifact(folder)
        assert not ran.exists()
        with pytest.raises((TypeError, ValueError)):
            make_pre_post_processors(policy_config, pretrained_path=str(folder))
        assert ran.exists()

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda own: own.append({"class": "antigravity.Fly"}), "class 'antigravity.Fly'"),
            (lambda own: own.append({"class": 3}), "class '3'"),
            (lambda own: own.append({}), "class ''"),
            (lambda own: own.append({"class": "lerobot.processor.pipeline.Path"}), "LeRobot would import and call"),
            (lambda own: own.append({"registry_name": "evil"}), "'evil', which no step is registered as"),
            (lambda own: own.append({"registry_name": ["to_batch_processor"]}), "no step is registered as"),
            (lambda own: own[0].update(hook="x"), "no other keys than registry_name"),
            (lambda own: own[0].update(config=[1]), "config that is no object"),
            (lambda own: own.insert(0, "os.system"), "step 0 must be an object"),
            (lambda own: stateful(own).update(state_file="../../x.safetensors"), "is no plain file name"),
            (lambda own: stateful(own).update(state_file="/etc/passwd"), "'/etc/passwd' is no plain file name"),
            (lambda own: stateful(own).update(state_file="state.pt"), "only .safetensors files are opened"),
        ],
    )
    def test_a_step_that_is_not_lerobots_is_refused(
        self, folder: Path, change: Callable[[list[Any]], object], expected: str
    ) -> None:
        steps(folder, change)
        with pytest.raises(ValueError, match=expected) as caught:
            check_artifact(folder)
        assert str(folder / PREPROCESSOR) in str(caught.value)

    def test_an_imported_step_without_a_registered_name_passes(self, folder: Path) -> None:
        steps(folder, lambda own: own.append({"class": "lerobot.processor.pipeline.IdentityProcessorStep"}))
        check_processors(folder)
        pre, _ = make_pre_post_processors(check_artifact(folder).config.base_config, pretrained_path=str(folder))
        assert type(pre.steps[-1]).__name__ == "IdentityProcessorStep"

    def test_a_steps_tensors_are_checked(self, folder: Path) -> None:
        content = json.loads((folder / PREPROCESSOR).read_text())
        path = folder / stateful(content["steps"])["state_file"]
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            check_processors(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
            check_processors(folder)

    @pytest.mark.parametrize("name", STEP_CODE)
    def test_code_of_other_repos_runs_only_where_it_is_trusted(self, folder: Path, name: str) -> None:
        key = STEP_CODE[name][0]
        for source, remote, trusted, refused in (
            ("evil/code", None, (), True),
            ("evil/code", True, (), True),
            ("evil/code", 0, (), True),
            ("evil/code", False, (), False),
            ("evil/code", None, ("evil/code",), False),
            (LEROBOTS_OWN[0], None, (), False),
        ):
            settings = {key: source} if remote is None else {key: source, "trust_remote_code": remote}
            (folder / PREPROCESSOR).write_text(
                json.dumps({"name": "p", "steps": [{"registry_name": name, "config": settings}]})
            )
            if refused:
                with pytest.raises(ValueError, match=f"would run code of '{source}'.*name it as trusted"):
                    check_processors(folder, trusted)
            else:
                check_processors(folder, trusted)


class TestBaseConfigurations:
    def test_code_of_other_repos_runs_only_where_it_is_trusted(self, folder: Path, saved: Path) -> None:
        path = folder / "ptr_config.json"
        content = json.loads(path.read_text())
        features = {key: content["base"][key] for key in ("input_features", "output_features")}
        content["base"] = {"type": "pi0_fast", **features, "action_tokenizer_name": "evil/code"}
        content["chunk_size"] = None
        path.write_text(json.dumps(content))
        (folder / "config.json").unlink()
        with pytest.raises(ValueError, match=r"pi0_fast would run code of 'evil/code' \(base.action_tokenizer_name\)"):
            check_artifact(folder)
        check_artifact(folder, trusted=["evil/code"])
        content["base"].pop("action_tokenizer_name")
        path.write_text(json.dumps(content))
        check_artifact(folder)

    def test_lerobots_own_choices_are_known(self) -> None:
        fast, groot = PI0FastConfig(), GrootConfig()
        assert {vars(fast)[name] for name in POLICY_CODE["pi0_fast"]} <= set(LEROBOTS_OWN)
        assert {vars(groot)[name] for name in POLICY_CODE["groot"]} <= set(LEROBOTS_OWN)
        for name, keys in STEP_CODE.items():
            defaults = inspect.signature(ProcessorStepRegistry.get(name)).parameters
            assert {defaults[key].default for key in keys} - {None} <= set(LEROBOTS_OWN)

    def test_every_place_where_lerobot_trusts_remote_code_is_known(self) -> None:
        """A new one in a later LeRobot has to be looked at and added to the tables."""
        import lerobot

        root = Path(lerobot.__file__).parent
        folders = [root / "processor", *(root / "policies" / name for name in supported_policies())]
        found = {
            path.relative_to(root).as_posix()
            for folder in folders
            for path in folder.rglob("*.py")
            if "trust_remote_code" in path.read_text() and "no trust_remote_code" not in path.read_text()
        }
        assert found == {
            "policies/groot/groot_n1_7.py",
            "policies/groot/modeling_groot.py",
            "policies/groot/processor_groot.py",
            "policies/pi0_fast/modeling_pi0_fast.py",
            "processor/tokenizer_processor.py",
        }

    def test_a_backbone_that_is_loaded_while_building_is_left_to_the_strict_load(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "policies"))
        from families_multi_task_dit import FAMILIES

        base = FAMILIES[0].policy()
        policy = PTRPolicy(PTRConfig(device="cpu", preset="ptr", **SMALL), base_policy=base)
        shutil.rmtree(folder)
        policy.save_pretrained(folder)
        artifact = check_artifact(folder)
        assert not check_tensors(artifact.config, artifact, PTRPolicy)


def test_a_snapshot_that_was_pulled_over_http(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "hub"))
    from huggingface_hub import HfApi
    from loopback_hub import LoopbackHub, connect

    with LoopbackHub() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        api = HfApi()
        api.create_repo("lab/policy")
        api.upload_folder(repo_id="lab/policy", folder_path=saved)
        folder = Path(api.snapshot_download("lab/policy", cache_dir=tmp_path / "cache"))
        artifact = check_artifact(folder)
        assert (folder / SCORER).is_symlink()
        assert check_tensors(artifact.config, artifact, PTRPolicy)
