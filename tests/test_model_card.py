"""Cards say what is known of a run, in valid metadata and Markdown, whatever the names and whatever is missing."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from card_examples import HOSTILE, RANDOM_BASE, blocks, config_of, everything_known, share, tables, tokens, two_runs
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from small_policies import base_policy, stats_of

from ptr_hf import PTRConfig, PTRPolicy
from ptr_hf.artifacts.peft import wrap_with_peft
from ptr_hf.presets import PRESETS
from ptr_hf.processor_ptr import make_ptr_pre_post_processors
from ptr_hf.publishing.card_facts import (
    BasePolicy,
    CardFacts,
    Evaluation,
    TrainingData,
    library_versions,
)
from ptr_hf.publishing.card_text import LONGEST_TEXT, plain
from ptr_hf.publishing.model_card import (
    ORIGINS,
    model_card,
    write_model_card,
)
from ptr_hf.report.dynamics import DYNAMICS_COLUMNS, DYNAMICS_FILE, Dynamics
from ptr_hf.report.page import write_report

NOT_EVALUATED = "This checkpoint has not been evaluated"


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory: pytest.TempPathFactory) -> Dynamics:
    return two_runs(tmp_path_factory.mktemp("run") / DYNAMICS_FILE)


@pytest.fixture(scope="module")
def full(dynamics: Dynamics) -> CardFacts:
    return everything_known(dynamics)


class TestFacts:
    def test_every_fact_is_there(self, full: CardFacts) -> None:
        text = model_card(full).text
        for fact in (
            "# push_ptr",
            "lerobot/smolvla_base/tree/abc123",
            "datasets/me/demos/tree/v2.0",
            "revision not recorded",
            "the paper's own",
            "73.4 %",
            "between 0.25 and 4",
            "4 belief tokens",
            "open the drawer",
            "segments per step, all processes | 32",
            "0.6.1",
            "2603.16542",
            "cadene2024lerobot",
        ):
            assert fact in text, fact
        for name in ("loss_action", "temperature", "beta", "hard_negative_ratio"):
            column = DYNAMICS_COLUMNS[name]
            unit = f" ({column.unit})" if column.unit else ""
            assert f"| {column.meaning}{unit} | {full.dynamics.tail(name, 'ptr'):.3g} |" in text
        assert re.search(r"picked the true consequence .* in \d\d%", text)

    def test_metadata(self, full: CardFacts) -> None:
        data = model_card(full).data.to_dict()
        index = data.pop("model-index")
        assert data == {
            "library_name": "lerobot",
            "pipeline_tag": "robotics",
            "license": "apache-2.0",
            "base_model": "lerobot/smolvla_base",
            "base_model_relation": "finetune",
            "datasets": ["me/demos", "me/more"],
            "tags": ["robotics", "lerobot", "ptr", "smolvla"],
        }
        assert index[0]["name"] == "push_ptr"
        metrics = {
            result["dataset"]["name"]: (result["metrics"][0]["value"], result["metrics"][0]["args"])
            for result in index[0]["results"]
        }
        assert metrics == {
            "metaworld: push-v3": (0.62, {"episodes": 50, "standard_error": 0.069}),
            "metaworld: reach-v3": (0.9, {"episodes": 50}),
        }

    def test_an_adapter_is_called_one(self, full: CardFacts) -> None:
        card = model_card(replace(full, peft=True, config=config_of("ptr_calibrated")))
        assert card.data.to_dict()["base_model_relation"] == "adapter"
        assert card.data.tags == ["robotics", "lerobot", "ptr", "smolvla", "ptr_calibrated"]
        assert "loaded from its own source" in card.text

    @pytest.mark.full
    def test_the_file_reads_back_the_same(self, full: CardFacts, tmp_path: Path) -> None:
        card = model_card(full)
        loaded = ModelCard.load(write_model_card(full, tmp_path))
        assert loaded.content == card.content
        assert loaded.data.to_dict() == card.data.to_dict()
        header = yaml.safe_load(card.content.split("---\n")[1])
        assert ModelCardData(**header).eval_results == card.data.eval_results

    def test_versions(self) -> None:
        assert library_versions()["torch"] == torch.__version__.partition("+")[0]


class TestHonesty:
    def test_unevaluated_says_so(self, full: CardFacts) -> None:
        card = model_card(replace(full, evaluations=()))
        assert NOT_EVALUATED in card.text
        assert "model-index" not in card.content

    def test_an_earlier_checkpoint_is_not_this_one(self, full: CardFacts) -> None:
        card = model_card(replace(full, evaluations=full.evaluations[2:]))
        assert NOT_EVALUATED in card.text
        assert "| push-v3 | 3000 | 50 | 31.0 %" in card.text
        assert "model-index" not in card.content

    def test_every_preset_has_its_words(self, dynamics: Dynamics) -> None:
        for preset in PRESETS:
            renamed = Dynamics(
                dynamics.table.set_column(
                    1, "run", [[preset if run == "ptr" else "sft" for run in dynamics.table["run"].to_pylist()]]
                )
            )
            config = config_of(preset)
            facts = CardFacts(config=config, base=RANDOM_BASE, dynamics=dynamics if preset == "sft" else renamed)
            text = model_card(facts).text
            assert f"Preset `{preset}`, {ORIGINS[PRESETS[preset].origin]}" in text
            assert ("every recorded action chunk has the same weight" in text) is not facts.weighed
            posterior = config.scorer and config.reads_posterior
            assert ("picked the true consequence" in text) is posterior, preset
            assert ("temperature τ" in text.split("### Hyperparameters")[0]) is posterior, preset

    def test_a_changed_preset_is_not_passed_off_as_the_paper(self) -> None:
        text = model_card(CardFacts(config=config_of(queue_size=512), base=RANDOM_BASE)).text
        assert "the paper's own, with 1 of its settings changed" in text
        assert "`queue_size` = `512` (`1024`)" in text
        changed = config_of(score="loss", aggregation="trajectory", weight_map="exponential")
        assert "the paper's own" not in model_card(CardFacts(config=changed, base=RANDOM_BASE)).text

    @pytest.mark.parametrize(
        ("base", "words"),
        [
            (RANDOM_BASE, "trained from random weights"),
            (BasePolicy(policy_type="act"), "where its weights come from is not recorded"),
        ],
    )
    def test_a_base_without_a_source(self, base: BasePolicy, words: str) -> None:
        card = model_card(CardFacts(config=config_of(), base=base))
        assert words in card.text
        assert "base_model" not in card.content

    def test_local_folders_show_their_names_alone(self, full: CardFacts, tmp_path: Path) -> None:
        folder = tmp_path / "private" / "my_base"
        folder.mkdir(parents=True)
        facts = replace(
            full,
            base=BasePolicy(policy_type="act", source=folder, revision="main"),
            data=[TrainingData(source=str(tmp_path / "gone")), TrainingData(source="C:\\Users\\me\\demos")],
            source_shares=[share(str(tmp_path / "gone")), share("me/demos")],
            peft=True,
        )
        card = model_card(facts)
        assert str(tmp_path) not in card.content
        assert "private" not in card.content
        assert "Users" not in card.content
        assert "my_base (a local folder)" in card.text
        assert "gone (a local folder)" in card.text
        assert not {"base_model", "base_model_relation", "datasets"} & card.data.to_dict().keys()

    def test_a_relative_folder_is_no_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        facts = CardFacts(config=config_of(), base=BasePolicy(policy_type="act", source="outputs/base"))
        assert model_card(facts).data.base_model == "outputs/base"
        Path("outputs/base").mkdir(parents=True)
        assert model_card(facts).data.base_model is None


@pytest.mark.full
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    absent=st.sets(
        st.sampled_from(
            sorted(vars(CardFacts(config=config_of(), base=RANDOM_BASE)).keys() - {"config", "base", "peft"})
        )
    ),
    preset=st.sampled_from(sorted(PRESETS)),
    base=st.sampled_from([None, "", "random", "/gone/base", "lerobot/smolvla_base"]),
    peft=st.booleans(),
)
def test_any_fact_may_be_missing(full: CardFacts, absent: set[str], preset: str, base: str | None, peft: bool) -> None:
    known = {name: value for name, value in vars(full).items() if name not in absent}
    known["base"] = BasePolicy(
        policy_type="smolvla", source=None if base == "random" else base, random_weights=base == "random"
    )
    facts = CardFacts(**{**known, "config": config_of(preset), "peft": peft})
    card = model_card(facts)
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert re.search(r"^# \S", card.text, re.MULTILINE)
    assert (NOT_EVALUATED in card.text) is ("evaluations" in absent)
    assert ("model-index" in card.content) is ("evaluations" not in absent)
    assert not re.search(r"\bnan\b|\bNone \||Undefined", card.text)
    for table in tables(card.text):
        assert {len(row) for row in table} == {len(table[0])}, table
    for code in blocks(card):
        compile(code, "card", "exec")
    assert ("in plain LeRobot" in card.text.replace("In", "in")) is (
        not facts.needs_ptr_hf and (base == "lerobot/smolvla_base" or not peft)
    )


class TestHostileNames:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_markdown_shows_them_as_they_are(self, full: CardFacts, name: str) -> None:
        result = Evaluation(environment=name, task=name, episodes=1, success=0.0)
        facts = replace(
            full,
            task_shares=[share(name), share("other")],
            evaluations=[result],
            versions={name: name},
            license=name or None,
            base=BasePolicy(policy_type="smolvla", source="me/base", revision=name),
            settings={"schedule": name},
        )
        card, calm = model_card(facts), model_card(full)
        shown = [cell for table in tables(card.text) for row in table for cell in row]
        assert shown.count(plain(name)) >= 6
        parsed = list(tokens(card.text))
        counts, usual = (Counter(token.type for token in found) for found in (parsed, tokens(calm.text)))
        for kind in ("html_block", "html_inline", "heading_open", "image", "strong_open", "em_open", "s_open", "hr"):
            assert counts[kind] == usual[kind], kind
        targets = {str(token.attrs["href"]) for token in parsed if token.type == "link_open"}
        assert not any(target.startswith("http://evil") for target in targets)
        assert ModelCard(card.content).data.to_dict() == card.data.to_dict()

    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(name=st.text(alphabet=st.characters(), max_size=80))
    def test_any_text_survives(self, name: str) -> None:
        result = Evaluation(environment=name, task=name, episodes=3, success=1.0)
        facts = CardFacts(
            config=config_of("sft"), base=RANDOM_BASE, evaluations=[result], license=name or None, repo_id="me/x"
        )
        card = model_card(facts)
        card.content.encode("utf-8")
        assert tables(card.text)[1][1][:2] == [plain(name)] * 2
        assert ModelCard(card.content).data.eval_results[0].dataset_config == plain(name)

    def test_names_have_an_end(self) -> None:
        assert len(plain("x" * 10**6)) == LONGEST_TEXT

    def test_many_tasks_are_cut_to_a_table(self, full: CardFacts) -> None:
        many = [share(f"task {place}", place) for place in range(500)]
        text = model_card(replace(full, task_shares=many)).text
        assert "The 20 with the most chunks of 500." in text
        assert "| task 480 |" in text
        assert "| task 479 |" not in text


class TestPictures:
    @pytest.mark.full
    @pytest.mark.parametrize(
        ("preset", "run", "files"),
        [("ptr", "ptr", 2), ("sft", "sft", 1), ("ptr_calibrated", "ptr", 2), ("sft_belief", "ptr", 2)],
    )
    def test_the_card_shows_what_the_report_has_drawn(
        self, dynamics: Dynamics, tmp_path: Path, preset: str, run: str, files: int
    ) -> None:
        alone = Dynamics(dynamics.table.filter([name == run for name in dynamics.table["run"].to_pylist()]))
        facts = CardFacts(config=config_of(preset), base=RANDOM_BASE, dynamics=alone)
        write_report(tmp_path, dynamics=alone)
        write_model_card(facts, tmp_path)
        images = [token for token in tokens((tmp_path / "README.md").read_text()) if token.type == "image"]
        assert len(images) == files
        drawn = sorted(f"figures/{path.name}" for path in (tmp_path / "figures").iterdir())
        assert sorted(str(image.attrs["src"]) for image in images) == drawn
        for image in images:
            assert len(image.content) > 10
            with Image.open(tmp_path / str(image.attrs["src"])) as picture:
                assert picture.width > 400

    def test_without_dynamics_there_are_none(self, full: CardFacts, tmp_path: Path) -> None:
        facts = replace(full, dynamics=None)
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "ptr_dynamics.png").write_bytes(b"of another run")
        assert "figures/" not in model_card(facts, tmp_path).text
        assert "The dynamics of the training are not recorded here." in model_card(facts).text


@pytest.mark.parametrize(
    ("tokens", "peft"),
    [
        pytest.param(0, False, id="plain"),
        pytest.param(2, False, id="belief", marks=pytest.mark.full),
        pytest.param(0, True, id="adapter", marks=pytest.mark.full),
    ],
)
def test_the_lines_to_use_it_run(
    points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, peft: bool
) -> None:
    """Folders stand where the Hub's repos would: LeRobot, PEFT and ptr_hf read either."""
    monkeypatch.chdir(tmp_path)
    config = PTRConfig(
        device="cpu", preset="ptr", num_belief_tokens=tokens, segment_length=2, queue_size=16, queue_negatives=4
    )
    origin, base = BasePolicy(policy_type="act", source="me/base"), base_policy("act", points)
    card = model_card(CardFacts(config=config, base=origin, peft=peft, repo_id="me/trained"))
    if peft:
        base.save_pretrained("me/base")
        base.config.pretrained_path = Path("me/base")
        base = wrap_with_peft(base, LoraConfig(r=2, target_modules=r".*(action_head|linear1)"))
    policy = PTRPolicy(config, base_policy=base)
    policy.save_pretrained("me/trained")
    for pipeline, name in zip(make_ptr_pre_post_processors(config, stats_of(points)), ("pre", "post"), strict=True):
        pipeline.save_pretrained("me/trained", config_filename=f"policy_{name}processor.json")
    Path("user").mkdir()
    Path("user/dataset").symlink_to(points, target_is_directory=True)

    found = blocks(card)
    assert len(found) == (1 if tokens else 2)
    for code in found:
        names: dict[str, Any] = {}
        exec(code, names)
        weights = names["policy"].state_dict()
        theirs = base.state_dict() if "PTRPolicy" not in code else policy.state_dict()
        assert weights.keys() == theirs.keys()
        assert all(torch.equal(value, weights[name]) for name, value in theirs.items())
        assert "ptr_hf" not in code or len(names["scores"]) > 10
    assert ("from ptr_hf" in found[0]) is bool(tokens)


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "named"),
        [
            (lambda: CardFacts(config=config_of(), base=RANDOM_BASE, repo_id="a b/c\n"), "repo_id"),
            (lambda: Evaluation(environment="e", task="t", episodes=10, success=71.7), "success=71.7"),
            (lambda: Evaluation(environment="e", task="t", episodes=0, success=0.5), "episodes=0"),
        ],
    )
    def test_impossible_facts(self, build: Any, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            build()
