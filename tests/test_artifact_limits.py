"""What a file of a few bytes may ask for: numbers within what policies need, patterns that are matched in bounded time."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import lerobot.rewards.topreward.processor_topreward  # noqa: F401  registers a step that other tests may have imported
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.processor import ProcessorStepRegistry
from peft import LoraConfig
from small_policies import base_policy, ptr_policy
from test_artifact import ADAPTER_CONFIG, BASE, CONFIG, PREPROCESSOR, SCORER, SMALL, with_processors

from ptr_hf import PTRConfig
from ptr_hf.artifacts.adapter_config import MAX_COST, _cost_of, check_adapter
from ptr_hf.artifacts.checkpoint import is_ptr_source, load_weights
from ptr_hf.artifacts.checks import check_artifact
from ptr_hf.artifacts.processor_checks import check_processors
from ptr_hf.cli.export import export
from ptr_hf.files.base_source import check_base
from ptr_hf.files.numbers import LIMITS, check_numbers
from ptr_hf.policies import supported_policies
from ptr_hf.processor_ptr import saved_processors

NAMES = [f"model.vlm_with_expert.lm_expert.layers.{i}.self_attn.{part}_proj" for i in range(40) for part in "qkvo"]


class TestNumbers:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ({"base": {"empty_cameras": 10**7}}, "base.empty_cameras='10000000' is out of range: the limit is 64"),
            ({"empty_cameras": "10000000"}, "empty_cameras"),
            ({"empty_cameras": 1e7}, "empty_cameras"),
            ({"base": {"resize_imgs_with_padding": [10**5, 10**5]}}, "base.resize_imgs_with_padding='100000'"),
            ({"prefix_length": 10**6}, "prefix_length='1000000' is out of range: the limit is 8192"),
            ({"expert_width_multiplier": 1e9}, "expert_width_multiplier"),
            ({"num_steps": 10**6}, "num_steps"),
            ({"of_a_later_release": 10**6}, "of_a_later_release='1000000' is out of range"),
            ({"a": {"b": [[{"max_length": 10**9}]]}}, "a.b.max_length"),
            ({"input_features": {"s": {"shape": [2**16, 2**16]}}}, "input_features.s.shape"),
            ({"input_features": {"s": {"shape": [-3]}}}, "input_features.s.shape"),
            ({"input_features": {"s": {"shape": ["x"]}}}, "input_features.s.shape"),
            ({"output_features": {str(i): {} for i in range(999)}}, "output_features has 999 entries"),
            ({"max_steps": -(10**8)}, "max_steps"),
        ],
    )
    def test_too_large(self, content: dict[str, Any], expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            check_numbers(content)

    def test_what_lerobot_writes_passes(self) -> None:
        for kind in supported_policies():
            config = PreTrainedConfig.get_known_choices()[kind]
            check_numbers(
                json.loads(json.dumps({k: v for k, v in vars(config).items() if isinstance(v, int | float | tuple)}))
            )
        for name in ProcessorStepRegistry.list():
            fields = getattr(ProcessorStepRegistry.get(name), "__dataclass_fields__", {})
            check_numbers(
                {key: item.default for key, item in fields.items() if isinstance(item.default, int | float | tuple)}
            )
        check_numbers({"stats": {"action": {"count": [10**9]}}, "pad_token_id": 257_152, "optimizer_eps": 1e-8})

    @pytest.mark.parametrize(
        "name", ["segment_length", "num_belief_tokens", "queue_negatives", "scorer_dim", "head_dim"]
    )
    def test_the_methods_own(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=100000 is out of range: it must be at most"):
            PTRConfig(
                preset="ptr",
                base={"type": "act"},
                **{name: 100_000, **({"queue_size": 2**17} if name[0] == "q" else {})},
            )

    def test_every_limit_names_a_field(self) -> None:
        assert all(limit > 0 and name.isidentifier() for name, limit in LIMITS.items())


CATASTROPHES = [
    "(a+)+$",
    "(.*)*x",
    "(a|a)*b",
    "(a|aa)" * 40,
    "a?" * 40 + "a" * 40,
    ".*" * 5 + "x",
    "(?=(a+)+)x",
    r"(.+)\1",
    "(((",
    "(" * 3000,
]


class TestPatterns:
    @pytest.mark.parametrize(
        "name", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
    )
    @pytest.mark.parametrize("pattern", CATASTROPHES)
    def test_one_that_could_take_for_ever(self, name: str, pattern: str) -> None:
        value: Any = {pattern: 4} if name in ("rank_pattern", "alpha_pattern") else pattern
        started = time.process_time()
        with pytest.raises(ValueError, match=name):
            check_adapter({"peft_type": "LORA", name: value})
        assert time.process_time() - started < 60

    def test_those_of_lerobot_and_peft_pass(self, points: Path, tmp_path: Path) -> None:
        targets = (
            base_policy("smolvla", points)._get_default_peft_targets()["target_modules"],
            PI0Policy._get_default_peft_targets(None)["target_modules"],  # type: ignore[arg-type]
            r".*layers\.(0|1)\..*\.(q|v)_proj",
            "all-linear",
            ["q_proj", "model.action_out_proj"],
        )
        for target in targets:
            config = LoraConfig(
                target_modules=target, rank_pattern={"q_proj": 4, r"^model\..*v_proj$": 2}, modules_to_save=["head"]
            )
            config.save_pretrained(str(tmp_path))
            check_adapter(json.loads((tmp_path / ADAPTER_CONFIG).read_text()))

    @settings(max_examples=60)
    @given(pattern=st.text(alphabet="a.*+?|()[]{}1,\\^$_p", max_size=24))
    def test_whatever_passes_is_matched_soon(self, pattern: str) -> None:
        try:
            cost = _cost_of("target_modules", pattern)
        except ValueError:
            return
        if cost <= MAX_COST:
            started = time.process_time()
            for name in NAMES:
                re.fullmatch(pattern, name)
            assert time.process_time() - started < 60

    @pytest.mark.parametrize(
        "setting",
        [
            {"megatron_config": {"a": 1}, "megatron_core": "os"},
            {"layer_replication": [[0, 10]]},
            {"eva_config": {"rho": 2}},
            {"init_lora_weights": "pissa_niter_1000000"},
            {"target_modules": ["q"] * 10_000},
            {"rank_pattern": {f"m{i}": 2 for i in range(1000)}},
            {"modules_to_save": ["(a+)+"]},
            {"r": 10**6},
            {
                "peft_type": "PROMPT_TUNING",
                "tokenizer_name_or_path": "evil/code",
                "tokenizer_kwargs": {"trust_remote_code": True},
            },
            {"peft_type": "XLORA", "adapters": {"a": "evil/adapter"}},
        ],
        ids=lambda setting: next(iter(setting)),
    )
    def test_what_no_adapter_of_a_policy_needs(self, setting: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="|".join(setting)):
            check_adapter({"peft_type": "LORA", **setting})


@pytest.fixture(scope="module")
def saved(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processors(ptr_policy("act", points, **SMALL), points, tmp_path_factory.mktemp("limits") / "act")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "changed"))


class TestNotARegularFile:
    @pytest.mark.parametrize("name", [CONFIG, "config.json", BASE, SCORER, PREPROCESSOR, ADAPTER_CONFIG, "state"])
    def test_a_named_pipe_in_place_of_each_file(self, folder: Path, name: str) -> None:
        config = check_artifact(folder).config
        if name == "state":
            name = next(path.name for path in folder.glob("policy_preprocessor*.safetensors"))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        reads: list[Any] = [
            check_artifact,
            lambda folder: load_weights(None, folder),
            lambda folder: export(folder, folder / "x"),
        ]
        if name == CONFIG:
            reads += [is_ptr_source]
        if name in ("config.json", BASE):
            reads += [check_base]
        if name.startswith("policy_"):
            reads += [check_processors, lambda folder: saved_processors(config, folder)]
        for read in reads:
            with pytest.raises(ValueError, match=f"{name} is a named pipe where a file should be"):
                read(folder)

    @pytest.mark.parametrize("target", ["/dev/zero", "../gone", "/etc/hostname"])
    def test_nothing_else_is_copied_by_an_export(self, folder: Path, tmp_path: Path, target: str) -> None:
        (folder / "policy_preprocessor_more.json").symlink_to(target)
        with pytest.raises(ValueError, match=r"policy_preprocessor_more.json is a symlink that leads"):
            export(folder, tmp_path / "plain")

    def test_a_pipe_where_lerobot_looks_for_older_processors(self, folder: Path) -> None:
        (folder / PREPROCESSOR).unlink()
        os.mkfifo(folder / "notes.json")
        with pytest.raises(ValueError, match=r"notes.json is a named pipe"):
            check_processors(folder)

    def test_a_steps_tensors_are_small(self, folder: Path) -> None:
        path = next(folder.glob("policy_preprocessor*.safetensors"))
        os.truncate(path, 2**30)
        with pytest.raises(ValueError, match=f"{path.name} has {2**30} bytes, more than the"):
            check_processors(folder)

    def test_numbers_of_a_step(self, folder: Path) -> None:
        content = json.loads((folder / PREPROCESSOR).read_text())
        content["steps"].append({"registry_name": "tokenizer_processor", "config": {"max_length": 10**8}})
        (folder / PREPROCESSOR).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"\(tokenizer_processor\): max_length='100000000' is out of range"):
            check_artifact(folder)
