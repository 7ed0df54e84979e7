"""Scoring a dataset: every chunk once, the same each time, and nothing of the policy moves."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from small_policies import FAMILIES, frames_of, ptr_policy, stats_of, tensors_equal, train_batch

from ptr_hf import PTRPolicy, score_dataset
from ptr_hf.data.datasets import dataset_metadata, open_dataset, segments_at_once
from ptr_hf.data.in_memory import InMemorySegments
from ptr_hf.data.segments import SegmentLayout
from ptr_hf.processor_ptr import make_ptr_pre_post_processors
from ptr_hf.report.chunk_scores import ChunkScores
from ptr_hf.scores import EpisodeTable
from ptr_hf.scoring import action_loss

STARTS, LENGTHS = (0, 30, 54, 94), (30, 24, 40, 18)
COLUMNS = ("index", "episode_index", "frame_index", "target_valid", "score", "weight", "loss")
SETTINGS = {"segment_length": 2, "queue_size": 32, "queue_negatives": 8, "scorer_warmup_steps": 0}


def preprocessor_of(policy: PTRPolicy, points: Path) -> PolicyProcessorPipeline:
    return make_pre_post_processors(policy.config.base_config, dataset_stats=stats_of(points))[0]


@pytest.fixture(scope="module")
def trained(points: Path) -> dict[str, PTRPolicy]:
    """A policy per family that has taken a step, so that its queue holds something to compare with."""
    policies = {}
    for family in FAMILIES:
        policy = ptr_policy(family, points, num_belief_tokens=2, **SETTINGS)
        policy(train_batch(policy, points, [0, 12, 33, 60]))
        policy.update()
        policies[family] = policy
    return policies


@pytest.fixture(scope="module")
def scores(trained: dict[str, PTRPolicy], points: Path) -> ChunkScores:
    return score(trained["smolvla"], points)


def score(policy: PTRPolicy, points: Path, dataset: Any = None, **settings: Any) -> ChunkScores:
    settings = {"preprocessor": preprocessor_of(policy, points), "progress": False, **settings}
    return score_dataset(policy, points if dataset is None else dataset, **settings)


def test_every_chunk_is_scored_once(scores: ChunkScores) -> None:
    expected = [start + frame for start, length in zip(STARTS, LENGTHS, strict=True) for frame in range(0, length, 4)]
    assert scores.index.tolist() == expected
    episodes = np.searchsorted(STARTS, expected, side="right") - 1
    assert scores.episode_index.tolist() == episodes.tolist()
    assert scores.frame_index.tolist() == [
        index - STARTS[episode] for index, episode in zip(expected, episodes, strict=True)
    ]


def test_columns_say_what_was_recorded(scores: ChunkScores, points: Path) -> None:
    frames = frames_of(points)
    assert scores.task.tolist() == [frames[index]["task"] for index in scores.index]
    ends = [STARTS[episode] + LENGTHS[episode] for episode in scores.episode_index]
    assert scores.target_valid.tolist() == [index + 4 < end for index, end in zip(scores.index, ends, strict=True)]
    assert set(scores.source) == {points.name}
    assert np.isfinite(scores.loss).all()
    assert (scores.loss > 0).all()
    assert (scores.score[~scores.target_valid] == 0).all()
    assert (scores.weight[~scores.target_valid] == 1).all()
    assert scores.score[scores.target_valid].std() > 0
    assert scores.weight[scores.target_valid].std() > 0
    expected = np.clip(np.exp(scores.score / 1.5), 0.25, 4.0)
    np.testing.assert_allclose(scores.weight[scores.target_valid], expected[scores.target_valid], rtol=1e-5)


def test_the_seed_decides_everything(trained: dict[str, PTRPolicy], scores: ChunkScores, points: Path) -> None:
    torch.manual_seed(123)
    again = score(trained["smolvla"], points)
    for name in COLUMNS:
        np.testing.assert_array_equal(vars(again)[name], vars(scores)[name], err_msg=name)
    other = score(trained["smolvla"], points, seed=1)
    assert not np.array_equal(other.score, scores.score)
    np.testing.assert_array_equal(other.index, scores.index)


@pytest.mark.parametrize("training", [True, False])
def test_policy_and_random_stream_stay_as_they_were(
    trained: dict[str, PTRPolicy], points: Path, training: bool
) -> None:
    policy = trained["act"].train(training)
    before = copy.deepcopy(policy.state_dict())
    modes = [module.training for module in policy.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    score(policy, points)
    assert torch.equal(torch.rand(3), expected)
    assert tensors_equal(policy.state_dict(), before)
    assert [module.training for module in policy.modules()] == modes
    assert torch.is_grad_enabled()
    assert not policy.objective._step_samples, "nothing waits to be pushed to the queue"


def test_a_checkpoint_brings_its_preprocessor(
    trained: dict[str, PTRPolicy], scores: ChunkScores, points: Path, tmp_path: Path
) -> None:
    policy = trained["smolvla"]
    policy.save_pretrained(tmp_path)
    preprocessor, postprocessor = make_ptr_pre_post_processors(policy.config, stats_of(points))
    preprocessor.save_pretrained(tmp_path, config_filename="policy_preprocessor.json")
    postprocessor.save_pretrained(tmp_path, config_filename="policy_postprocessor.json")
    loaded = score_dataset(tmp_path, str(points), progress=False)
    for name in COLUMNS:
        np.testing.assert_array_equal(vars(loaded)[name], vars(scores)[name], err_msg=name)


def test_a_subset_of_episodes(trained: dict[str, PTRPolicy], points: Path) -> None:
    chosen = score(trained["smolvla"], points, episodes=[1, 3])
    assert chosen.index.tolist() == [*range(30, 54, 4), *range(94, 112, 4)]
    assert chosen.frame_index.tolist() == [*range(0, 24, 4), *range(0, 18, 4)]
    opened = LeRobotDataset("tests/points", root=points, episodes=[3])
    assert score(trained["smolvla"], points, opened).episode_index.tolist() == [3] * 5


def test_gaps_and_overlaps_keep_the_stride(points: Path) -> None:
    policy = ptr_policy("smolvla", points, num_belief_tokens=0, chunk_stride=7, **SETTINGS)
    assert score(policy, points, episodes=[0]).index.tolist() == [0, 7, 14, 21, 28]


def test_what_cannot_be_scored_is_refused(trained: dict[str, PTRPolicy], points: Path, short: Path) -> None:
    plain = ptr_policy("act", points, preset="sft")
    with pytest.raises(ValueError, match=r"no scorer \(preset='sft'\).*train with preset='ptr'"):
        score(plain, points)
    with pytest.raises(ValueError, match=r"Give the policy's preprocessor too \(trainer.preprocessor\)"):
        score_dataset(trained["act"], points)
    with pytest.raises(ValueError, match=r"sees the camera observation.image, which the dataset lacks"):
        score(trained["act"], points, short)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from demonstrations import write_dataset

    return write_dataset(tmp_path_factory.mktemp("datasets") / "states", (8, 6), cameras=())


class TestActionLoss:
    """The figure by which policies are compared: the same chunks and the same noise for each of them."""

    def loss(self, policy: PTRPolicy, points: Path, **settings: Any) -> float:
        return action_loss(policy, points, preprocessor_of(policy, points), **settings)

    @pytest.mark.parametrize("family", ["smolvla", pytest.param("act", marks=pytest.mark.full)])
    def test_noise_is_paired_across_configurations(self, points: Path, family: str) -> None:
        reference = ptr_policy(family, points, num_belief_tokens=0, **SETTINGS)
        layout = reference.config.layout
        others = [
            ptr_policy(family, points, preset="sft"),
            ptr_policy(family, points, seed=5, num_belief_tokens=0, **SETTINGS),
        ]
        expected = self.loss(reference, points, layout=layout, repeats=2)
        for other in others:
            assert self.loss(other, points, layout=layout, repeats=2) == pytest.approx(expected, rel=1e-5)

    def test_it_is_the_mean_over_chunks_that_begin_inside_their_episode(self, points: Path) -> None:
        policy = ptr_policy("act", points, preset="sft")
        layout = ptr_policy("act", points, num_belief_tokens=0, **SETTINGS).config.layout
        policy.eval()
        total, count = 0.0, 0
        for start, length in zip(STARTS, LENGTHS, strict=True):
            batch = train_batch(policy, points, range(start, start + length, 4))
            with torch.no_grad():
                losses = policy.adapter.trace(batch).loss
            total, count = total + float(losses.sum()), count + len(losses)
        assert self.loss(policy, points, layout=layout, repeats=1) == pytest.approx(total / count, rel=1e-5)

    @pytest.mark.full
    def test_seed_and_repeats(self, trained: dict[str, PTRPolicy], points: Path) -> None:
        policy = trained["smolvla"]
        losses = [self.loss(policy, points, repeats=1, seed=seed) for seed in (0, 0, 1)]
        assert losses[0] == losses[1] != losses[2]
        before = copy.deepcopy(policy.state_dict())
        self.loss(policy, points, repeats=1)
        assert tensors_equal(policy.state_dict(), before)


class TestLargePictures:
    def test_are_read_a_few_at_a_time(self) -> None:
        camera = {"dtype": "video", "shape": (480, 640, 3)}
        layout = SegmentLayout(None, (0, 1, 2, 3), 4, 4, 4)
        for cameras, expected in ((0, 16), (1, 3), (2, 1), (6, 1)):
            features = {
                "action": {"dtype": "float32", "shape": (2,)},
                **{str(place): camera for place in range(cameras)},
            }
            assert segments_at_once(features, layout, 16) == expected

    @pytest.mark.full
    @pytest.mark.parametrize("preset", ["ptr", "ptr_calibrated"])
    def test_which_changes_no_score(self, points: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
        policy = ptr_policy("act", points, preset=preset, **SETTINGS)
        policy.set_episodes(EpisodeTable.from_metadata(dataset_metadata(points), policy.config.standardize_by))
        policy(train_batch(policy, points, [0, 12, 33, 60]))
        policy.update()
        expected = score(policy, points, batch_size=8)
        held, read = [], policy.read
        monkeypatch.setattr(policy, "read", lambda segment: held.append(segment.batch_size) or read(segment))
        monkeypatch.setattr("ptr_hf.data.datasets.FRAMES_AT_ONCE", 120_000)
        pieces = score(policy, points, batch_size=8)
        assert (max(held), sum(held)) == (3, 15)
        for name in COLUMNS:
            np.testing.assert_allclose(vars(pieces)[name], vars(expected)[name], rtol=1e-4, atol=1e-6, err_msg=name)

    def test_the_bar_moves_by_chunk(
        self, trained: dict[str, PTRPolicy], points: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        score(trained["act"], points, progress=True)
        assert "29/29" in capfd.readouterr().err.split("scoring")[-1]


def test_episodes_are_of_a_single_dataset(trained: dict[str, PTRPolicy], points: Path) -> None:
    policy = trained["act"]
    memory = InMemorySegments(open_dataset(points, policy.config.layout), policy.config.layout)
    assert set(score(policy, points, memory, episodes=[1, 3]).episode_index) == {1, 3}
    with pytest.raises(ValueError, match="episodes is of a single dataset"):
        score(policy, points, [str(points)], episodes=[1])
