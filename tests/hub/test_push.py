"""Publishing with the real client: what arrives, what comes back, and what a fault costs."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from loopback_hub import LoopbackHub, connect
from small_policies import base_policy, observation, ptr_policy, stats_of, tensors_equal

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.publishing.push import PushError
from ptr_hf.report.chunk_scores import write_scores
from ptr_hf.report.page import write_report

REPO = "lab/policy"
SMALL = {"segment_length": 2, "queue_size": 16, "queue_negatives": 4, "scorer_warmup_steps": 0}
COMPLETE = {
    "README.md",
    "config.json",
    "model.safetensors",
    "policy_preprocessor.json",
    "policy_postprocessor.json",
    "ptr_config.json",
    "ptr_scorer.safetensors",
    "ptr_dynamics.parquet",
    "ptr_report.html",
    "training_args.json",
}


def trainer_for(points: Path, folder: Path, family: str = "smolvla", **settings: Any) -> PTRTrainer:
    args = PTRTrainingArguments(
        **{
            "preset": "ptr",
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "num_belief_tokens": 0,
            "hub_model_id": REPO,
            "license": "apache-2.0",
            **SMALL,
            **settings,
        }
    )
    return PTRTrainer(base_policy(family, points), args, points)


def files_of(hub: LoopbackHub, revision: str = "main", repo: str = REPO) -> dict[str, bytes]:
    return {name: file.content for name, file in hub.repo(repo).at(revision).files.items()}


class TestPush:
    def test_a_run_is_published_whole_and_comes_back_to_the_bit(
        self, online: LoopbackHub, points: Path, tmp_path: Path
    ) -> None:
        trainer = trainer_for(points, tmp_path / "run", "act", hub_token=online.token)
        trainer.train()
        address = trainer.push_to_hub(tags=["v1"])
        assert address is not None
        files = files_of(online)
        assert files.keys() >= COMPLETE
        assert not [
            name for name in files if name.startswith("checkpoint") or Path(name).suffix in (".bin", ".pt", ".pkl")
        ]
        loaded = PTRPolicy.from_pretrained(REPO, revision="v1")
        assert tensors_equal(loaded.state_dict(), trainer.policy.state_dict())
        assert loaded.config.hyperparameters() == trainer.policy.config.hyperparameters()
        torch.manual_seed(0)
        seen = observation(trainer.policy, points, [0, 40])
        actions = [policy.eval().predict_action_chunk(dict(seen)) for policy in (loaded, trainer.policy)]
        assert torch.equal(*actions)
        plain = ACTPolicy.from_pretrained(REPO)
        assert tensors_equal(plain.state_dict(), trainer.policy.base.state_dict())
        info = HfApi().model_info(REPO)
        assert info.card_data is not None
        assert info.card_data.library_name == "lerobot"
        assert info.card_data.pipeline_tag == "robotics"
        assert info.card_data.license == "apache-2.0"
        assert {"robotics", "lerobot", "ptr", "act"} <= set(info.tags or ())
        card = ModelCard(files["README.md"].decode())
        assert "not been evaluated" in card.text
        assert online.seen("/api/validate-yaml", "POST"), "the card is validated by the hub"
        assert [ref.name for ref in HfApi().list_repo_refs(REPO).tags] == ["v1"]
        # no file holds the token
        assert not [name for name, content in files.items() if online.token.encode() in content]
        local = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert local
        assert not [path for path in local if online.token.encode() in path.read_bytes()]
        assert online.leaks == []

    @pytest.mark.full
    def test_a_better_report_stays_and_no_path_goes_out(
        self, online: LoopbackHub, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        local = tmp_path / "somewhere" / "my_base"
        policy = base_policy("act", points)
        policy.save_pretrained(local)
        for processor in make_pre_post_processors(policy.config, dataset_stats=stats_of(points)):
            processor.save_pretrained(local)
        first = trainer_for(points, tmp_path / "run", logging_steps=4)
        trainer = PTRTrainer(local, first.args, points)
        trainer.train()
        output = tmp_path / "run"
        name = trainer.policy.config.preset
        write_report(output, results={name: {"success of the whole": 0.625}}, chance=0.125)
        (output / "trainer_state.json").write_text("{}")
        (output / "ptr_nonfinite.json.damaged").write_text("{")
        caplog.set_level(logging.WARNING, logger="ptr_hf")
        trainer.push_to_hub()
        files = files_of(online)
        assert b"success of the whole" in files["ptr_report.html"]
        assert not [file for file, content in files.items() if str(tmp_path).encode() in content]
        assert not {"trainer_state.json", "ptr_nonfinite.json.damaged"} & files.keys()
        loaded = PTRPolicy.from_pretrained(REPO)
        assert tensors_equal(loaded.state_dict(), trainer.policy.state_dict())
        assert loaded.config.base_path == "my_base"
        assert json.loads(files["training_args.json"])["output_dir"] == "run"
        assert "name the local folder" not in caplog.text
        # what was trained since is reported anew
        trainer.train()
        trainer.push_to_hub()
        assert b"success of the whole" not in files_of(online)["ptr_report.html"]
        # the client would upload what a symlink leads to
        (output / "notes.txt").symlink_to(local / "config.json")
        with pytest.raises(PushError, match=r"notes\.txt is a symlink that leads out of the checkpoint's folder"):
            trainer.push_to_hub()
        assert "notes.txt" not in files_of(online)

    @pytest.mark.full
    def test_training_continues_from_the_hub(self, online: LoopbackHub, points: Path, tmp_path: Path) -> None:
        trainer = trainer_for(points, tmp_path / "run")
        trainer.train()
        trainer.push_to_hub()
        args = trainer_for(points, tmp_path / "again").args
        again = PTRTrainer(REPO, args, points)
        assert tensors_equal(again.policy.state_dict(), trainer.policy.state_dict())
        again.train()
        assert not tensors_equal(again.policy.state_dict(), trainer.policy.state_dict())

    @pytest.mark.full
    def test_private_repo_and_branch(self, online: LoopbackHub, points: Path, tmp_path: Path) -> None:
        trainer = trainer_for(points, tmp_path / "run")
        trainer.train()
        trainer.push_to_hub("lab/secret", private=True, revision="trial")
        assert HfApi().model_info("lab/secret").private
        assert files_of(online, "trial", "lab/secret").keys() >= COMPLETE
        assert "model.safetensors" not in files_of(online, "main", "lab/secret")
        loaded = PTRPolicy.from_pretrained("lab/secret", revision="trial")
        assert tensors_equal(loaded.state_dict(), trainer.policy.state_dict())

    def test_a_policy_alone(self, online: LoopbackHub, points: Path) -> None:
        policy = ptr_policy("smolvla", points, num_belief_tokens=2, **SMALL)
        processors = make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(points))
        policy.push_to_hub(REPO, preprocessor=processors[0], postprocessor=processors[1], tags=["v0"])
        files = files_of(online, "v0")
        assert files.keys() >= COMPLETE - {"ptr_dynamics.parquet", "ptr_report.html", "training_args.json"}
        assert json.loads(files["config.json"])["type"] == "ptr"
        assert tensors_equal(PTRPolicy.from_pretrained(REPO).state_dict(), policy.state_dict())
        with pytest.raises(ValueError, match="both of its processors"):
            policy.push_to_hub(REPO, preprocessor=processors[0])


class TestDuringTraining:
    @pytest.mark.full
    @pytest.mark.parametrize(
        "strategy",
        [
            "checkpoint",
            "end",
            *(pytest.param(name, marks=pytest.mark.full) for name in ("every_save", "all_checkpoints")),
        ],
    )
    def test_every_pushed_checkpoint_is_whole(
        self, online: LoopbackHub, points: Path, tmp_path: Path, strategy: str
    ) -> None:
        trainer = trainer_for(
            points,
            tmp_path / "run",
            push_to_hub=True,
            hub_strategy=strategy,
            hub_always_push=True,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=1,
        )
        left = tmp_path / "run" / ".push_of_a_killed_run"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"of a checkpoint that is gone")
        trainer.train()
        assert not left.exists()
        commits = list(online.repo(REPO).commits.values())
        if strategy == "end":
            assert len(commits) == 1, "nothing but the new repo"
            return
        whole = [commit for commit in commits if "model.safetensors" in commit.files]
        assert whole
        for commit in whole:
            assert commit.files.keys() >= COMPLETE
            assert "trainer_state.json" not in commit.files
        assert tensors_equal(PTRPolicy.from_pretrained(REPO).state_dict(), trainer.policy.state_dict())
        resumable = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-4"}.get(strategy)
        if resumable:
            assert {f"{resumable}/optimizer.pt", f"{resumable}/trainer_state.json"} <= commits[-1].files.keys()
        assert not list((tmp_path / "run").glob(".push_*")), "what was staged is gone"

    @pytest.mark.full
    @pytest.mark.parametrize(
        "kind", [500, *(pytest.param(kind, marks=pytest.mark.full) for kind in ("timeout", "cut", 403, 409))]
    )
    def test_a_fault_costs_no_training(
        self,
        online: LoopbackHub,
        points: Path,
        tmp_path: Path,
        waits: list[float],
        impatient: Callable[[str, int | None], None],
        caplog: pytest.LogCaptureFixture,
        kind: int | str,
    ) -> None:
        impatient(r"/commit/", None if kind == "timeout" else 0)
        settings = {"push_to_hub": True, "hub_always_push": True, "save_strategy": "steps", "save_steps": 2}
        trainer = trainer_for(points, tmp_path / "run", **settings)
        online.fail(r"/commit/", "POST", times=None, kind=kind)
        with caplog.at_level(logging.WARNING, logger="ptr_hf"):
            trainer.train()
        assert trainer.state.global_step == 4
        assert "did not get through" in caplog.text
        assert "Training goes on" in caplog.text
        assert online.token not in caplog.text
        assert {"checkpoint-2", "checkpoint-4"} <= {path.name for path in (tmp_path / "run").iterdir()}
        online.heal()
        impatient(r"/commit/", 0)
        trainer.push_to_hub()
        assert files_of(online).keys() >= COMPLETE


class TestRefusals:
    @pytest.mark.full
    def test_a_final_push_that_fails_says_what_to_do(
        self, online: LoopbackHub, points: Path, tmp_path: Path, waits: list[float]
    ) -> None:
        trainer = trainer_for(points, tmp_path / "run")
        trainer.train()
        online.fail(r"/commit/", "POST", times=None, kind=500)
        with pytest.raises(PushError, match=rf"Nothing is lost: everything is in .*hf upload {REPO} ") as caught:
            trainer.push_to_hub()
        assert not caught.value.final
        assert PTRPolicy.from_pretrained(tmp_path / "run") is not None
        assert (tmp_path / "run" / "README.md").is_file()

    @pytest.mark.full
    @pytest.mark.parametrize("which", ["read_token", "stranger_token"])
    def test_a_token_without_permission_stops_before_training(
        self,
        online: LoopbackHub,
        points: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        which: str,
    ) -> None:
        connect(online, monkeypatch, tmp_path / "home", vars(online)[which])
        with pytest.raises(PushError, match="did not get through") as caught:
            trainer_for(points, tmp_path / "run", push_to_hub=True)
        assert caught.value.final
        assert vars(online)[which] not in str(caught.value)

    @pytest.mark.full
    def test_a_hub_that_is_down_does_not_stop_training(
        self, online: LoopbackHub, points: Path, tmp_path: Path, waits: list[float]
    ) -> None:
        fault = online.fail(r"/api/repos/create", "POST", times=None, kind=503)
        trainer = trainer_for(points, tmp_path / "run", push_to_hub=True, save_strategy="steps", save_steps=2)
        assert fault.hits
        online.heal()
        trainer.train()
        assert files_of(online).keys() >= COMPLETE

    def test_a_name_that_no_repo_could_have(self, online: LoopbackHub, points: Path) -> None:
        with pytest.raises(PushError, match="not a name") as caught:
            ptr_policy("act", points, num_belief_tokens=0, **SMALL).push_to_hub("not a name")
        assert caught.value.final


@pytest.mark.full
def test_saving_publishes_where_training_was_asked_to(
    online: LoopbackHub, points: Path, tmp_path: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(points, tmp_path / "run", push_to_hub=True, hub_strategy="end")
    trainer.train()
    online.fail(r"/commit/", "POST", times=None, kind=500)
    with caplog.at_level(logging.WARNING, logger="ptr_hf"):
        trainer.save_model()
    assert "did not get through" in caplog.text
    online.heal()
    trainer.save_model()
    assert files_of(online).keys() >= COMPLETE


@pytest.mark.full
def test_what_was_measured_is_in_the_card(online: LoopbackHub, points: Path, tmp_path: Path) -> None:
    trainer = trainer_for(points, tmp_path / "run", num_belief_tokens=2)
    trainer.train()
    row = {"environment": "points", "task": "reach", "episodes": 20, "success": 0.4, "standard_error": 0.11, "step": 4}
    (tmp_path / "run" / "ptr_evaluation.json").write_text(json.dumps([row]))
    scores = score_dataset(trainer.policy, points, preprocessor=trainer.preprocessor)
    write_scores(scores, tmp_path / "run" / "ptr_scores.parquet")
    trainer.push_to_hub()
    card = ModelCard(files_of(online)["README.md"].decode())
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_value == 0.4
    assert "40.0 %" in card.text
    for task in ("push the puck to the goal", "reach the goal"):
        assert task in card.text
    assert "ptr_hf" in card.text
    assert str(tmp_path) not in card.text
