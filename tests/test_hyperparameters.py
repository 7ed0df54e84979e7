"""The one schema of hyperparameters: ranges, presets, command line and JSON."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import draccus
import pytest
from lerobot.configs import PreTrainedConfig
from small_policies import settings_id
from transformers import HfArgumentParser, TrainingArguments

from ptr_hf import PTRConfig, PTRTrainingArguments
from ptr_hf.hyperparameters import PTRHyperparameters
from ptr_hf.presets import PRESETS

ACT = {"type": "act", "chunk_size": 16, "n_action_steps": 8}


def checked(**settings: Any) -> PTRHyperparameters:
    return PTRHyperparameters(**{"preset": "ptr", **settings})


class TestRanges:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 1.5}, r"alpha=1.5 is out of range: it must be in \[0, 1\]"),
            ({"alpha": -0.1}, r"alpha=-0.1"),
            ({"alpha": float("nan")}, r"alpha=nan"),
            ({"weight_min": 5.0}, r"weight_min, weight_max=\(5.0, 4.0\).*weight_min <= 1 <= weight_max"),
            ({"weight_max": 0.5}, r"weight_min, weight_max=\(0.25, 0.5\)"),
            ({"weight_min": 0.0}, r"weight_min=0.0 is out of range: it must be positive"),
            ({"queue_size": 32}, r"queue_negatives=64.*at most queue_size=32, or queue_size=0"),
            ({"queue_size": -1, "queue_negatives": 0}, r"queue_(size|negatives)"),
            ({"temperature": 0.5}, r"temperature_min, temperature, temperature_max=\(0.03, 0.5, 0.2\).*rising order"),
            ({"beta": 0.1}, r"beta_min, beta, beta_max"),
            ({"temperature": 0.0}, r"temperature=0.0"),
            ({"logit_clamp": 0.0}, r"logit_clamp=0.0"),
            ({"ema_decay": 1.1}, r"ema_decay=1.1.*in \[0, 1\]"),
            ({"hard_negative_ratio_max": 2.0}, r"hard_negative_ratio_max=2.0"),
            ({"consequence_discount": -1.0}, r"consequence_discount=-1.0"),
            ({"segment_length": 0}, r"segment_length=0"),
            ({"chunk_size": 0}, r"chunk_size=0.*1 or more, or left out"),
            ({"consequence_offset": 0}, r"consequence_offset=0"),
            ({"chunk_stride": -2}, r"chunk_stride=-2"),
            ({"target_layer": 0}, r"target_layer=0"),
            ({"num_belief_tokens": -1}, r"num_belief_tokens=-1"),
            ({"controller_interval": 0}, r"controller_interval=0"),
            ({"scorer_warmup_steps": -1}, r"scorer_warmup_steps=-1"),
            ({"hard_negative_key": "colour"}, r"hard_negative_key='colour'.*task, state, task_or_state"),
            ({"score": "magic"}, r"score='magic'.*one of posterior"),
            ({"weight_min": 1e-30}, r"weight_min=1e-30 is out of range: it must be between 1e-12 and 1e\+12"),
            ({"weight_max": 1e300}, r"weight_max=1e\+300 is out of range: it must be between 1e-12 and 1e\+12"),
            ({"score_horizon": float("inf")}, r"score_horizon=inf is out of range: it must be finite"),
            ({"scorer": False}, r"scorer=False trains the base policy alone.*preset='sft'"),
        ],
        ids=settings_id,
    )
    def test_a_value_out_of_range_is_named(self, settings: dict[str, Any], message: str) -> None:
        for build in (checked, PTRConfig):
            with pytest.raises(ValueError, match=message):
                build(preset="ptr", **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": "0.5"}, r"alpha='0.5' must be a number, not str"),
            ({"chunk_size": 8.0}, r"chunk_size=8.0 must be a whole number, not float"),
            ({"scorer": "no"}, r"scorer='no' must be True or False, not str"),
        ],
        ids=settings_id,
    )
    def test_a_value_of_another_type_is_named(self, settings: dict[str, Any], message: str) -> None:
        for build in (checked, PTRConfig):
            with pytest.raises(TypeError, match=message):
                build(**settings)

    def test_arguments_are_checked_like_the_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"alpha=2.0 is out of range"):
            PTRTrainingArguments(output_dir=str(tmp_path), alpha=2.0)
        with pytest.raises(ValueError, match=r"remove_unused_columns=True would drop"):
            PTRTrainingArguments(output_dir=str(tmp_path), remove_unused_columns=True)

    @pytest.mark.parametrize(
        "settings", [{"queue_size": 0}, {"alpha": 0}, {"weight_min": 1.0, "weight_max": 1.0}], ids=settings_id
    )
    def test_the_edges_are_allowed(self, settings: dict[str, Any]) -> None:
        checked(**settings)


class TestPresets:
    def test_ptr_is_the_papers_table_6(self) -> None:
        values = checked()
        assert (values.identification_coef, values.ranking_coef) == (0.05, 0.25)
        assert (values.entropy_coef, values.diversity_coef, values.belief_temperature) == (1e-3, 1e-3, 1.0)
        assert (values.temperature, values.beta, values.logit_clamp) == (0.12, 1.5, 20.0)
        assert (values.alpha, values.weight_min, values.weight_max) == (1.0, 0.25, 4.0)
        assert (values.queue_size, values.queue_negatives, values.cross_rank_negatives) == (1024, 64, True)
        assert (values.ema_decay, values.target_eps, values.num_belief_tokens) == (0.999, 1e-6, 4)
        assert (values.controller_decay, values.temperature_min, values.temperature_max) == (0.98, 0.03, 0.20)
        assert (values.beta_min, values.beta_max, values.hard_negative_ratio_max) == (0.5, 3.0, 0.5)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_preset_sets_what_it_owns(self, preset: str) -> None:
        values = checked(preset=preset)
        assert PRESETS[preset].fields.items() <= vars(values).items()
        again = checked(**values.hyperparameters())
        assert again == values, "a resolved configuration resolves to itself"

    def test_the_controls(self) -> None:
        sft, belief = checked(preset="sft"), checked(preset="sft_belief")
        assert (sft.alpha, sft.num_belief_tokens, sft.scorer, sft.segment_length) == (0.0, 0, False, 1)
        assert (belief.alpha, belief.num_belief_tokens, belief.scorer, belief.segment_length) == (0.0, 4, True, 4)

    def test_a_contradiction_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"preset='sft_belief' sets alpha=0.0, but alpha=0.7 was given; drop one"):
            checked(preset="sft_belief", alpha=0.7)
        assert checked(preset="sft_belief", alpha=0.0).alpha == 0.0
        assert checked(preset="sft_belief", num_belief_tokens=2).num_belief_tokens == 2

    @pytest.mark.parametrize(
        ("preset", "name", "value", "own"),
        [
            ("sft", "alpha", 1.0, "0.0"),
            ("sft", "num_belief_tokens", 4, "0"),
            ("sft", "scorer", True, "False"),
            ("sft_belief", "alpha", 1.0, "0.0"),
            ("small_loss", "score", "posterior", "loss"),
            ("random_weights", "score", "posterior", "random"),
            ("ptr_consequence_shuffled", "shuffle_consequences", False, "True"),
        ],
    )
    def test_a_contradiction_is_refused_also_where_it_equals_a_default(
        self, tmp_path: Path, preset: str, name: str, value: Any, own: str
    ) -> None:
        message = f"preset='{preset}' sets {name}={own}, but {name}={value} was given; drop one of the two"
        for build in (partial(PTRTrainingArguments, output_dir=str(tmp_path), use_cpu=True), PTRConfig):
            with pytest.raises(ValueError, match=re.escape(message)):
                build(preset=preset, **{name: value})

    @pytest.mark.parametrize(
        "settings",
        [
            {"score": "posterior"},
            {"num_belief_tokens": 4},
            {"weight_min": 0.25, "scorer_warmup_steps": 0.05},
            {"detach_scorer_inputs": False, "missing_future": "one", "standardize_by": "all"},
        ],
        ids=settings_id,
    )
    def test_what_is_given_wins_also_where_it_equals_a_default(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        settings = {"preset": "ptr_calibrated", **settings}
        args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
        line = [f"--{name}={value}" for name, value in settings.items()]
        options = [*line, "--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]
        (parsed,) = HfArgumentParser(PTRTrainingArguments).parse_args_into_dataclasses(options)
        loaded = draccus.decode(PTRConfig, settings)
        for values in (args, parsed, loaded, PTRConfig(**args.hyperparameters()), dataclasses.replace(args, seed=3)):
            assert values.hyperparameters().items() >= (PRESETS["ptr_calibrated"].fields | settings).items()
        assert args.given == parsed.given == loaded.given == dataclasses.replace(args, seed=3).given == settings

    def test_replacing_the_preset_takes_its_values(self, tmp_path: Path) -> None:
        args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, preset="ptr", chunk_size=8, beta=2.0)
        plain = dataclasses.replace(args, preset="sft")
        assert plain.given == {"preset": "sft", "chunk_size": 8, "beta": 2.0}
        assert PRESETS["sft"].fields.items() <= plain.hyperparameters().items()
        assert plain.weight_map == "paper"
        with pytest.raises(ValueError, match=r"preset='sft' sets alpha=0.0, but alpha=0.5 was given"):
            dataclasses.replace(args, preset="sft", alpha=0.5)
        with pytest.raises(ValueError, match=r"preset='sft' sets alpha=0.0, but alpha=1.0 was given"):
            args.with_options(preset="sft", alpha=1.0)
        assert args.with_options(preset="sft", segment_length=4).segment_length == 4

    def test_a_saved_configuration_keeps_its_values(self) -> None:
        """Files hold every field, whatever the presets have become since."""
        saved = PTRConfig(preset="ptr_calibrated", weight_min=0.25, aggregation="segment").hyperparameters()
        assert draccus.decode(PTRConfig, saved).hyperparameters() == saved

    def test_one_default_everywhere(self, tmp_path: Path) -> None:
        args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert args.preset == PTRConfig().preset == draccus.decode(PTRConfig, {}).preset == "ptr_offline"
        assert args.given == {}

    @pytest.mark.parametrize(
        "settings",
        [{"score": "posterior"}, {"beta": 2.0}, {"preset": "ptr_offline", "queue_size": 99}, {"num_belief_tokens": 2}],
        ids=settings_id,
    )
    def test_what_needs_a_scorer_is_refused_without_one(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"or name a preset that has one, such as preset='ptr'"):
            PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
        args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", false_alarms=0.1)
        assert args.given == {"false_alarms": 0.1}
        with pytest.raises(ValueError, match=r"false_alarms=0.1 is out of range: it must be left out"):
            args.with_options(weights="w.parquet")

    def test_an_unknown_preset_names_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"preset='fancy' is unknown; choose one of ptr, sft_belief, sft"):
            checked(preset="fancy")


class TestCommandLine:
    def test_every_field_has_help(self) -> None:
        inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
        lerobot = {item.name for item in dataclasses.fields(PreTrainedConfig)}
        for item in dataclasses.fields(PTRHyperparameters):
            assert item.metadata["help"].endswith("."), item.name
        for item in dataclasses.fields(PTRTrainingArguments):
            if item.name not in inherited:
                assert len(item.metadata["help"]) > 10, item.name
        for item in dataclasses.fields(PTRConfig):
            if item.name not in lerobot:
                assert len(item.metadata["help"]) > 10, item.name

    def test_values_are_parsed(self, tmp_path: Path) -> None:
        rename = {"observation.image": "observation.images.top"}
        line = [
            *("--preset", "ptr", "--output_dir", str(tmp_path), "--alpha", "0.5", "--chunk_size", "8"),
            *("--num_belief_tokens", "2"),
            *("--controller", "false", "--cross_rank_negatives", "false", "--hard_negative_key", "task"),
            *("--scorer_warmup_steps", "100", "--rename_map", json.dumps(rename), "--learning_rate", "3e-4"),
            *("--report_to", "none", "--use_cpu", "true"),
        ]
        (args,) = HfArgumentParser(PTRTrainingArguments).parse_args_into_dataclasses(line)
        assert (args.alpha, args.chunk_size, args.num_belief_tokens) == (0.5, 8, 2)
        assert (args.controller, args.cross_rank_negatives, args.hard_negative_key) == (False, False, "task")
        assert (args.scorer_warmup_steps, args.learning_rate, args.report_to) == (100, 3e-4, [])
        assert args.observation_renames == rename
        assert args.consequence_offset is None
        assert args.segment_length == 4
        assert (args.max_steps, args.weight_decay, args.lr_scheduler_type) == (20_000, 0.01, "cosine")

    @pytest.mark.parametrize(
        ("settings", "steps", "epochs"),
        [
            ({}, 20_000, -1),
            ({"num_train_epochs": 2}, -1, 2),
            ({"num_train_epochs": 2, "max_steps": -1}, -1, 2),
            ({"max_steps": 5}, 5, -1),
        ],
        ids=settings_id,
    )
    def test_epochs_or_steps(self, tmp_path: Path, settings: dict[str, Any], steps: int, epochs: float) -> None:
        args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
        for same in (args, dataclasses.replace(args)):
            assert (same.max_steps, same.num_train_epochs) == (steps, epochs)
        longer = dataclasses.replace(args, **{"max_steps" if steps > 0 else "num_train_epochs": 7})
        assert (longer.max_steps, longer.num_train_epochs) == ((7, -1) if steps > 0 else (-1, 7))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_steps": 5, "num_train_epochs": 3}, r"max_steps=5 and num_train_epochs=3 were both given: drop"),
            ({"max_steps": 0}, r"max_steps=0 is out of range: it must be 1 or more, or -1"),
            ({"num_train_epochs": 0}, r"num_train_epochs=0 is out of range"),
            ({"max_steps": -1}, r"max_steps=-1 counts num_train_epochs, which was not given"),
        ],
        ids=settings_id,
    )
    def test_a_length_that_cannot_be(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)

    def test_a_preset_and_a_wrong_value(self, tmp_path: Path) -> None:
        parser = HfArgumentParser(PTRTrainingArguments)
        line = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true"]
        (args,) = parser.parse_args_into_dataclasses([*line, "--preset", "sft"])
        assert (args.alpha, args.scorer, args.segment_length) == (0.0, False, 1)
        with pytest.raises(ValueError, match=r"alpha=3.0 is out of range"):
            parser.parse_args_into_dataclasses([*line, "--alpha", "3"])
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses([*line, "--hard_negative_key", "colour"])

    def test_a_yaml_of_arguments(self, tmp_path: Path) -> None:
        path = tmp_path / "experiment.yaml"
        path.write_text(
            f"output_dir: {tmp_path}\nuse_cpu: true\nreport_to: none\npreset: ptr\nbeta: 2.0\nsegment_length: 2\n"
        )
        (args,) = HfArgumentParser(PTRTrainingArguments).parse_yaml_file(str(path))
        assert (args.beta, args.segment_length) == (2.0, 2)


class TestConfig:
    def config(self, **settings: Any) -> PTRConfig:
        return PTRConfig(device="cpu", **{"base": ACT, "preset": "ptr", **settings})

    @pytest.mark.parametrize(
        "settings",
        [{}, {"preset": "sft"}, {"preset": "sft_belief", "chunk_size": 8, "beta": 2.0, "controller": False}],
        ids=settings_id,
    )
    def test_it_survives_json(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        config = self.config(**settings)
        config.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["type"] == "ptr"
        loaded = PreTrainedConfig.from_pretrained(tmp_path)
        assert isinstance(loaded, PTRConfig)
        assert loaded.hyperparameters() == config.hyperparameters()
        assert loaded.base == config.base
        assert loaded.layout == config.layout
        assert loaded.to_dict() == config.to_dict() == json.loads(config.to_json_string())

    def test_the_layout_follows_the_base_policy(self) -> None:
        layout = self.config().layout
        assert (layout.segment_length, layout.chunk_stride, layout.consequence_offset) == (4, 16, 16)
        assert layout.action_steps == tuple(range(16))
        config = self.config(chunk_size=8, consequence_offset=12, chunk_stride=4, segment_length=2)
        assert config.layout.action_steps == tuple(range(8))
        assert (config.layout.chunk_stride, config.layout.consequence_offset) == (4, 12)
        assert config.base_config.n_action_steps == 8
        assert config.observation_delta_indices == [0, 4, 12, 16]
        assert config.action_delta_indices == list(range(12))
        plain = self.config(preset="sft")
        assert plain.observation_delta_indices == plain.base_config.observation_delta_indices
        assert plain.action_delta_indices == plain.base_config.action_delta_indices

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ({"type": "robodog"}, r"type 'robodog' is unknown; LeRobot has act, "),
            ({"type": "ptr"}, r"type 'ptr' is unknown"),
            ({"chunk_size": 8}, r"type None is unknown"),
            ({}, r"has no base policy: set base=.* or base_path"),
            ({"type": "act", "chunk_sise": 8}, r"configuration of the base policy 'act' does not parse.*chunk_sise"),
            ({"type": "act", "chunk_size": "many"}, r"base policy 'act' does not parse"),
            (
                {"type": "act", "chunk_size": 4, "n_action_steps": 9},
                r"base policy 'act' does not parse.*n_action_steps",
            ),
        ],
        ids=settings_id,
    )
    def test_a_wrong_base_policy_is_named(self, base: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            _ = self.config(base=base).base_config

    def test_a_policy_without_chunks_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'gaussian_actor' predicts no action chunks"):
            _ = self.config(base={"type": "gaussian_actor"}).layout
