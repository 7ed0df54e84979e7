"""What an inspection sees where it is asked to look: features kept on disk, two questions, and what is refused."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demonstrations import write_dataset
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from small_policies import base_policy, ptr_policy, stats_of
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    Dinov2Config,
    PreTrainedConfig,
    ResNetConfig,
)

from episodes import Episode, write_demonstrations
from ptr_hf.cli.score import score
from ptr_hf.cli.score_options import parse
from ptr_hf.data.pictures import pictures
from ptr_hf.policies.tiny import tiny_smolvla, write_tiny_vlm
from ptr_hf.scoring import DatasetScores, image_features
from ptr_hf.scoring.completeness import Completeness
from ptr_hf.scoring.crossfit import CrossFit, FitSettings
from ptr_hf.scoring.image_constancy import ImageConstancy
from ptr_hf.scoring.image_encoders import THUMBNAILS, Thumbnails, TowerEncoder, image_encoder
from ptr_hf.scoring.image_features import looked_at
from ptr_hf.scoring.image_motion import ImageMotion
from ptr_hf.scoring.inspection import IMAGE_QUESTIONS, QUESTIONS, _chosen, inspect_dataset, trust_within
from ptr_hf.scoring.question import CannotAskError, Question
from ptr_hf.scoring.recordings import Recordings, read_recordings
from ptr_hf.scoring.seen import ImageFeatures, components, predicted
from ptr_hf.scoring.state_from_image import StateFromImage

BAD = 7
BESIDE_STATE = (StateFromImage, ImageMotion)
QUICK = [question.name for question in BESIDE_STATE]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features are kept in place of the Hugging Face cache."""
    folder = tmp_path / "kept"
    monkeypatch.setattr(image_features, "_folder", lambda: folder)
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short episodes with a camera as video."""
    return write_dataset(tmp_path_factory.mktemp("films") / "films", (14,) * 10, use_videos=True, vivid=True)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("films") / "blind", (12,) * 10, cameras=())


def inspected(source: Any, **options: Any) -> DatasetScores:
    return inspect_dataset(
        source, device="cpu", progress=False, **{"questions": QUICK, "policy": THUMBNAILS, **options}
    )


def seen(episodes: int = 24, frames: int = 40, per_episode: int = 20) -> Recordings:
    """A state that wanders, and pictures that are a linear function of it and of a little noise."""
    draws = np.random.default_rng(0)
    rows = np.arange(episodes * frames)
    state = draws.normal(size=(episodes, frames, 3)).cumsum(axis=1).reshape(-1, 3).astype(np.float32)
    recordings = Recordings(
        name="made",
        revision=None,
        state=state,
        action=np.zeros((len(rows), 1), np.float32),
        finite=np.ones(len(rows), bool),
        index=rows,
        frame=rows % frames,
        episode=rows // frames,
        timestamp=(rows % frames) / 10,
        episode_index=np.arange(episodes),
        length=np.full(episodes, frames),
        task=np.zeros(episodes, np.int64),
        instructions=("wander",),
        state_names=("a", "b", "c"),
        action_names=("d",),
        attributes={},
        fps=10.0,
    )
    looked = looked_at(recordings, per_episode)
    shown = state[looked] @ draws.normal(size=(3, 30)) + 0.05 * draws.normal(size=(len(looked), 30))
    return replace(recordings, images=ImageFeatures(looked, shown[:, None].astype(np.float32), ("front",), "made"))


def with_pictures(recordings: Recordings, values: np.ndarray) -> Recordings:
    assert recordings.images is not None
    return replace(recordings, images=replace(recordings.images, values=values))


def held(episodes: int = 24, looks: int = 16) -> Recordings:
    """A hand that closes halfway and goes on. From then on two pixels of three show what it holds, the other what it passes."""
    recordings = seen(episodes, looks, looks)
    draws = np.random.default_rng(2)
    closed = recordings.frame >= looks // 2
    small = draws.uniform(size=(len(closed), 1, 3, 3)).astype(np.float32)
    own = draws.uniform(size=(episodes, 1, 3, 2)).astype(np.float32)
    small[closed, :, :, :2] = own[recordings.episode[closed]] + draws.normal(0, 0.02, (closed.sum(), 1, 3, 2))
    assert recordings.images is not None
    images = replace(recordings.images, thumbnails=small)
    action = np.stack([draws.normal(size=len(closed)), np.where(closed, 1.0, -1.0)], axis=1).astype(np.float32)
    return replace(recordings, action=action, action_names=("d", "gripper"), images=images)


def lost(recordings: Recordings, look: int) -> Recordings:
    """The same where the hand of one episode is empty from this look on."""
    assert recordings.images is not None
    assert recordings.images.thumbnails is not None
    small = recordings.images.thumbnails.copy()
    empty = (recordings.episode == BAD) & (recordings.frame >= look)
    small[empty] = np.random.default_rng(3).uniform(size=small[empty].shape)
    return replace(recordings, images=replace(recordings.images, thumbnails=small))


def asked(question: Question, recordings: Recordings) -> np.ndarray:
    """(episodes,) scores, or of the lowest window for questions that judge frames."""
    fit = CrossFit(recordings, FitSettings(progress=False, steps=5, stages=2))
    answer = question.ask(fit, trust_within(recordings.task))
    if answer.frames is None:
        assert answer.episodes is not None
        return answer.episodes
    return answer.level(recordings.means(answer.frames))[:, 0]


class TestQuestions:
    def test_pictures_of_another_episode(self) -> None:
        recordings = seen()
        assert recordings.images is not None
        own = recordings.episode[recordings.images.rows]
        values = recordings.images.values.copy()
        values[own == BAD] = values[own == BAD + 1]
        scores = asked(StateFromImage(), with_pictures(recordings, values))
        assert scores.argmin() == BAD
        assert scores[BAD] < np.delete(scores, BAD).min() - 1

    def test_pictures_that_stand_still(self) -> None:
        recordings = seen()
        assert recordings.images is not None
        own = np.flatnonzero(recordings.episode[recordings.images.rows] == BAD)
        values = recordings.images.values.copy()
        values[own[5:12]] = values[own[5]]
        scores = asked(ImageMotion(), with_pictures(recordings, values))
        assert scores.argmin() == BAD
        assert scores[BAD] < np.delete(scores, BAD).min() - 0.25

    @pytest.mark.parametrize("look", [8, 10, 13])
    def test_what_is_held_is_lost(self, look: int) -> None:
        scores = asked(ImageConstancy(), lost(held(), look))
        assert scores.argmin() == BAD
        assert scores[BAD] < np.delete(scores, BAD).min() - 0.1

    def test_only_the_time_and_the_place_at_which_others_stay_count(self) -> None:
        recordings = held()
        frames = (
            ImageConstancy()
            .ask(CrossFit(recordings, FitSettings(progress=False)), trust_within(recordings.task))
            .frames
        )
        assert frames is not None
        assert (recordings.action[np.isfinite(frames[:, 0]), 1] == 1).all()
        assert asked(ImageConstancy(), lost(recordings, 15)).argmin() == BAD, "the last change counts"
        assert recordings.images is not None
        assert recordings.images.thumbnails is not None
        small = recordings.images.thumbnails.copy()
        small[(recordings.episode == BAD) & (recordings.frame < 8)] = 0.5
        beside = replace(recordings, images=replace(recordings.images, thumbnails=small))
        np.testing.assert_allclose(
            asked(ImageConstancy(), beside), asked(ImageConstancy(), recordings), atol=0.02, err_msg="an open hand"
        )

    def test_without_a_gripper_or_without_anything_that_stays_it_says_so(self) -> None:
        recordings = held()
        with pytest.raises(CannotAskError, match="no action has two values"):
            asked(ImageConstancy(), replace(recordings, action=recordings.action[:, :1]))
        assert recordings.images is not None
        noise = np.random.default_rng(4).uniform(size=(len(recordings), 1, 3, 3)).astype(np.float32)
        assert recordings.images.thumbnails is not None
        passed = np.concatenate(
            [recordings.images.thumbnails, np.full((len(recordings), 1, 3, 9), 0.5, np.float32)], axis=3
        )
        for other in (noise, passed):  # nothing stays; most stands still, as before a fixed camera
            with pytest.raises(
                CannotAskError, match="no camera moves along, or nothing in its pictures stays the same"
            ):
                asked(ImageConstancy(), replace(recordings, images=replace(recordings.images, thumbnails=other)))
        with pytest.raises(CannotAskError, match="no picture was looked at"):
            asked(ImageConstancy(), seen())

    def test_frames_that_nobody_looked_at_are_not_scored(self) -> None:
        recordings = seen()
        assert recordings.images is not None
        fit = CrossFit(recordings, FitSettings(progress=False))
        for question in BESIDE_STATE:
            frames = question().ask(fit, trust_within(recordings.task)).frames
            assert frames is not None
            assert np.flatnonzero(np.isfinite(frames[:, 0])).tolist() == recordings.images.rows.tolist()

    def test_pictures_that_cannot_be_read_are_not_scored(self) -> None:
        recordings = seen()
        assert recordings.images is not None
        own = recordings.episode[recordings.images.rows] == BAD
        values = np.where(own[:, None, None], np.nan, recordings.images.values)
        for question in BESIDE_STATE:
            scores = asked(question(), with_pictures(recordings, values))
            assert np.flatnonzero(np.isnan(scores)).tolist() == [BAD]
        recordings = held()
        assert recordings.images is not None
        assert recordings.images.thumbnails is not None
        small = recordings.images.thumbnails.copy()
        small[recordings.episode == BAD] = np.nan
        unread = replace(recordings, images=replace(recordings.images, thumbnails=small))
        assert np.flatnonzero(np.isnan(asked(ImageConstancy(), unread))).tolist() == [BAD]

    def test_a_last_picture_from_the_middle(self) -> None:
        recordings = seen()
        assert recordings.images is not None
        rows = recordings.images.rows
        share = (recordings.frame / 39)[rows]
        values = np.random.default_rng(1).normal(size=(len(rows), 1, 8)) * 0.1
        values[:, 0, 0] += share
        own = recordings.episode[rows] == BAD
        values[own, 0, 0] *= 0.5
        scores = asked(Completeness(), with_pictures(recordings, values.astype(np.float32)))
        assert scores.shape == (24, 3)
        assert scores[:, 2].argmin() == BAD

    def test_without_a_state_they_say_so(self) -> None:
        recordings = held()
        recordings = replace(recordings, state=np.zeros((len(recordings), 0), np.float32))
        for question in IMAGE_QUESTIONS:
            with pytest.raises(CannotAskError, match=r"no proprioception|or there is none"):
                asked(question(), recordings)

    def test_reasons_name_the_camera(self) -> None:
        assert StateFromImage().reason(("wrist",)) == (
            "the pictures of wrist do not show the robot where its state says it is"
        )
        assert ImageMotion().reason(()) == "the pictures stand still while the robot moves"
        assert ImageConstancy().reason(("wrist",)) == (
            "what stays the same in the pictures of wrist of other episodes changes: what is held may be lost"
        )


def test_components_by_hand() -> None:
    """Along (3, 4) the deviation is 1 after division; the direction in which nothing changes is left out."""
    along = np.array([-1.0, 1.0, -1.0, 1.0])[:, None] * np.array([3.0, 4.0])
    found = components(along.astype(np.float32))
    assert found.shape == (4, 1)
    assert np.abs(found[:, 0]) == pytest.approx(np.ones(4))


def test_a_ridge_never_learns_from_what_it_judges() -> None:
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    fold = np.repeat([0, 1], 20)
    told = predicted(inputs, np.where(fold == 0, 5.0, -1.0)[:, None], fold, np.ones(40))
    assert told[fold == 0].mean() == pytest.approx(-1, abs=0.2)
    assert told[fold == 1].mean() == pytest.approx(5, abs=0.2)


@pytest.mark.full
def test_a_grasp_that_slips_is_found_in_a_dataset(tmp_path: Path) -> None:
    """A hand's own camera sees the table pass by, and between the fingers, once they are closed, what they hold."""
    draws = np.random.default_rng(0)
    episodes = []
    for number in range(16):
        way = np.cumsum(draws.uniform(0.5, 1.5, 40))
        table = draws.integers(0, 256, (16, 96, 3)).astype(np.uint8).repeat(2, axis=0)
        closed = np.arange(40) >= 20
        wrist = np.stack([table[:, int(x) : int(x) + 32] for x in way])
        wrist[closed & ~((number == BAD) & (np.arange(40) >= 26)), 16:, 8:24] = (200, 40, 40)
        action = np.stack([np.gradient(way), np.where(closed, 1.0, -1.0)], axis=1).astype(np.float32)
        streams = {"observation.state": way[:, None].astype(np.float32), "action": action}
        episodes.append(Episode({**streams, "observation.images.wrist": wrist}, "carry it"))
    write_demonstrations(tmp_path / "carried", episodes, 20)
    found = inspected(tmp_path / "carried", questions=["image_constancy"])
    assert found.flagged["episode_index"].tolist() == [BAD]
    assert (
        found.flagged["reason"]
        .item()
        .startswith("what stays the same in the pictures of wrist of other episodes changes: what is held may be lost")
    )


class TestKeptFeatures:
    def test_a_second_inspection_decodes_nothing(
        self, films: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = inspected(films)
        (file,) = kept.iterdir()
        assert file.suffix == ".safetensors"
        monkeypatch.setattr(image_features, "pictures", lambda *_: pytest.fail("a picture was decoded"))
        again = inspected(films)
        assert again.chunks.equals(first.chunks)
        assert again.episodes.equals(first.episodes)
        with pytest.raises(pytest.fail.Exception, match="decoded"):
            inspected(films, images_per_episode=5)

    @pytest.mark.full
    def test_thumbnails_are_there_whatever_the_encoder_is(self, films: Path) -> None:
        recordings = read_recordings(str(films))
        tower = image_encoder(base_policy("act", films), "cpu")
        found = [
            image_features.read_image_features(str(films), recordings, encoder, per_episode=4, progress=False)
            for encoder in (Thumbnails(), tower, tower)
        ]
        small = found[0].thumbnails
        assert small is not None
        assert small.shape == (40, 1, 3, 256)
        np.testing.assert_array_equal(found[0].values.reshape(small.shape), small)
        for one in found[1:]:  # made, and kept
            assert one.values.shape == (40, 1, tower.width)
            np.testing.assert_array_equal(one.thumbnails, small)

    @pytest.mark.full
    def test_a_damaged_file_is_made_anew(self, films: Path, kept: Path) -> None:
        first = inspected(films)
        (file,) = kept.iterdir()
        file.write_bytes(b"no tensors")
        assert inspected(films).chunks.equals(first.chunks)

    @pytest.mark.full
    def test_other_videos_are_others(self, films: Path, kept: Path, tmp_path: Path) -> None:
        copy = write_dataset(tmp_path / "films", (14,) * 10, use_videos=True)
        inspected(films)
        inspected(copy)
        assert len(list(kept.iterdir())) == 2

    @pytest.mark.full
    def test_a_video_that_cannot_be_read(
        self, films: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(dataset: Any, camera: str, episode: int, rows: Sequence[int]) -> np.ndarray:
            if episode == 3:
                raise RuntimeError("no stream")
            return pictures(dataset, camera, episode, rows)

        monkeypatch.setattr(image_features, "pictures", broken)
        found = inspected(films)
        assert "of observation.image in episode 3 cannot be read: no stream" in caplog.text
        assert found.episodes.loc[3, QUICK].tolist() == [found.episodes[name].max() for name in QUICK]
        assert found.episodes.loc[3, "weight"] == 1


class TestNothingChangesWithoutThem:
    def test_questions_and_settings(self, films: Path) -> None:
        names = tuple(question.name for question in QUESTIONS)
        assert tuple(question.name for question in _chosen(None, looks=False)) == names
        assert tuple(question.name for question in _chosen(None, looks=True)) == (*names, *QUICK, "image_constancy")
        found = inspected(films, policy=None, questions=["roughness"])
        assert found.questions == ("roughness",)
        assert "images" not in found.settings

    @pytest.mark.full
    def test_other_questions_say_the_same(self, films: Path) -> None:
        names = ["roughness", "jumps", "idleness"]
        without = inspected(films, policy=None, questions=names)
        looking = inspected(films, questions=[*names, *QUICK])
        assert looking.settings["images"] == {"encoder": "thumbnails", "per_episode": 32}
        for name in names:
            assert looking.episodes[name].equals(without.episodes[name])


class TestTowers:
    @pytest.mark.full
    @pytest.mark.parametrize("family", ["act", "smolvla"])
    def test_a_loaded_policy_stays_as_it_is(self, family: str, films: Path) -> None:
        policy = base_policy(family, films).train()
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
        encoder = image_encoder(policy, "cpu")
        vectors = encoder.encode("observation.image", 0, images)
        assert vectors.shape == (3, encoder.width)
        assert np.ptp(vectors, axis=0).max() > 0
        assert policy.training
        assert all((policy.state_dict()[name] == value).all() for name, value in before.items())
        assert encoder.digest == image_encoder(policy, "cpu").digest
        next(
            value for name, value in policy.named_parameters() if "patch_embedding" in name or "conv1" in name
        ).data += 1
        assert encoder.digest != image_encoder(policy, "cpu").digest

    @pytest.mark.full
    def test_a_saved_policy_prepares_pictures_as_it_was_saved(self, films: Path, tmp_path: Path) -> None:
        policy = base_policy("act", films)
        policy.save_pretrained(tmp_path / "policy")
        images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        usual = image_encoder(tmp_path / "policy", "cpu")
        np.testing.assert_array_equal(
            usual.encode("observation.image", 0, images),
            image_encoder(policy, "cpu").encode("observation.image", 0, images),
        )
        preprocessor, postprocessor = make_pre_post_processors(policy.config, dataset_stats=stats_of(films))
        preprocessor.save_pretrained(tmp_path / "policy")
        postprocessor.save_pretrained(tmp_path / "policy")
        own = image_encoder(str(tmp_path / "policy"), "cpu")
        assert own.digest != usual.digest
        found = inspected(films, policy=str(tmp_path / "policy"), questions=["state_from_image"])
        assert found.settings["images"]["encoder"] == str(tmp_path / "policy")
        assert found.episodes["state_from_image"].notna().all()

    def test_a_ptr_policy_is_its_base(self, films: Path) -> None:
        policy = ptr_policy("act", films, num_belief_tokens=0)
        assert image_encoder(policy, "cpu").digest == image_encoder(policy.base, "cpu").digest

    def test_a_camera_that_the_policy_does_not_know(self, films: Path, caplog: pytest.LogCaptureFixture) -> None:
        encoder = image_encoder(base_policy("act", films), "cpu")
        images = np.zeros((1, 3, 32, 32), np.uint8)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                encoder.encode("observation.images.top", 0, images)
        assert caplog.text.count("has no camera observation.images.top; its pictures go through the tower as") == 1

    @pytest.mark.full
    def test_a_policy_that_sees_nothing(self, films: Path, blind: Path, tmp_path: Path) -> None:
        vlm = write_tiny_vlm(tmp_path / "vlm", text_dim=64, text_layers=2)
        policy = tiny_smolvla(LeRobotDatasetMetadata("tests/points", root=blind).features, vlm)
        with pytest.raises(ValueError, match="The smolvla_state policy SmolVLAStatePolicy sees no pictures"):
            inspected(films, policy=policy)

    def test_wide_tokens_are_projected(self, films: Path) -> None:
        encoder = image_encoder(base_policy("act", films), "cpu")
        assert isinstance(encoder, TowerEncoder)
        assert encoder.width == 768


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VISION_MODELS = {
    "dinov2": Dinov2Config(**SMALL),
    "clip": CLIPConfig(
        vision_config=SMALL | {"intermediate_size": 48},
        text_config={"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 64], depths=[1, 1], layer_type="basic"),
}


class TestVisionModels:
    """Models of transformers as they come from the Hub, from a folder and with random weights."""

    @pytest.mark.full
    @pytest.mark.parametrize("family", VISION_MODELS)
    def test_one_is_named(self, family: str, films: Path, tmp_path: Path) -> None:
        config: PreTrainedConfig = VISION_MODELS[family]
        AutoModel.from_config(config).save_pretrained(tmp_path)
        processor = CLIPImageProcessor if family == "clip" else BitImageProcessor
        processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        encoder = image_encoder(f"transformers:{tmp_path}", "cpu")
        images = np.zeros((2, 3, 40, 40), np.uint8)
        images[1, :, :20, :20] = 255
        vectors = encoder.encode("observation.image", 0, images)
        assert vectors.shape == (2, encoder.width)
        assert encoder.width == min(16 * (64 if family == "resnet" else 24), 768)
        apart = np.abs(vectors[1] - vectors[0])
        assert apart.max() > 0
        if encoder.width == 16 * 24:  # not projected: a cell's numbers are every sixteenth
            assert apart.reshape(24, 16).sum(axis=0).argmax() in (0, 1, 4, 5), "cells lie where the picture has changed"
        assert encoder.digest == image_encoder(f"transformers:{tmp_path}", "cpu").digest
        found = inspected(films, policy=f"transformers:{tmp_path}", questions=["state_from_image"])
        assert found.settings["images"]["encoder"] == f"transformers:{tmp_path}"
        assert found.episodes["state_from_image"].notna().all()

    @pytest.mark.full
    def test_pickled_weights_and_code_of_a_repo_are_refused(self, tmp_path: Path) -> None:
        model = AutoModel.from_config(VISION_MODELS["dinov2"])
        model.config.save_pretrained(tmp_path)
        BitImageProcessor().save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"cannot look at pictures: .*safetensors"):
            image_encoder(f"transformers:{tmp_path}", "cpu")
        content = {"model_type": "own", "auto_map": {"AutoModel": "own.Own", "AutoConfig": "own.OwnConfig"}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "own.py").write_text("raise SystemExit('code of the repo has run')")
        with pytest.raises(ValueError, match=r"cannot look at pictures: .*code of its own, which is never run"):
            image_encoder(f"transformers:{tmp_path}", "cpu")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images_per_episode": 1}, "images_per_episode=1 is out of range"),
        ({"policy": "transformers:"}, "transformers: cannot look at pictures"),
        ({"policy": "transformers:no/such/folder"}, "transformers:no/such/folder cannot look at pictures"),
        ({"policy": None}, "The question 'state_from_image' is about pictures: give a policy"),
        ({"policy": 3}, "a loaded policy or 'thumbnails', not a int"),
    ],
)
def test_options_that_cannot_be(films: Path, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        inspected(films, **options)


def test_a_dataset_without_cameras(blind: Path) -> None:
    with pytest.raises(ValueError, match="blind has no camera, so there are no pictures to look at: leave policy out"):
        inspected(blind)


def test_frames_are_spread_evenly(films: Path) -> None:
    recordings = read_recordings(str(films))
    assert (recordings.frame[looked_at(recordings, 3)].reshape(10, 3) == [0, 6, 13]).all()
    assert len(looked_at(recordings, 99)) == len(recordings)


def test_the_command(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", str(films), "--output_dir", str(tmp_path / "out"), "--no-page", "--policy", "thumbnails"]
    assert score(parse([*options, "--images_per_episode", "8", "--questions", "image_motion"])) == 0
    assert "1 camera with 8 pictures an episode" in " ".join(capsys.readouterr().out.split())
    settings = json.loads((tmp_path / "out" / "ptr_scores.json").read_text())
    assert settings["images"] == {"encoder": "thumbnails", "per_episode": 8}
