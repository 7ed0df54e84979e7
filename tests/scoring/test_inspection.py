"""The inspection of a dataset: what is found, what is not flagged, calibration and windows by hand."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from scipy import stats
from sklearn.metrics import roc_auc_score

from ptr_hf.data.demonstrations import bundled_demonstrations, load_truth
from ptr_hf.scoring import DatasetScores
from ptr_hf.scoring.calibration import judged_within, lowest_of_minima, of_the_lowest, standard
from ptr_hf.scoring.companions import Roughness
from ptr_hf.scoring.crossfit import CrossFit, FitSettings
from ptr_hf.scoring.inspection import inspect_dataset, widened
from ptr_hf.scoring.instruction import neighbours
from ptr_hf.scoring.on_disk import on_disk
from ptr_hf.scoring.question import Answer
from ptr_hf.scoring.recordings import Recordings, episode_blocks, read_recordings
from ptr_hf.scoring.verdicts import episode_minima, forward_means, judge

UNEVEN = bundled_demonstrations("train")


@pytest.fixture(scope="module")
def scores() -> DatasetScores:
    return inspect_dataset(UNEVEN, device="cpu", progress=False)


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    return read_recordings(UNEVEN)


def corrupted() -> dict[int, str]:
    """Which episodes of the bundled demonstrations are bad, and how."""
    return {record.episode_index: record.kind for record in load_truth(UNEVEN).records if record.kind != "clean"}


def changed(folder: Path, change: Callable[[np.ndarray, np.ndarray], None]) -> Path:
    """A copy of the bundled demonstrations whose actions (frames, A) were changed in place, given each frame's episode."""
    shutil.copytree(UNEVEN, folder)
    for path in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("action")
        field = table.schema.field(place)
        action = np.stack(table["action"].to_numpy(zero_copy_only=False)).astype(np.float32)
        change(action, table["episode_index"].to_numpy())
        pq.write_table(table.set_column(place, field, pa.array(list(action), field.type)), path)
    return folder


class TestWhatIsFound:
    def test_bad_demonstrations_and_no_good_one(self, scores: DatasetScores) -> None:
        bad = corrupted()
        is_bad = scores.episodes["episode_index"].isin(bad)
        assert roc_auc_score(is_bad, -scores.episodes["z"]) >= 0.95
        assert set(scores.flagged["episode_index"]) <= set(bad)
        assert len(scores.flagged) >= 15

    def test_the_reason_is_what_was_done(self, scores: DatasetScores) -> None:
        kinds = corrupted()
        words = {"noise": "nois", "wrong_convention": "does not do what", "wrong_instruction": "another instruction"}
        for row in scores.flagged.itertuples():
            expected = words.get(kinds[row.episode_index])
            if expected is not None:
                others = ("rough", "does not follow")
                assert any(word in row.reason for word in (expected, *others)), (kinds[row.episode_index], row.reason)

    @pytest.mark.full
    def test_the_same_seed_gives_the_same_scores(self, scores: DatasetScores) -> None:
        again = inspect_dataset(UNEVEN, device="cpu", progress=False)
        assert again.chunks.equals(scores.chunks)
        assert again.episodes.equals(scores.episodes)

    def test_tables_have_a_row_for_every_frame_and_episode(
        self, scores: DatasetScores, recordings: Recordings, tmp_path: Path
    ) -> None:
        assert scores.chunks["index"].tolist() == list(range(len(recordings)))
        assert list(scores.episodes.columns[:4]) == ["episode_index", "weight", "z", "reason"]
        assert list(scores.episodes.columns[-2:]) == ["task", "frames"]
        assert scores.chunks["weight"].between(0.02, 1).all()
        assert scores.moved == pytest.approx(1 - scores.chunks["weight"].mean())
        back = DatasetScores.load(scores.save(tmp_path / "saved"))
        assert back.chunks.equals(scores.chunks)
        assert back.episodes["reason"].tolist() == scores.episodes["reason"].tolist()
        settings = json.loads((tmp_path / "saved" / "ptr_scores.json").read_text())
        assert settings["datasets"][0]["frames"] == len(recordings)


class TestInBlocks:
    """A dataset is read some whole episodes at a time: 4422 frames are one block, or nine where a block has 500."""

    def test_blocks_are_whole_episodes(self, recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
        assert recordings.blocks == [(slice(0, 60), slice(0, 4422))]
        monkeypatch.setattr("ptr_hf.scoring.recordings.BLOCK", 500)
        blocks = episode_blocks(recordings.length)
        assert len(blocks) == 9
        assert [place for own, _ in blocks for place in range(own.start, own.stop)] == list(range(60))
        for own, span in blocks:
            assert span == slice(recordings.first[own.start], recordings.last[own.stop - 1] + 1)

    def test_what_is_read_and_drawn_is_the_same(self, recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
        finite = recordings.finite & (np.arange(len(recordings)) % 7 > 0)
        whole = CrossFit(replace(recordings, finite=finite), FitSettings(max_frames=1000, progress=False))
        monkeypatch.setattr("ptr_hf.scoring.recordings.BLOCK", 500)
        read = read_recordings(UNEVEN)
        for name in ("state", "action", "finite", "index", "frame", "episode", "timestamp", "task", "length"):
            assert np.array_equal(getattr(read, name), getattr(recordings, name)), name
        parts = CrossFit(replace(read, finite=finite), FitSettings(max_frames=1000, progress=False))
        assert finite[parts.rows].all()
        assert np.array_equal(parts.rows, whole.rows)
        assert torch.equal(parts.state, whole.state)
        values = read.action.astype(np.float64)
        assert np.allclose(read.deviation(read.action), values.std(axis=0), rtol=1e-6)

    def test_the_scores_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        questions = ["completeness", "roughness", "idleness", "jumps", "frozen", "timing"]
        whole = inspect_dataset(UNEVEN, questions=questions, device="cpu", progress=False)
        monkeypatch.setattr("ptr_hf.scoring.recordings.BLOCK", 500)
        parts = inspect_dataset(UNEVEN, questions=questions, device="cpu", progress=False)
        assert len(whole.flagged) > 0
        # sums over windows begin anew with a block
        pd.testing.assert_frame_equal(parts.chunks, whole.chunks, rtol=1e-5)
        pd.testing.assert_frame_equal(parts.episodes, whole.episodes, rtol=1e-5)

    def test_a_disk_without_room_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(OSError, match=rf"{tmp_path} has no room for 4\d* MB .*set TMPDIR"):
            on_disk((1 << 60,), np.float32)


class TestWhatBadFramesDoToStatistics:
    def test_a_channel_that_they_make_wider_is_named(self, recordings: Recordings) -> None:
        weight = np.where(recordings.episode == 4, 0.02, 1.0)
        noisy = recordings.action.copy()
        noisy[:, 2] *= 0.01
        noisy[recordings.episode == 4, 2] = np.random.default_rng(0).normal(0, 1, (recordings.episode == 4).sum())
        (note,) = widened(replace(recordings, action=noisy), weight)
        of_all, of_good = noisy[:, 2].std(), noisy[weight == 1, 2].std()
        assert f"of action {recordings.action_names[2]}, up to {of_all / of_good:.0f} times" in note
        assert "--statistics policy" in note

    def test_nothing_is_said_where_none_is_wider(self, scores: DatasetScores, recordings: Recordings) -> None:
        assert not any("widen" in note for note in scores.notes)
        assert widened(recordings, np.ones(len(recordings))) == []


class TestWhatIsNotFlagged:
    @pytest.mark.full
    @pytest.mark.parametrize("episodes", [[1], [0, 2], None], ids=["one", "two", "four"])
    def test_too_few_episodes(self, points: Path, episodes: list[int] | None) -> None:
        found = inspect_dataset(points, episodes=episodes, device="cpu", progress=False)
        assert (found.chunks["weight"] == 1).all()
        assert "Too few episodes to judge" in found.notes[0]

    @pytest.mark.full
    def test_two_tasks_of_one_episode_each(self, recordings: Recordings) -> None:
        """Together with six of one task they are two of eight, and have nobody to be compared with."""
        tasks = recordings.task
        six = np.flatnonzero(tasks == 0)[:6].tolist()
        lonely = [int(np.flatnonzero(tasks == task)[0]) for task in (1, 2)]
        found = inspect_dataset(UNEVEN, episodes=sorted(six + lonely), device="cpu", progress=False)
        assert found.episodes.set_index("episode_index").loc[lonely, "weight"].eq(1).all()
        assert any("2 episodes have too few others" in note for note in found.notes)

    @pytest.mark.full
    def test_frames_that_hold_no_number(self, tmp_path: Path) -> None:
        def spoil(action: np.ndarray, episode: np.ndarray) -> None:
            action[np.flatnonzero(episode == 3)[2:5], 1] = np.nan

        found = inspect_dataset(changed(tmp_path / "spoiled", spoil), device="cpu", progress=False)
        assert any("3 frames hold NaN or Inf, in 1 episodes (first: 3)" in note for note in found.notes)
        assert np.isfinite(found.episodes["z"]).all()

    def test_an_episode_that_holds_no_number_at_all(self, recordings: Recordings) -> None:
        finite = recordings.episode != 3
        fit = CrossFit(replace(recordings, finite=finite), FitSettings(progress=False))
        assert np.flatnonzero(fit.fold == -1).tolist() == [3]
        pair = np.isin(recordings.episode, [0])
        assert CrossFit(replace(recordings, finite=pair), FitSettings(progress=False)).folds == 1

    def test_one_of_two_episodes_holds_no_number(self, points: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(points, tmp_path / "half"))
        for path in (folder / "data").rglob("*.parquet"):
            table = pq.read_table(path)
            place = table.schema.get_field_index("action")
            action = np.stack(table["action"].to_numpy(zero_copy_only=False)).astype(np.float32)
            action[table["episode_index"].to_numpy() == 1] = np.nan
            field = table.schema.field(place)
            pq.write_table(table.set_column(place, field, pa.array(list(action), field.type)), path)
        found = inspect_dataset(folder, episodes=[0, 1], device="cpu", progress=False)
        assert (found.chunks["weight"] == 1).all()
        assert any("it takes two episodes" in note for note in found.notes)

    def test_no_actions(self, points: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(points, tmp_path / "mute"))
        info = json.loads((folder / "meta" / "info.json").read_text())
        del info["features"]["action"]
        (folder / "meta" / "info.json").write_text(json.dumps(info))
        for path in (folder / "data").rglob("*.parquet"):
            pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
        with pytest.raises(ValueError, match=r"mute has no 'action'"):
            inspect_dataset(folder, progress=False)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"false_alarms": 0.0}, "false_alarms=0.0 is out of range"),
            ({"weight_min": 1.5}, "weight_min=1.5 is out of range"),
            ({"group": "operator"}, "no episode column 'operator'.*task, none"),
            ({"questions": ["mood"]}, "no question 'mood'; there are action_from_consequence"),
            ({"episodes": [99]}, r"episodes \[99\] do not exist"),
        ],
    )
    def test_options_that_match_nothing(self, points: Path, options: dict, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            inspect_dataset(points, device="cpu", progress=False, **options)

    def test_no_question_that_can_be_asked(self, points: Path) -> None:
        found = inspect_dataset(points, questions=["frozen"], device="cpu", progress=False)
        assert (found.chunks["weight"] == 1).all()
        assert any("No question could be asked" in note for note in found.notes)

    def test_no_video_is_read(self, point_videos: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(point_videos, tmp_path / "no_videos"))
        for path in (folder / "videos").rglob("*.mp4"):
            path.write_bytes(b"not a video")
        assert len(read_recordings(folder)) == len(LeRobotDataset("tests/points", root=point_videos))


class TestCalibration:
    def test_by_hand(self) -> None:
        """Median 0 and upper deviations 1, 2, 3: their median 2 is 2 / 0.6745 standard deviations, of the pool as well."""
        scores = np.array([[-40.0], [-2.0], [-1.0], [0.0], [1.0], [2.0], [3.0]])
        found = standard(scores, np.zeros(7, np.int64), np.ones(7, bool), resolution=0.25)
        scale = 2 / stats.norm.ppf(0.75) + 0.25
        assert found.center[0, 0] == 0
        assert found.scale[0, 0] == pytest.approx(scale)
        assert found.z(scores)[0, 0] == pytest.approx(-40 / scale)
        assert found.chance(scores)[0, 0] == pytest.approx(stats.t.cdf(-40 / scale, found.degrees[0]))

    def test_bad_episodes_do_not_widen_the_scale(self) -> None:
        draws = np.random.default_rng(0)
        good = draws.normal(size=(300, 1))
        mixed = np.concatenate([good, draws.normal(-30, 1, size=(60, 1))])
        group = np.zeros(360, np.int64)
        alone = standard(good, group[:300], np.ones(300, bool))
        together = standard(mixed, group, np.ones(360, bool))
        assert together.scale[0, 0] < 1.25 * alone.scale[0, 0]

    def test_small_groups_are_judged_together_or_not_at_all(self) -> None:
        assert judged_within(np.array([0, 0, 0, 0, 1, 2, 3, 4])).tolist() == [0, 0, 0, 0, 5, 5, 5, 5]
        assert judged_within(np.array([0, 0, 0, 0, 1, 2])).tolist() == [0, 0, 0, 0, -1, -1]

    def test_the_lowest_of_several_chances(self) -> None:
        assert of_the_lowest(np.array([[0.01, 0.5]]), 2)[0] == pytest.approx(1 - 0.99**2)

    def test_minima_have_the_tail_of_gumbel(self) -> None:
        lowest = np.random.default_rng(0).normal(size=(4000, 200)).min(axis=1, keepdims=True)
        found = standard(lowest, np.zeros(4000, np.int64), np.ones(4000, bool), resolution=0.0)
        for chance in (0.1, 0.01):
            share = (found.z(lowest)[:, 0] < lowest_of_minima(chance)).mean()
            assert share <= 1.3 * chance

    @pytest.mark.parametrize("seed", range(3))
    def test_good_episodes_of_normal_scores_are_flagged_as_often_as_asked(self, seed: int) -> None:
        scores = np.random.default_rng(seed).normal(size=(2000, 4))
        found = standard(scores, np.zeros(2000, np.int64), np.ones(2000, bool))
        assert (of_the_lowest(found.chance(scores), 4) < 0.01).mean() <= 0.01


class TestWindows:
    def test_means_by_hand(self, recordings: Recordings) -> None:
        short = replace(recordings, length=np.array([4, 2]), episode=np.array([0, 0, 0, 0, 1, 1]), index=np.arange(6))
        values = np.array([[1.0], [3.0], [np.nan], [5.0], [7.0], [9.0]])
        means = forward_means(values, short.first, 3)
        assert means[:, 0].tolist() == [2.0, 4.0, 4.0, 4.0, 8.0, 8.0]
        assert episode_minima(means, short.first)[:, 0].tolist() == [2.0, 8.0]

    def test_only_a_bad_stretch_of_an_episode_weighs_less(self, recordings: Recordings) -> None:
        episodes, frames, window = 40, 200, 16
        rows = np.arange(episodes * frames)
        long = replace(
            recordings,
            length=np.full(episodes, frames),
            episode=rows // frames,
            frame=rows % frames,
            index=rows,
            task=np.zeros(episodes, np.int64),
            episode_index=np.arange(episodes),
            fps=10.0,
        )
        scores = np.random.default_rng(0).normal(size=(len(rows), 1)).astype(np.float32)
        scores[5 * frames + 50 : 5 * frames + 80] -= 10
        scores[9 * frames : 10 * frames] -= 10
        found = judge(
            long,
            {Roughness(): Answer(("shoulder",), scores)},
            long.task,
            false_alarms=0.01,
            weight_min=0.02,
            window=window,
        )
        assert np.flatnonzero(found.flagged).tolist() == [5, 9]
        weight = found.weight.reshape(episodes, frames)
        assert (weight[9] == np.float32(0.02)).all()
        assert (weight[5, 50:64] == np.float32(0.02)).all()
        assert (weight[5, : 50 - window] == 1).all()
        assert (weight[5, 80:] == 1).all()
        assert (np.delete(weight, [5, 9], axis=0) == 1).all()
        assert found.reasons[9] == "the commands of shoulder are noisy"
        assert found.reasons[5].startswith("the commands of shoulder are noisy, from ")


class TestCrossFitting:
    def test_folds_hold_whole_episodes_of_every_task(self, recordings: Recordings) -> None:
        fit = CrossFit(recordings, FitSettings(progress=False))
        assert np.bincount(fit.fold).tolist() == [15, 15, 15, 15]
        for task in np.unique(recordings.task):
            of_task = np.bincount(fit.fold[recordings.task == task], minlength=4)
            assert of_task.max() - of_task.min() <= 1

    def test_a_network_never_judges_what_it_learned_from(self, recordings: Recordings) -> None:
        fit = CrossFit(recordings, FitSettings(progress=False, steps=2, stages=2))
        seen: list[set[int]] = [set() for _ in range(fit.folds)]
        judged: list[set[int]] = [set() for _ in range(fit.folds)]
        network = torch.nn.Linear(1, 1)

        def loss(rows: torch.Tensor) -> torch.Tensor:
            for fold, own in enumerate(rows.tolist()):
                seen[fold] |= set(recordings.episode[own].tolist())
            return network(torch.zeros(1)).sum()

        def judge(fold: int, rows: torch.Tensor) -> torch.Tensor:
            judged[fold] |= set(recordings.episode[rows.numpy()].tolist())
            return torch.zeros(len(rows), 1)

        fit.fit(network, loss, judge, lambda scores: np.ones(len(scores)), "test")
        for fold in range(fit.folds):
            assert seen[fold]
            assert judged[fold]
            assert not seen[fold] & judged[fold]

    def test_fits_read_no_more_frames_than_allowed(self, recordings: Recordings) -> None:
        assert len(CrossFit(recordings, FitSettings(max_frames=100, progress=False)).rows) == 100


def test_neighbours_by_hand() -> None:
    points = np.array([[0.0], [1.0], [5.0]])
    near, votes = neighbours(points, 2, np.arange(3))
    assert near.tolist() == [[1, 2], [0, 2], [1, 0]]
    assert votes[0, 0] == pytest.approx(math.exp(-1 / 13))
    near, _ = neighbours(points, 2, np.array([0, 2]))
    assert near.tolist() == [[2], [0], [0]]
