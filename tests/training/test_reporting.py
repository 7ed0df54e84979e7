"""Services that cannot take the logs, and repos that cannot be had, are refused in a sentence before anything is loaded."""

from pathlib import Path

import pytest

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.artifacts.checkpoint import is_ptr_source, resolve_folder
from ptr_hf.data.datasets import dataset_metadata


@pytest.mark.full
@pytest.mark.parametrize(
    ("service", "sentence"),
    [
        ("wandb", r"report_to=wandb needs a login.*run `wandb login`, set WANDB_API_KEY.*WANDB_MODE=offline"),
        ("tensorbord", r"report_to=tensorbord cannot take the logs: tensorbord is not supported, only azure_ml"),
        ("trackio", r"report_to=trackio cannot take the logs: TrackioCallback requires trackio to be installed"),
    ],
)
def test_a_service_that_cannot_take_the_logs(
    service: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=service)
    with pytest.raises(ValueError, match=sentence):
        PTRTrainer("nobody/nothing", args, "nobody/nothing")


@pytest.mark.full
def test_wandb_without_a_network_needs_no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = PTRTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="wandb")
    with pytest.raises(ValueError, match=r"The dataset nobody/nothing is no folder here"):
        PTRTrainer("nobody/nothing", args, "nobody/nothing")


def test_offline_and_not_in_the_cache() -> None:
    """`conftest` sets HF_HUB_OFFLINE."""
    missing = r"is no folder here and cannot be had from the Hub: .* not in the cache"
    with pytest.raises(ValueError, match="The policy nobody/nothing " + missing):
        is_ptr_source("nobody/nothing")
    with pytest.raises(ValueError, match="The policy nobody/nothing " + missing):
        resolve_folder("nobody/nothing")
    with pytest.raises(ValueError, match="The dataset nobody/nothing " + missing):
        dataset_metadata("nobody/nothing")


@pytest.mark.parametrize("name", ["config.json", "ptr_config.json"])
def test_offline_and_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    repo = tmp_path / "models--me--policy"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert is_ptr_source("me/policy") == (name == "ptr_config.json")
