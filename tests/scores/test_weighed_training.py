"""`PTRTrainer` with the strategies of ours and the controls: weights that move, runs that resume, ranks that agree."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from meeting import meeting_place
from safetensors.torch import load_file
from small_policies import base_policy, save_alone, tensors_equal

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.data.demonstrations import Truth, TruthRecord, save_truth

PRESETS = ("ptr_consequence", "small_loss", "oracle", "random_weights")
STEPS, WARMUP, CORRUPTED = 6, 2, 2
MEMORY = "objective.weigher.memory."


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sidecar that calls one of the four episodes corrupted."""
    records = tuple(TruthRecord(i, "noise" if i == CORRUPTED else "clean", "push", "push") for i in range(4))
    return save_truth(tmp_path_factory.mktemp("truth") / "points", Truth(records))


def trainer_of(preset: str, folder: Path, points: Path, truth: Path, **settings: Any) -> PTRTrainer:
    options: dict[str, Any] = {
        "preset": preset,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STEPS // 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "segment_length": 2,
        "scorer_warmup_steps": WARMUP,
        "score_refresh_steps": 1,
        "head_dim": 16,
        "truth": str(truth),
    }
    args = PTRTrainingArguments(output_dir=str(folder), **{**options, **settings})
    return PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)


@pytest.fixture(
    scope="module",
    params=[PRESETS[0], *(pytest.param(preset, marks=pytest.mark.full) for preset in PRESETS[1:])],
)
def finished(request: Any, points: Path, truth: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
    trainer = trainer_of(request.param, tmp_path_factory.mktemp("runs") / request.param, points, truth)
    trainer.train()
    save_alone(trainer)
    return trainer


def test_weights_are_1_during_the_warmup_and_move_afterwards(finished: PTRTrainer) -> None:
    rows = [row for row in finished.state.log_history if "weight_mean" in row]
    assert len(rows) == STEPS
    for row in rows[:WARMUP]:
        assert (row["weight_min"], row["weight_max"]) == (1.0, 1.0)
    assert all({row["weight_min"], row["weight_max"]} != {1.0} for row in rows[WARMUP:]) or (
        finished.policy.config.preset == "oracle"
    ), "a batch of the oracle's may be clean throughout"
    if finished.policy.config.preset == "oracle":
        assert {round(row[name], 6) for row in rows[WARMUP:] for name in ("weight_min", "weight_max")} <= {0.001, 1.0}
    else:
        assert any(row["weight_max"] > 1.0 for row in rows[WARMUP:])
        assert any(row["weight_min"] < 1.0 for row in rows[WARMUP:])


def test_only_scores_with_heads_train_any(finished: PTRTrainer) -> None:
    rows = [row for row in finished.state.log_history if "weight_mean" in row]
    heads = [row["loss_heads"] for row in rows]
    if finished.policy.config.preset == "ptr_consequence":
        assert min(heads) > 0
    else:
        assert set(heads) == {0.0}
        assert not [name for name, _ in finished.policy.objective.named_parameters()]
    assert finished.policy.config.reads_futures == (finished.policy.config.preset == "ptr_consequence")


@pytest.mark.full
def test_resuming_gives_the_run_that_was_never_interrupted(
    finished: PTRTrainer, points: Path, truth: Path, tmp_path: Path
) -> None:
    checkpoint = f"checkpoint-{STEPS // 2}"
    shutil.copytree(Path(finished.args.output_dir) / checkpoint, tmp_path / checkpoint)
    resumed = trainer_of(finished.policy.config.preset, tmp_path, points, truth)
    with torch.no_grad():
        for parameter in resumed.policy.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / checkpoint))
    state = finished.policy.state_dict()
    # an unseen slot's mean is 0 / 0, but its buffers are numbers
    assert tensors_equal(resumed.policy.state_dict(), state)
    if finished.policy.config.preset == "oracle":
        assert not [name for name in state if name.startswith(MEMORY)]
    else:
        assert state[f"{MEMORY}count"].sum() > 0
        assert (state[f"{MEMORY}weight"] != 1).any()
    rows = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (finished, resumed)]
    assert rows[0] == rows[1]


@pytest.mark.full
def test_a_checkpoint_brings_its_memory_and_judges_other_data(
    finished: PTRTrainer, points: Path, tmp_path: Path
) -> None:
    from demonstrations import write_dataset

    loaded = PTRPolicy.from_pretrained(Path(finished.args.output_dir))
    assert tensors_equal(loaded.state_dict(), finished.policy.state_dict())
    scores = score_dataset(loaded, points, preprocessor=finished.preprocessor, progress=False)
    assert list(scores.verdicts) == list(loaded.objective.weigher.names)
    by_episode = {e: scores.weight[scores.episode_index == e] for e in range(4)}
    if loaded.objective.weigher.memory is not None:
        assert all(np.ptp(weights) == 0 for weights in by_episode.values())
    if loaded.config.preset == "oracle":
        means = [float(by_episode[e].mean()) for e in range(4)]
        assert means == pytest.approx([1.0 if e != CORRUPTED else 0.001 for e in range(4)], abs=1e-6)
    else:
        assert scores.weight.std() > 0
    # more episodes than the run had seen: what is known of the run's own says nothing about them
    other = write_dataset(tmp_path / "other", (12, 10, 14, 9, 11, 13), seed=1)
    elsewhere = score_dataset(loaded, other, preprocessor=finished.preprocessor, progress=False)
    assert set(elsewhere.episode_index.tolist()) == set(range(6))
    assert np.isfinite(elsewhere.weight).all()
    if loaded.config.preset in ("oracle", "random_weights"):
        assert all(np.isnan(values[elsewhere.episode_index > 3]).all() for values in elsewhere.verdicts.values())


def test_the_oracle_needs_the_truth(points: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no truth sidecar missing.truth.json"):
        trainer_of("oracle", tmp_path, points, tmp_path / "missing")


def test_a_column_to_standardize_by_that_the_data_lacks(points: Path, truth: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"standardize_by='robot' is no column.*choose all, task, or a column"):
        trainer_of("small_loss", tmp_path, points, truth, standardize_by="robot")


@pytest.mark.full
def test_episodes_that_are_bad_in_part(points: Path, truth: Path, tmp_path: Path) -> None:
    trainer = trainer_of("ptr_consequence", tmp_path, points, truth, aggregation="segment", aggregation_frames=12)
    memory = trainer.policy.objective.weigher.memory
    assert memory.first_slot.tolist() == [0, 3, 5, 9]
    trainer.train()
    assert len(memory.weight) == 11
    assert (memory.weight[:3] != memory.weight[0]).any(), "stretches of one episode weigh apart"


@pytest.mark.full
def test_the_dataset_decides_the_sizes_and_learned_heads_stay(points: Path, truth: Path, tmp_path: Path) -> None:
    from demonstrations import write_dataset

    first = trainer_of("ptr_consequence", tmp_path / "a", points, truth, save_strategy="no", max_steps=2)
    first.train()
    first.save_model()
    learned = {name: value.clone() for name, value in first.policy.objective.weigher.scores.state_dict().items()}
    other = write_dataset(tmp_path / "other", (12, 10, 14, 9, 11, 13), seed=1)
    policy = PTRPolicy.from_pretrained(tmp_path / "a")
    args = PTRTrainingArguments(output_dir=str(tmp_path / "b"), report_to="none", use_cpu=True, max_steps=1)
    again = PTRTrainer(policy, args, train_dataset=LeRobotDataset("tests/other", root=other))
    weigher = again.policy.objective.weigher
    assert len(weigher.memory.weight) == 6
    assert weigher.memory.count.sum() == 0
    assert tensors_equal(weigher.scores.state_dict(), learned)


@pytest.mark.full
def test_the_memory_is_the_same_on_both_ranks(points: Path, tmp_path: Path) -> None:
    _store, place = meeting_place()
    tests = Path(__file__).parents[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(tests),
            **place,
        }
        script = [sys.executable, str(Path(__file__).with_name("weighed_ranks.py")), str(points), str(tmp_path)]
        processes.append(subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    names = [name for name in ranks[0] if name.startswith(MEMORY)]
    assert {name.removeprefix(MEMORY) for name in names} >= {"total", "count", "weight"}
    assert tensors_equal(*ranks)
    assert (ranks[0][f"{MEMORY}weight"] != 1).any()
    chunks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    # the third channel is the loss, which every chunk has: both ranks' chunks are in it, faded a little
    seen = float(ranks[0][f"{MEMORY}count"][:, 2].sum())
    assert max(chunks) < seen <= sum(chunks)
