"""`ptr-score` as a user runs it: files, page, exit codes, and one clear sentence for what it cannot do."""

import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from demonstrations import write_dataset
from lerobot.datasets import LeRobotDataset
from small_policies import ptr_policy, stats_of

from ptr_hf.cli.refusals import UsageError
from ptr_hf.cli.score import main, score
from ptr_hf.cli.score_options import DEFAULTS, parse
from ptr_hf.data.demonstrations import bundled_demonstrations, load_truth
from ptr_hf.processor_ptr import make_ptr_pre_post_processors
from ptr_hf.report.chunk_scores import SCORES_FILE, read_scores
from ptr_hf.scoring import inspection
from ptr_hf.scoring.dataset_scores import CHUNKS_FILE, DatasetScores
from ptr_hf.scoring.next_steps import PAGE_FILE, commands, excluded_episodes, kept_episodes, recommendation

QUICK = ("--questions", "roughness", "completeness", "--max_frames", "2000")


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demonstrations, asked two questions."""
    folder = tmp_path_factory.mktemp("inspected") / "out"
    root = bundled_demonstrations()
    assert score(parse(["--dataset", str(root), "--output_dir", str(folder), *QUICK])) == 0
    return folder


def test_files_and_page(inspected: Path) -> None:
    scores = DatasetScores.load(inspected)
    bad = set(np.flatnonzero(load_truth(bundled_demonstrations()).corrupted).tolist())
    out = [int(line) for line in (inspected / "exclude.txt").read_text().split()]
    keep = [int(line) for line in (inspected / "keep.txt").read_text().split()]
    assert out
    assert set(out) <= bad
    assert sorted(out + keep) == list(range(60))
    page = (inspected / PAGE_FILE).read_text()
    assert recommendation(scores).headline in page
    assert page.count("<article") == min(12, len(scores.flagged))
    assert page.count("data:image/webp") >= 10 * min(12, len(scores.flagged)) * 0.9
    # nothing is fetched and nothing runs
    assert not re.search(r"""(src|href)=["'](?!data:|#)|<script|@import|url\(""", page)


def test_json_is_alone_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_dataset(tmp_path / "points", (12,) * 10, cameras=())
    capfd.readouterr()
    options = ["--dataset", str(root), "--output_dir", str(tmp_path / "out"), "--json", "--no-page"]
    assert score(parse([*options, "--questions", "roughness"])) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert (found["episodes"], found["frames"], found["failed"]) == (10, 120, False)
    assert len(found["flagged"]) == len(DatasetScores.load(tmp_path / "out").flagged)
    assert all(Path(path).is_file() for path in found["files"])
    assert "10 of 10 episodes, 120 frames" in " ".join(err.split())


def test_too_much_weight_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = bundled_demonstrations()
    options = ["--dataset", str(root), "--output_dir", str(tmp_path), "--no-page", "--fail_over", "0.05", *QUICK]
    assert score(parse(options)) == 1
    assert "exit code 1" in capsys.readouterr().out


@pytest.mark.full
def test_a_cleaned_copy(tmp_path: Path, points: Path) -> None:
    root = write_dataset(tmp_path / "points", (14,) * 12, cameras=())
    frames = next((root / "data").rglob("*.parquet"))
    table = pd.read_parquet(frames)
    noise = np.random.default_rng(0).normal(0, 1, (14, 2)).astype(np.float32)
    rows = table["episode_index"] == 4
    table.loc[rows, "action"] = pd.Series(list(noise), index=table.index[rows])
    table.to_parquet(frames)
    copy = tmp_path / "copy"
    options = ["--dataset", str(root), "--output_dir", str(tmp_path / "out"), "--write_dataset", str(copy)]
    score(parse([*options, "--questions", "roughness", "--group", "none"]))
    assert excluded_episodes(DatasetScores.load(tmp_path / "out")) == [4]
    assert LeRobotDataset("copy", root=copy).num_episodes == 11
    # a dataset without cameras is shown by its actions and states
    assert "action dx" in (tmp_path / "out" / PAGE_FILE).read_text()


def test_defaults_are_those_of_the_library() -> None:
    own = inspect.signature(inspection.inspect_dataset).parameters
    assert {name: own[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--dataset is needed"),
        (["--dataset", "a", "--false_alarms", "0"], "--false_alarms must be above 0"),
        (["--dataset", "a", "b", "--episodes", "1"], "--episodes is of a single dataset; 2 are given"),
        (["--dataset", "a", "--fail_over", "7"], "--fail_over is a share"),
        (["--dataset", "a", "--output_dir", __file__], "is a file; name a folder"),
        (["--dataset", "a", "--outputdir", "b"], "did you mean --output_dir?"),
        (["--dataset", "a", "--write_dataset", "/"], "is there already"),
    ],
)
def test_command_lines_that_cannot_be(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(words)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--questions", "beauty"], "There is no question 'beauty'; there are"),
        (["--group", "operator"], "has no episode column 'operator' to compare episodes within"),
        (["--episodes", "99"], "episodes [99] do not exist"),
    ],
)
def test_refused_in_a_sentence(words: list[str], sentence: str, points: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        score(parse(["--dataset", str(points), "--output_dir", str(tmp_path), *words]))


def test_exit_code_and_sentence_of_a_missing_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ptr-score", "--dataset", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ptr-score: ")
    assert "is no LeRobotDataset" in line


@pytest.mark.full
def test_bad_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_dataset(tmp_path / "one", (20,), cameras=())
    options = ["--dataset", str(root), "--output_dir", str(tmp_path / "out"), "--questions", "roughness"]
    assert score(parse(options)) == 0
    assert "Too few episodes to judge: 1" in capsys.readouterr().out
    root = write_dataset(tmp_path / "broken", (12,) * 10, cameras=())
    frames = next((root / "data").rglob("*.parquet"))
    table = pd.read_parquet(frames)
    table.at[30, "action"] = np.array([np.nan, 0], np.float32)
    table.to_parquet(frames)
    options = ["--dataset", str(root), "--output_dir", str(tmp_path / "broken_out"), "--questions", "roughness"]
    assert score(parse(options)) == 0
    assert "hold NaN or Inf" in (tmp_path / "broken_out" / PAGE_FILE).read_text()


@pytest.mark.full
def test_the_scorer_of_a_checkpoint(points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = ptr_policy("act", points, num_belief_tokens=2, segment_length=2, scorer_warmup_steps=0)
    policy.save_pretrained(tmp_path)
    names = ("policy_preprocessor.json", "policy_postprocessor.json")
    for pipeline, name in zip(make_ptr_pre_post_processors(policy.config, stats_of(points)), names, strict=True):
        pipeline.save_pretrained(tmp_path, config_filename=name)
    options = ["--dataset", str(points), "--output_dir", str(tmp_path / "out"), "--questions", "roughness", "--no-page"]
    assert score(parse([*options, "--scorer", str(tmp_path)])) == 0
    assert set(read_scores(tmp_path / "out" / SCORES_FILE).episode_index) == {0, 1, 2, 3}
    assert "Its lowest episodes" in capsys.readouterr().out


@pytest.mark.full
def test_several_datasets(tmp_path: Path, point_videos: Path) -> None:
    other = write_dataset(tmp_path / "other", (12,) * 10, cameras=())
    options = ["--dataset", str(point_videos), str(other), "--output_dir", str(tmp_path / "out")]
    assert score(parse([*options, "--questions", "roughness"])) == 0
    assert (tmp_path / "out" / "keep.txt").read_text().startswith("0:0\n0:1\n")
    assert '<th scope="col">source</th>' in (tmp_path / "out" / PAGE_FILE).read_text()


def found(weights: list[float], z: list[float], notes: tuple[str, ...] = ()) -> DatasetScores:
    episodes = pd.DataFrame({"episode_index": range(len(weights)), "weight": weights, "z": z, "reason": "noisy"})
    chunks = pd.DataFrame({"index": range(len(weights)), "weight": weights})
    settings = {"false_alarms": 0.01, "weight_min": 0.02, "questions": {}, "datasets": [{"repo_id": "me/demos"}]}
    return DatasetScores(chunks, episodes, settings, notes)


def test_recommendations() -> None:
    assert recommendation(found([1.0] * 9, [0.0] * 9)).kind == "nothing"
    assert recommendation(found([0.02] * 5 + [1.0] * 5, [-9.0] * 10)).kind == "majority"
    assert recommendation(found([0.02] + [1.0] * 99, [-3.1] + [0.0] * 99)).kind == "chance"
    assert recommendation(found([0.02] + [1.0] * 99, [-8.0] + [0.0] * 99)).kind == "train"
    assert recommendation(found([1.0] * 2, [0.0] * 2, ("Too few episodes to judge: 2.",))).kind == "unjudged"


def test_the_next_commands() -> None:
    scores = found([0.02, 1.0, 0.6, 1.0], [-9.0, 0.0, -5.0, 0.0])
    assert excluded_episodes(scores) == [0]
    assert kept_episodes(scores) == [1, 2, 3]
    lines = [command.line for command in commands(scores, ["me/demos"], Path("out"))]
    assert any(f"--weights out/{CHUNKS_FILE}" in line for line in lines)
    assert any(
        line == "lerobot-edit-dataset --repo_id me/demos --new_repo_id me/demos_kept --operation.type delete_episodes "
        '--operation.episode_indices "[0]"'
        for line in lines
    )
    assert any('--dataset.episodes="[1,2,3]"' in line for line in lines)
    assert commands(found([1.0] * 9, [0.0] * 9), ["me/demos"], Path("out")) == []
