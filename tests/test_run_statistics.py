"""Which statistics a run and a score normalise by, from every kind of data and policy."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bad_frames import arguments as arguments_of
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import make_pre_post_processors
from small_policies import base_policy, ptr_policy, save_alone, stats_of

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.policies.tiny import tiny_act
from ptr_hf.processor_ptr import make_ptr_pre_post_processors

RENAMES = {"observation.joints": "observation.state", "observation.images.top": "observation.image"}
POINT = {
    "action": ["right_ee_delta_x", "right_ee_delta_y"],
    "state": ["right_ee_x", "right_ee_y", "environment_1", "environment_2"],
}


def arguments(folder: Path, **settings: Any) -> PTRTrainingArguments:
    return arguments_of(folder, preset="sft", **settings)


def rewritten(
    root: Path, folder: Path, scale: float = 1.0, renames: dict[str, str] | None = None, statistics: bool = True
) -> Path:
    """A copy of a dataset with other numbers, names, or without statistics."""
    shutil.copytree(root, folder)
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file).to_pandas()
    stats = json.loads((folder / "meta" / "stats.json").read_text())
    for key in ("observation.state", "action"):
        table[key] = [np.asarray(value, dtype=np.float32) * scale + 5 * (scale - 1) for value in table[key]]
        for name, value in stats[key].items():
            shift = 0 if name == "std" else 5 * (scale - 1)
            stats[key][name] = value if name == "count" else [number * scale + shift for number in value]
    names = renames or {}
    schema = pq.read_schema(file)
    renamed = pa.Table.from_pandas(table, schema=schema.remove_metadata(), preserve_index=False)
    renamed = renamed.rename_columns([names.get(name, name) for name in renamed.column_names])
    pq.write_table(renamed, file)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"] = {names.get(key, key): feature for key, feature in info["features"].items()}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "stats.json").write_text(
        json.dumps({names.get(key, key): value for key, value in stats.items()})
    )
    if not statistics:
        (folder / "meta" / "stats.json").unlink()
    return folder


def batch_of(trainer: PTRTrainer) -> dict[str, Any]:
    """All segments of the data, as the policy gets them."""
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[place] for place in range(0, 112, 3)]))


def seen(trainer: PTRTrainer) -> tuple[float, float]:
    """Mean and deviation of the actions as the policy gets them."""
    batch = batch_of(trainer)
    values = batch["action"][~batch["action_is_pad"]]
    return values.mean().item(), values.std(dim=0).mean().item()


@pytest.fixture(scope="module")
def usual(points: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """What `seen` gives where a dataset is normalised by its own statistics."""
    folder = tmp_path_factory.mktemp("statistics") / "usual"
    found = seen(PTRTrainer(base_policy("act", points), arguments(folder), points))
    assert found == pytest.approx((0.0, 0.85), abs=0.1), "the mean of segments weighs frames otherwise"
    return found


@pytest.fixture(scope="module")
def scaled(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(points, tmp_path_factory.mktemp("statistics") / "scaled", 20.0)


@pytest.fixture(scope="module")
def bare(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(points, tmp_path_factory.mktemp("statistics") / "bare", 20.0, statistics=False)


@pytest.fixture(scope="module")
def checkpoint(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a policy that was trained on `points`."""
    folder = tmp_path_factory.mktemp("statistics") / "run"
    trainer = PTRTrainer(
        base_policy("act", points), arguments(folder, max_steps=1, save_steps=1, save_strategy="steps"), points
    )
    trainer.train()
    save_alone(trainer)
    return folder


class TestOneDataset:
    @pytest.mark.full
    def test_renamed_features_have_their_statistics(self, points: Path, tmp_path: Path) -> None:
        back = {name: key for key, name in RENAMES.items()}
        root = rewritten(points, tmp_path / "renamed", 1000.0, back)
        args = arguments(tmp_path / "run", rename_map=RENAMES)
        trainer = PTRTrainer(base_policy("act", points), args, root)
        plain = PTRTrainer(base_policy("act", points), arguments(tmp_path / "plain"), points)
        mine, other = batch_of(trainer), batch_of(plain)
        assert torch.allclose(mine["observation.state"], other["observation.state"], atol=1e-2)
        assert torch.allclose(mine["observation.image"], other["observation.image"])
        small = {"chunk_size": 4, "n_action_steps": 4, "dim_model": 32, "pretrained_backbone_weights": None}
        fresh = PTRTrainer(ACTConfig(**small), args, root)
        assert set(fresh.policy.config.input_features) == {"observation.state", "observation.image"}

    @pytest.mark.full
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_without_statistics_they_are_computed(
        self, points: Path, bare: Path, usual: Any, tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = PTRTrainer(base_policy("act", points), arguments(tmp_path, in_memory=in_memory), bare)
        assert seen(trainer) == pytest.approx(usual, abs=0.01)
        assert caplog.text.count("are missing") == 3

    def test_a_preprocessor_that_somebody_gives_has_to_have_them(self, points: Path, tmp_path: Path) -> None:
        base = base_policy("act", points)
        bad, _ = make_pre_post_processors(base.config, dataset_stats={"action": stats_of(points)["action"]})
        with pytest.raises(
            ValueError,
            match=r"normalises 'observation.(image|state)' by MEAN_STD, and its statistics of it are missing",
        ):
            PTRTrainer(base, arguments(tmp_path), points, preprocessor=bad)
        good, _ = make_pre_post_processors(base.config, dataset_stats=stats_of(points))
        good.name = "mine"
        trainer = PTRTrainer(base, arguments(tmp_path), points, preprocessor=good)
        assert trainer.preprocessor.name == "mine", "also where the postprocessor is left to the trainer"
        with pytest.raises(ValueError, match=r"rename_map=.* was given beside a preprocessor"):
            PTRTrainer(base, arguments(tmp_path, rename_map=RENAMES), points, preprocessor=good)

    def test_lerobot_train_is_told_that_there_are_none(self, points: Path, bare: Path) -> None:
        policy = base_policy("act", points)
        config = PTRConfig(base={"type": "act", "chunk_size": 4, "n_action_steps": 4}, device="cpu")
        config.input_features, config.output_features = policy.config.input_features, policy.config.output_features
        with pytest.raises(ValueError, match=r"are missing: write them by `lerobot-edit-dataset"):
            PTRPolicy(config, dataset_meta=LeRobotDatasetMetadata("tests/points", root=bare))

    def test_rename_map_that_is_no_json_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"rename_map='top=camera1' is no mapping"):
            arguments(tmp_path, rename_map="top=camera1")

    def test_what_does_not_fit_is_refused_before_the_data_are_opened(self, points: Path, tmp_path: Path) -> None:
        base = base_policy("act", points)
        base.save_pretrained(tmp_path / "act")
        for processor in make_pre_post_processors(base.config, dataset_stats=stats_of(points)):
            processor.save_pretrained(tmp_path / "act")
        root = shutil.copytree(points, tmp_path / "wide")
        info = json.loads((root / "meta" / "info.json").read_text())
        info["features"]["action"]["shape"] = [6]
        (root / "meta" / "info.json").write_text(json.dumps(info))
        for model in (base, tmp_path / "act"):
            with pytest.raises(ValueError, match=r"'action' of .* has 6 dimensions, and the act policy is made for 2"):
                PTRTrainer(model, arguments(tmp_path / "run"), root)
        with pytest.raises(ValueError, match=r"no 'observation.imag'.*did you mean 'observation.image'"):
            PTRTrainer(base, arguments(tmp_path / "run", rename_map={"observation.imag": "observation.image"}), points)


class TestGoingOnFromACheckpoint:
    @pytest.mark.full
    def test_the_same_data_say_nothing(
        self, points: Path, checkpoint: Path, usual: Any, tmp_path: Path, caplog: Any
    ) -> None:
        trainer = PTRTrainer(checkpoint, arguments(tmp_path), points)
        assert seen(trainer) == pytest.approx(usual, abs=0.01)
        assert "other statistics" not in caplog.text

    @pytest.mark.full
    def test_other_data_bring_theirs_unless_the_policys_are_asked_for(
        self, checkpoint: Path, scaled: Path, usual: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = PTRTrainer(checkpoint, arguments(tmp_path), scaled)
        assert seen(trainer) == pytest.approx(usual, abs=0.01)
        assert "was trained with other statistics of action, observation.state" in caplog.text
        assert "statistics='policy' keeps the policy's" in caplog.text
        back = trainer.postprocessor(torch.zeros(1, 2))
        assert torch.allclose(back, torch.from_numpy(trainer.train_dataset.meta.stats["action"]["mean"]).float()[None])
        kept = PTRTrainer(checkpoint, arguments(tmp_path, statistics="policy"), scaled)
        assert seen(kept)[1] == pytest.approx(20 * usual[1], rel=0.01)
        assert "lies far outside of what the policy was trained on" in caplog.text

    @pytest.mark.full
    def test_a_resumed_run_keeps_its_own(
        self, points: Path, checkpoint: Path, usual: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The file was renewed between the two halves of the run."""
        root = shutil.copytree(points, tmp_path / "points")
        statistics = json.loads((root / "meta" / "stats.json").read_text())
        statistics["action"]["std"] = [2 * value for value in statistics["action"]["std"]]
        (root / "meta" / "stats.json").write_text(json.dumps(statistics))
        trainer = PTRTrainer(base_policy("act", points), arguments(tmp_path / "run", max_steps=2), root)
        assert seen(trainer)[1] == pytest.approx(usual[1] / 2, abs=0.01)
        trainer.train(resume_from_checkpoint=str(checkpoint / "checkpoint-1"))
        assert seen(trainer)[1] == pytest.approx(usual[1], abs=0.01)
        assert "The run keeps the statistics of" in caplog.text

    @pytest.mark.full
    def test_the_checkpoints_renames_are_kept(self, points: Path, tmp_path: Path) -> None:
        back = {name: key for key, name in RENAMES.items()}
        root = rewritten(points, tmp_path / "renamed", 1.0, back)
        first = PTRTrainer(base_policy("act", points), arguments(tmp_path / "run", rename_map=RENAMES), root)
        first.save_model()
        again = PTRTrainer(tmp_path / "run", arguments(tmp_path / "again"), root)
        assert torch.equal(batch_of(again)["observation.state"], batch_of(first)["observation.state"])
        plain = PTRTrainer(tmp_path / "run", arguments(tmp_path / "plain"), points)
        assert torch.allclose(batch_of(plain)["observation.state"], batch_of(first)["observation.state"])


class TestOtherPaths:
    @pytest.mark.full
    def test_scores_keep_the_checkpoints_and_say_where_the_data_are_elsewhere(
        self, points: Path, scaled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        policy = ptr_policy("act", points, segment_length=2)
        preprocessor, _ = make_ptr_pre_post_processors(policy.config, stats_of(points))
        score_dataset(policy, points, preprocessor=preprocessor, progress=False)
        assert "far outside" not in caplog.text
        score_dataset(policy, scaled, preprocessor=preprocessor, episodes=[1], progress=False)
        assert "action of" in caplog.text
        assert "lies far outside of what the policy was trained on (dimension" in caplog.text
        bare, _ = make_ptr_pre_post_processors(policy.config, {"action": stats_of(points)["action"]})
        with pytest.raises(ValueError, match=r"normalises '.*' by MEAN_STD, and its statistics of it are missing"):
            score_dataset(policy, points, preprocessor=bare, progress=False)
        back = {name: key for key, name in RENAMES.items()}
        renamed = rewritten(points, tmp_path / "renamed", 1.0, back)
        scores = score_dataset(
            policy, renamed, preprocessor=preprocessor, rename_map=RENAMES, episodes=[1], progress=False
        )
        same = score_dataset(policy, points, preprocessor=preprocessor, episodes=[1], progress=False)
        assert np.allclose(scores.score, same.score, equal_nan=True)
        with pytest.raises(ValueError, match=r"rename_map maps 'observation.jonts'.*did you mean"):
            score_dataset(
                policy, renamed, preprocessor=preprocessor, rename_map={"observation.jonts": "observation.state"}
            )

    @pytest.mark.full
    def test_a_mixtures_sources_each_have_their_own(
        self, sources: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        content = {"sources": sources, "action_space": "compact"}
        policy = tiny_act(MixtureMetadata.read(MixtureConfig.from_dict(content)).features, chunk_size=4, dim_model=32)
        for settings, why in (
            ({"streaming": True}, r"are missing: write them by"),
            (
                {"sources": [{**sources[0], "rename": {"observation.image": "observation.images.front"}}, sources[1]]},
                r"rename of the source a maps .* which the policy does not read",
            ),
            (
                {"sources": [{**sources[0], "rename": {"observation.images.front": "observation.image"}}, sources[1]]},
                r"goes from the dataset's name to the policy's",
            ),
        ):
            with pytest.raises(ValueError, match=why):
                PTRTrainer(policy, arguments(tmp_path), {**content, **settings})
        trainer = PTRTrainer(policy, arguments(tmp_path), content)
        assert caplog.text.count("are missing") == 3
        scale = trainer.preprocessor.steps[0].statistics["action.scale"]
        assert torch.allclose(scale[1], 20 * scale[0], rtol=1e-2)

    @pytest.mark.full
    def test_a_mixtures_checkpoint_goes_on_with_the_statistics_of_the_data(
        self, sources: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        content = {"sources": sources, "action_space": "compact"}
        policy = tiny_act(MixtureMetadata.read(MixtureConfig.from_dict(content)).features, chunk_size=4, dim_model=32)
        PTRTrainer(policy, arguments(tmp_path / "run"), content).save_model()
        again = PTRTrainer(tmp_path / "run", arguments(tmp_path / "again"), content)
        assert "was trained with other statistics" not in caplog.text
        swapped = {**content, "sources": [{**sources[0], "dataset": sources[1]["dataset"]}, sources[1]]}
        other = PTRTrainer(tmp_path / "run", arguments(tmp_path / "again"), swapped)
        assert "was trained with other statistics of action" in caplog.text
        scales = other.preprocessor.steps[0].statistics["action.scale"]
        assert torch.equal(scales[0], scales[1])
        assert torch.equal(other.postprocessor.steps[-1].statistics["action.scale"], scales)
        assert not torch.equal(again.preprocessor.steps[0].statistics["action.scale"], scales)


@pytest.fixture
def sources(points: Path, bare: Path) -> list[dict[str, Any]]:
    """One with statistics, one without."""
    return [{"dataset": str(root), "name": name, "embodiment": POINT} for root, name in ((points, "a"), (bare, "b"))]
