"""`cache_features`: training from what a frozen tower made of every frame equals training from the pictures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from meeting import meeting_place
from small_policies import ptr_policy, tensors_equal
from torch import Tensor
from transformers import TrainerCallback

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.feature_store import FRAMES_PER_SHARD, FeatureStore, Field

FROZEN = {"freeze_vision_encoder": True, "train_expert_only": True}
STEPS = 3


class HideVideos(TrainerCallback):
    """From the first step on there is no video that could be decoded."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        (self.root / "videos").rename(self.root / "hidden")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        (self.root / "hidden").rename(self.root / "videos")


def trained(root: Path, folder: Path, preset: str, *callbacks: TrainerCallback, **settings: Any) -> PTRTrainer:
    policy = ptr_policy("smolvla", root, FROZEN, preset=preset)
    fixed = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    length = {"max_steps": STEPS, "per_device_train_batch_size": 4}
    args = PTRTrainingArguments(output_dir=str(folder), **fixed, **{**length, **settings})
    trainer = PTRTrainer(policy, args, str(root), callbacks=callbacks)
    trainer.train()
    return trainer


def losses(trainer: PTRTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "preset",
    ["sft", pytest.param("ptr", marks=pytest.mark.full), pytest.param("ptr_calibrated", marks=pytest.mark.full)],
)
def test_training_without_pictures(point_videos: Path, tmp_path: Path, preset: str) -> None:
    """Bit for bit with float32; with bfloat16, which keeps 8 bits of each number, losses within 0.1 %."""
    plain = trained(point_videos, tmp_path / "plain", preset)
    cache = {"cache_features": str(tmp_path / "cache")}
    exact = trained(point_videos, tmp_path / "exact", preset, HideVideos(point_videos), cache_dtype="float32", **cache)
    assert losses(exact) == losses(plain)
    assert tensors_equal(exact.policy.state_dict(), plain.policy.state_dict())
    rounded = trained(point_videos, tmp_path / "rounded", preset, HideVideos(point_videos), **cache)
    assert losses(rounded) != losses(plain)
    assert losses(rounded) == pytest.approx(losses(plain), rel=1e-3)


@pytest.mark.full
def test_two_processes_share_the_work(points: Path, tmp_path: Path) -> None:
    """Each computes its own part, also where one looks when the other has begun; both train to the end."""
    store, place = meeting_place()
    script = [sys.executable, str(Path(__file__).with_name("feature_ranks.py")), str(points), str(tmp_path)]
    ranks = []
    for rank in range(2):
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        ranks.append(subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in ranks:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    del store
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.json"))) == 6
    assert len(json.loads((tmp_path / "rank-0.json").read_text())) == 3


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are written from now on."""
    shards: list[int] = []
    write = FeatureStore.write

    def noted(self: FeatureStore, shard: int, values: dict[str, Tensor]) -> None:
        shards.append(shard)
        write(self, shard, values)

    monkeypatch.setattr(FeatureStore, "write", noted)
    return shards


@pytest.mark.full
def test_what_is_there_is_not_computed_again(
    point_videos: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only shards that are missing or damaged, and all of them for other weights."""
    monkeypatch.setattr("ptr_hf.data.feature_store.FRAMES_PER_SHARD", 50)
    cache = {"cache_features": str(tmp_path / "cache")}
    first = losses(trained(point_videos, tmp_path / "one", "sft", **cache))
    assert computed == [0, 1, 2]
    (folder,) = (tmp_path / "cache").iterdir()
    files = sorted(folder.glob("*.npy"))
    with files[1].open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    files[2].unlink()
    assert losses(trained(point_videos, tmp_path / "two", "sft", **cache)) == first
    assert computed == [0, 1, 2, 1, 2]
    trained(point_videos, tmp_path / "three", "sft", cache_dtype="float32", **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.full
def test_a_frame_that_cannot_be_read(points: Path, tmp_path: Path) -> None:
    """The sample that shows it is left out, and named."""
    root = tmp_path / "bad"
    shutil.copytree(points, root)
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index("observation.image")
    pictures = table["observation.image"].to_pylist()
    pictures[40] = {"bytes": pictures[40]["bytes"][:60], "path": None}
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(pictures, field.type)), path)
    trainer = trained(
        root,
        tmp_path / "run",
        "sft",
        num_train_epochs=1,
        max_steps=-1,
        per_device_train_batch_size=16,
        cache_features=str(tmp_path / "cache"),
    )
    assert np.isfinite(losses(trainer)).all()
    assert sum(row.get("nonfinite_samples", 0) for row in trainer.state.log_history) == 1
    (frame,) = json.loads((tmp_path / "run" / "ptr_nonfinite.json").read_text())["frames"]
    assert (frame["episode"], frame["index"]) == (1, 40)


@pytest.mark.parametrize(
    ("family", "base", "settings", "why"),
    [
        ("act", {}, {}, "the act policy cannot be trained from features of its pictures"),
        ("smolvla", {}, {}, "the policy's vision tower trains"),
        ("smolvla", FROZEN, {"in_memory": True}, "it takes a single dataset that is read from disk"),
    ],
)
def test_refused_by_name(
    points: Path, tmp_path: Path, family: str, base: dict[str, Any], settings: dict[str, Any], why: str
) -> None:
    args = PTRTrainingArguments(output_dir=str(tmp_path), cache_features="auto", use_cpu=True, **settings)
    with pytest.raises(
        ValueError, match=rf"cache_features='auto' was asked for, but {why}.*: leave cache_features out\."
    ):
        PTRTrainer(ptr_policy(family, points, base, preset="sft"), args, str(points))


def test_a_disk_that_is_too_small(points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        ValueError, match=r"The features of 112 frames take .* GB and .* has 1e-06 GB free: name a larger disk"
    ):
        trained(points, tmp_path / "run", "sft", cache_features=str(tmp_path / "cache"))


class TestStore:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_round_trip(self, tmp_path: Path, dtype: str) -> None:
        """Every shard, in the dtype that the numbers were computed in; NaN survives."""
        frames = FRAMES_PER_SHARD + 3
        values = torch.randn(frames, 2, 3, generator=torch.Generator().manual_seed(0))
        values[5, 0, 0] = torch.nan
        store = FeatureStore(tmp_path, frames, {"a": Field((2, 3), dtype, "float32")})
        assert store.missing() == [0, 1]
        assert store.bytes == frames * 6 * (2 if dtype == "bfloat16" else 4)
        for shard in store.shards:
            rows = store.rows(shard)
            store.write(shard, {"a": values[rows.start : rows.stop]})
        assert store.missing() == []
        rows = [frames - 1, 5, 0, FRAMES_PER_SHARD]
        found = store.read(rows)["a"]
        assert found.dtype == torch.float32
        expected = values[rows].to(getattr(torch, dtype)).float()
        assert np.array_equal(found.numpy(), expected.numpy(), equal_nan=True)
        assert FeatureStore(tmp_path, frames, {"a": Field((3, 2), dtype, "float32")}).missing() == [0, 1]
        assert FeatureStore(tmp_path, frames + 1, store.fields).missing() == [1]
