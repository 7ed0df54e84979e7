"""Mixtures of datasets on a hub: fetched over HTTP, all at once or a few episodes at a time."""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lerobot.datasets.dataset_metadata as lerobot_metadata
import lerobot.datasets.lerobot_dataset as lerobot_dataset
import pytest
import torch
from demonstrations import write_dataset
from huggingface_hub import HfApi
from lerobot.datasets import StreamingLeRobotDataset
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from loopback_hub import LoopbackHub

from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.scoring import DatasetScores
from ptr_hf.scoring.inspection import inspect_dataset

LAYOUT = SegmentLayout(
    observation_steps=None, action_steps=tuple(range(4)), segment_length=2, chunk_stride=4, consequence_offset=4
)
POINT = {
    "action": ["right_ee_delta_x", "right_ee_delta_y"],
    "state": ["right_ee_x", "right_ee_y", "environment_1", "environment_2"],
}


@pytest.fixture
def content(online: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Two datasets on the hub, and LeRobot's caches in a folder of the test's."""
    for module in (lerobot_metadata, lerobot_dataset):
        for name in ("HF_LEROBOT_HOME", "HF_LEROBOT_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / "lerobot")
    folders = {
        "lab/points": write_dataset(tmp_path / "points", lengths=(12, 16, 10), file_an_episode=True),
        "lab/lift": bundled_demonstrations("lift"),
    }
    api = HfApi()
    for name, folder in folders.items():
        api.create_repo(name, repo_type="dataset")
        api.upload_folder(repo_id=name, folder_path=folder, repo_type="dataset")
        api.create_tag(name, tag=CODEBASE_VERSION, repo_type="dataset")
    camera = {"observation.images.front": "observation.image"}
    return {
        "sources": [{"dataset": "lab/points", "embodiment": POINT}, {"dataset": "lab/lift", "rename": camera}],
        "shares": "temperature",
        "temperature": 10.0,
        "stream_episodes": 1,
    }


@pytest.mark.full
def test_a_stream_gives_what_the_whole_datasets_do(content: dict[str, Any]) -> None:
    meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
    assert meta.names == ("points", "lift")
    streamed = list(islice(StreamingMixture(meta, LAYOUT), 60))
    assert {sample["source"] for sample in streamed} == {"points", "lift"}
    whole = Mixture(meta, LAYOUT)
    place = {int(whole[position]["index"]): position for position in range(len(whole))}
    for sample in streamed[::4]:
        for key, value in whole[place[int(sample["index"])]].items():
            assert torch.equal(value, sample[key]) if isinstance(value, torch.Tensor) else value == sample[key]


@pytest.mark.full
def test_a_stream_keeps_the_files_of_the_open_episodes_alone(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content["sources"] = content["sources"][:1]
    meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(fetched))
    copies = tmp_path / "copies"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", copies)

    def copied() -> int:
        """The datasets library's own copies of frames."""
        files = copies.rglob("*.arrow")
        return sum("action" in datasets.Dataset.from_file(str(file)).column_names for file in files)

    held: dict[int, set[str]] = {}
    stream = iter(StreamingMixture(meta, LAYOUT))
    for sample in islice(stream, 70):  # 38 frames a pass
        files = {path.name for path in fetched.glob("ptr_stream_*/data/**/*.parquet")}
        held.setdefault(int(sample["episode_index"]), files)
        assert files == held[int(sample["episode_index"])]
    assert sorted(held) == [0, 1, 2]
    assert all(len(files) == 1 for files in held.values())
    assert len(set.union(*held.values())) == 3, "a file of its own for every episode"
    assert copied() == 1, "nor is the library's own copy of earlier ones kept"
    stream.close()
    assert copied() == 0
    assert not list(fetched.iterdir()), "what was fetched goes with the stream"


@pytest.mark.full
def test_a_stream_is_scored_from_its_parquet_files_alone(
    content: dict[str, Any], online: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online.url)
    questions = ["roughness", "completeness"]

    def inspected(dataset: Any) -> DatasetScores:
        return inspect_dataset(dataset, questions=questions, device="cpu", progress=False)

    stream = StreamingLeRobotDataset("lab/lift", episodes=[0, 2])
    mixture, one = inspected({**content, "streaming": True}), inspected(stream)
    assert mixture.episodes.groupby("source").size().tolist() == [3, 8]
    assert online.seen(r"/lab/lift/resolve/.*/data/")
    assert not online.seen(r"/resolve/.*/videos/")
    assert one.settings["datasets"][0]["revision"] == stream.revision
    expected = inspect_dataset(
        bundled_demonstrations("lift"), episodes=[0, 2], questions=questions, device="cpu", progress=False
    )
    assert one.chunks.equals(expected.chunks)
    assert one.episodes.equals(expected.episodes)


@pytest.mark.full
def test_episodes_whose_files_are_missing_beside_others_are_fetched(content: dict[str, Any]) -> None:
    first = Mixture(
        MixtureMetadata.read(MixtureConfig([SourceConfig("lab/points", embodiment=POINT, episodes=[0])])), LAYOUT
    )
    other = Mixture(
        MixtureMetadata.read(MixtureConfig([SourceConfig("lab/points", embodiment=POINT, episodes=[2])])), LAYOUT
    )
    assert (len(first), len(other)) == (12, 10)
    assert int(other[0]["episode_index"]) == 2
