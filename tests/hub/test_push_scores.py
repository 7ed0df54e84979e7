"""`ptr-score --push_to_hub`: a dataset repo with a card that the Hub accepts and no local path in it."""

from pathlib import Path

import pandas as pd
import pytest
from demonstrations import write_dataset
from loopback_hub import LoopbackHub

from ptr_hf.cli.score import score
from ptr_hf.cli.score_options import parse


@pytest.mark.full
def test_scores_as_a_dataset_repo(online: LoopbackHub, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "points", (12,) * 10, cameras=())
    options = ["--dataset", str(root), "--output_dir", str(tmp_path / "out"), "--questions", "roughness"]
    assert score(parse([*options, "--push_to_hub", "lab/scores"])) == 0
    files = {name: file.content for name, file in online.repo("lab/scores", "dataset").at("main").files.items()}
    assert {"README.md", "ptr_chunks.parquet", "ptr_episodes.csv", "ptr_scores.json", "ptr_scores.html"} <= set(files)
    assert files["ptr_chunks.parquet"] == (tmp_path / "out" / "ptr_chunks.parquet").read_bytes()
    assert len(pd.read_parquet(tmp_path / "out" / "ptr_chunks.parquet")) == 120
    assert b"Scores of points" in files["README.md"]
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_a_refusal_is_a_sentence(online: LoopbackHub, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "points", (12,) * 10, cameras=())
    options = ["--dataset", str(root), "--output_dir", str(tmp_path / "out"), "--questions", "roughness", "--no-page"]
    with pytest.raises(ValueError, match="The scores were not pushed to elsewhere/scores"):
        score(parse([*options, "--push_to_hub", "elsewhere/scores"]))
    assert (tmp_path / "out" / "keep.txt").is_file()
