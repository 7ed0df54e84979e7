"""Two robots in one run: from the command to the checkpoint that runs on either."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from demonstrations import write_dataset
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from small_policies import CHUNK, save_alone, vlm_folder

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.constants import ACTION_DIM_PAD
from ptr_hf.data.demonstrations import bundled_demonstrations
from ptr_hf.data.mixture.action_space import ActionSpace
from ptr_hf.data.mixture.config import MixtureConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.processor import embodiment_steps
from ptr_hf.data.mixture.statistics import mixture_statistics
from ptr_hf.policies.tiny import tiny_act, tiny_smolvla
from ptr_hf.processor_ptr import make_ptr_pre_post_processors, preprocess
from ptr_hf.publishing.card_facts import BasePolicy, CardFacts
from ptr_hf.scoring import action_loss, action_loss_by_source

POINT = {
    "action": ["right_ee_delta_x", "right_ee_delta_y"],
    "state": ["right_ee_x", "right_ee_y", "environment_1", "environment_2"],
}
ARM = {"dataset": str(bundled_demonstrations("heldout")), "embodiment": "metaworld", "name": "arm", "episodes": [0, 1]}
ARM_STATE = torch.tensor([0.1, 0.5, 0.2, 1.0])


@pytest.fixture
def content(points: Path) -> dict[str, Any]:
    return {
        "sources": [{"dataset": str(points), "embodiment": POINT, "name": "points"}, ARM],
        "shares": "temperature",
        "temperature": 3.0,
    }


def arguments(folder: Path, **settings: Any) -> PTRTrainingArguments:
    defaults = {
        "preset": "ptr",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_belief_tokens": 0,
        "segment_length": 2,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return PTRTrainingArguments(output_dir=str(folder), **defaults | settings)


def small_policy(family: str, meta: MixtureMetadata) -> Any:
    if family == "act":
        return tiny_act(meta.features, chunk_size=CHUNK, dim_model=32)
    widths = {"max_action_dim": len(meta.space), "max_state_dim": len(meta.state_space)}
    return tiny_smolvla(meta.features, vlm_folder(), chunk_size=CHUNK, num_steps=2, **widths)


def trained(content: dict[str, Any], folder: Path, family: str = "act", **settings: Any) -> PTRTrainer:
    meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
    trainer = PTRTrainer(small_policy(family, meta), arguments(folder, **settings), content)
    trainer.train()
    return trainer


class TestLoss:
    """A source's samples, normalised and traced, do not know who else is in the mixture."""

    @pytest.mark.parametrize("family", [pytest.param("act", marks=pytest.mark.full), "smolvla"])
    def test_of_one_source_is_bit_equal_alone_and_in_the_mixture(self, content: dict[str, Any], family: str) -> None:
        losses = {}
        for name, sources in (("together", content["sources"]), ("alone", content["sources"][:1])):
            meta = MixtureMetadata.read(MixtureConfig.from_dict({"sources": sources, "image_size": [32, 32]}))
            config = PTRConfig(device="cpu", preset="ptr", num_belief_tokens=0, segment_length=2)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                policy = PTRPolicy(config, base_policy=small_policy(family, meta)).train()
            mixture = Mixture(meta, policy.config.layout)
            statistics = mixture_statistics(meta, policy.config.normalization_mapping, mixture.datasets)
            preprocessor, _ = make_ptr_pre_post_processors(
                policy.config, embodiments=embodiment_steps(meta, statistics)
            )
            # the same rows, beside the other source's or beside more of its own
            places = [3, 40, 112, 130] if name == "together" else [3, 40, 5, 6]
            batch = preprocess(mixture.__getitems__(places), preprocessor, policy.config.layout)
            torch.manual_seed(1)
            output = policy.compute(batch)
            own = torch.tensor([0, 1, 4, 5])
            losses[name] = output.loss[own]
            assert (output.loss > 0).all()
        assert torch.equal(losses["alone"], losses["together"])

    @pytest.mark.full
    def test_counts_a_robots_own_dimensions_alone(self, content: dict[str, Any]) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        policy = PTRPolicy(
            PTRConfig(device="cpu", preset="ptr", num_belief_tokens=0, segment_length=1),
            base_policy=small_policy("act", meta),
        ).eval()
        mixture = Mixture(meta, policy.config.layout)
        statistics = mixture_statistics(meta, policy.config.normalization_mapping, mixture.datasets)
        preprocessor, _ = make_ptr_pre_post_processors(policy.config, embodiments=embodiment_steps(meta, statistics))
        rows = preprocess(mixture.__getitems__([3, 115]), preprocessor, policy.config.layout)
        assert rows[ACTION_DIM_PAD][0].count_nonzero() == 198
        with torch.no_grad():
            predicted = policy.predict_action_chunk({key: rows[key] for key in policy.config.input_features})
            loss = policy.compute(rows).loss
        for row, source in enumerate(meta.sources):
            recorded = mixture[3 if row == 0 else 115]["action"][:CHUNK, list(source.action)]
            stats = source.meta.stats["action"]
            normalised = (recorded - torch.tensor(stats["mean"])) / torch.tensor(stats["std"])
            by_hand = (predicted[row][:, list(source.action)] - normalised).abs().mean()
            assert loss[row].item() == pytest.approx(by_hand.item(), rel=1e-4)


class TestProcessors:
    def test_every_source_is_normalised_by_its_own_statistics(self, content: dict[str, Any]) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        modes = {FeatureType.STATE: NormalizationMode.MIN_MAX, FeatureType.ACTION: NormalizationMode.MEAN_STD}
        step, back = embodiment_steps(meta, mixture_statistics(meta, modes))
        stats = meta.sources[1].meta.stats["observation.state"]
        state = torch.from_numpy(stats["max"]).float()
        for name, value in (("arm", 1.0), ("metaworld", 1.0)):
            chosen = type(step)(**{**vars(step), "source": name})
            seen = chosen({"observation": {"observation.state": state}})
            slots = ActionSpace.standard().positions(meta.sources[1].robot.state)
            moved = seen["observation"]["observation.state"]
            assert moved.shape == (1, 200)
            assert torch.allclose(moved[0, list(slots)], torch.full((4,), value))
            assert moved.count_nonzero() == 4
            assert seen["complementary_data"][ACTION_DIM_PAD].shape == (1, 200)
        zeros = torch.zeros(2, 5, 200)
        own = type(back)(**{**vars(back), "source": "arm"})({"action": zeros})["action"]
        assert own.shape == (2, 5, 4)
        assert torch.allclose(own[0, 0], torch.from_numpy(meta.sources[1].meta.stats["action"]["mean"]).float())

    def test_a_robot_has_to_be_chosen_where_there_are_several(self, content: dict[str, Any]) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        step, _ = embodiment_steps(meta, mixture_statistics(meta, {}))
        with pytest.raises(ValueError, match=r"trained on several robots: say which it runs on, one of points, arm"):
            step({"observation": {"observation.state": torch.zeros(4)}})
        with pytest.raises(
            ValueError, match=r"source='nobody' names 0 of the policy's sources; choose one of points, arm"
        ):
            type(step)(**{**vars(step), "source": "nobody"})

    def test_robots_with_the_same_action_need_no_mask(self, points: Path) -> None:
        sources = [{"dataset": str(points), "embodiment": POINT, "name": name} for name in ("one", "two")]
        meta = MixtureMetadata.read(MixtureConfig.from_dict({"sources": sources, "action_space": "compact"}))
        step, _ = embodiment_steps(meta, mixture_statistics(meta, {}))
        chosen = type(step)(**{**vars(step), "source": "two"})
        seen = chosen({"observation": {"observation.state": torch.zeros(4)}})
        assert ACTION_DIM_PAD not in seen["complementary_data"]
        assert seen["complementary_data"]["source_index"].tolist() == [1]

    def test_a_state_of_another_robot_is_refused(self, content: dict[str, Any]) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        step, _ = embodiment_steps(meta, mixture_statistics(meta, {}))
        chosen = type(step)(**{**vars(step), "source": "arm"})
        with pytest.raises(ValueError, match=r"The robot 'arm' has a state of 4 values, and observation.state holds 6"):
            chosen({"observation": {"observation.state": torch.zeros(6)}})


class TestTraining:
    @pytest.fixture(scope="class")
    def run(self, points: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
        sources = [{"dataset": str(points), "embodiment": POINT, "name": "points"}, ARM]
        folder = tmp_path_factory.mktemp("mixture")
        trainer = trained({"sources": sources, "action_space": "compact"}, folder, "smolvla")
        save_alone(trainer)
        return trainer

    @pytest.mark.full
    def test_the_checkpoint_runs_on_either_robot(self, run: PTRTrainer) -> None:
        folder = Path(run.args.output_dir)
        policy = PTRPolicy.from_pretrained(folder)
        for robot, size, key in (("points", 2, "points"), ("metaworld", 4, "arm")):
            pre, post = make_pre_post_processors(
                policy.config.base_config,
                pretrained_path=str(folder),
                preprocessor_overrides={"ptr_embodiment_observation": {"source": robot}},
                postprocessor_overrides={"ptr_embodiment_action": {"source": robot}},
            )
            observation = {
                "observation.state": ARM_STATE,
                "observation.image": torch.rand(3, 60, 84),
                "task": "reach the goal",
            }
            torch.manual_seed(0)
            action = post(policy.predict_action_chunk(pre(observation)))
            assert action.shape == (1, CHUNK, size)
            # the trainer's own processors say the same
            mine, back = run.processors_for(key)
            torch.manual_seed(0)
            run.policy.eval()
            assert torch.equal(back(run.policy.predict_action_chunk(mine(observation))), action)

    def test_the_checkpoint_carries_its_layouts(self, run: PTRTrainer) -> None:
        written = json.loads((Path(run.args.output_dir) / "policy_preprocessor.json").read_text())
        robots = written["steps"][0]["config"]["robots"]
        assert [(robot["name"], robot["embodiment"]) for robot in robots] == [
            ("points", "points"),
            ("arm", "metaworld"),
        ]
        assert len(robots[1]["action"]) == 4
        # x and y of the end effector are shared, the arm has z and a gripper besides
        assert run.policy.config.output_features["action"].shape == (4,)

    @pytest.mark.full
    def test_scores_name_source_and_episode(self, run: PTRTrainer) -> None:
        scores = score_dataset(run.policy, run.train_dataset, preprocessor=run.preprocessor, progress=False)
        assert set(scores.source.tolist()) == {"points", "arm"}
        arm = scores.source == "arm"
        assert set(scores.episode_index[arm].tolist()) == {0, 1}
        meta = LeRobotDatasetMetadata("heldout", root=ARM["dataset"])
        first = meta.episodes["dataset_from_index"][1]
        rows = arm & (scores.episode_index == 1)
        assert scores.index[rows].min() == first
        assert (scores.index[rows] - first == scores.frame_index[rows]).all()

    @pytest.mark.full
    def test_loss_by_source(self, run: PTRTrainer) -> None:
        data, processor = run.train_dataset, run.preprocessor
        by_source = action_loss_by_source(run.policy, data, processor, repeats=1)
        assert list(by_source) == ["points", "arm"]
        assert min(by_source.values()) < action_loss(run.policy, data, processor, repeats=1) < max(by_source.values())

    def test_other_data_than_the_processors_know_is_refused(self, run: PTRTrainer, points: Path) -> None:
        with pytest.raises(ValueError, match=r"trained on a mixture of points, arm, and .* is no mixture"):
            score_dataset(run.policy, points, preprocessor=run.preprocessor)
        single = run.train_dataset.meta.config.only("points")
        with pytest.raises(ValueError, match=r"is a mixture of points: give the same sources in the same order"):
            score_dataset(run.policy, single, preprocessor=run.preprocessor)

    @pytest.mark.full
    def test_training_goes_on_from_the_checkpoint(self, run: PTRTrainer, tmp_path: Path) -> None:
        content = run.train_dataset.meta.config
        again = PTRTrainer(run.args.output_dir, arguments(tmp_path), content)
        again.train()
        with pytest.raises(ValueError, match=r"give the same sources in the same order"):
            PTRTrainer(run.args.output_dir, arguments(tmp_path), content.only("arm"))

    @pytest.mark.full
    def test_a_resumed_run_equals_one_that_was_not_stopped(self, content: dict[str, Any], tmp_path: Path) -> None:
        # 18 + 24 frames: an epoch ends between the checkpoint and the end
        (points, _) = content["sources"]
        content["sources"] = [points | {"episodes": [3]}, points | {"episodes": [1], "name": "others"}]
        settings = {
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 0,
        }
        whole = trained(content, tmp_path / "whole", **settings)
        assert whole.state.epoch is not None
        assert whole.state.epoch > 1
        meta = whole.train_dataset.meta
        rest = PTRTrainer(small_policy("act", meta), arguments(tmp_path / "rest", **settings), content)
        rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        expected = whole.policy.state_dict()
        assert expected.keys() == rest.policy.state_dict().keys()
        for name, value in rest.policy.state_dict().items():
            assert torch.equal(value, expected[name]), name

    @pytest.mark.full
    def test_plain_fine_tuning_leaves_unused_dimensions_out_too(self, content: dict[str, Any], tmp_path: Path) -> None:
        trainer = trained(content, tmp_path, preset="sft", segment_length=1)
        mixture, policy = trainer.train_dataset, trainer.policy.eval()
        batch = preprocess(mixture.__getitems__([3, 115]), trainer.preprocessor, policy.config.layout)
        torch.manual_seed(0)
        loss, _ = policy(batch)
        torch.manual_seed(0)
        changed = batch["action"].masked_fill(batch[ACTION_DIM_PAD][:, None], 3.0)
        assert torch.equal(policy({**batch, "action": changed})[0], loss)

    def test_a_space_wider_than_the_policy_is_refused(self, content: dict[str, Any], tmp_path: Path) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        policy = tiny_smolvla(meta.features, vlm_folder(), chunk_size=CHUNK)
        sentence = r"has 200 slots and the policy's max_action_dim is \d+: set `action_space: compact`"
        with pytest.raises(ValueError, match=sentence):
            PTRTrainer(policy, arguments(tmp_path), {**content, "action_space": "standard"})

    @pytest.mark.full
    def test_a_list_is_enough_for_a_policy_with_few_dimensions(self, content: dict[str, Any], tmp_path: Path) -> None:
        compact = MixtureMetadata.read(MixtureConfig.from_dict({**content, "action_space": "compact"}))
        trainer = PTRTrainer(small_policy("smolvla", compact), arguments(tmp_path), content["sources"])
        assert trainer.train_dataset.meta.features["action"]["shape"] == (4,)

    @pytest.mark.full
    def test_streams_train_too(self, content: dict[str, Any], tmp_path: Path) -> None:
        trainer = trained({**content, "streaming": True, "stream_episodes": 2}, tmp_path, max_steps=2)
        assert trainer.state.global_step == 2

    @pytest.mark.full
    def test_held_out_data_of_the_same_robots(self, content: dict[str, Any], tmp_path: Path) -> None:
        meta = MixtureMetadata.read(MixtureConfig.from_dict(content))
        policy = small_policy("act", meta)
        trainer = PTRTrainer(policy, arguments(tmp_path), content, eval_dataset=content)
        assert trainer.evaluate()["eval_loss"] > 0
        with pytest.raises(ValueError, match=r"has to have the robots of the one that is trained on \(points, arm\)"):
            PTRTrainer(policy, arguments(tmp_path), content, eval_dataset=content["sources"][::-1])
        with pytest.raises(ValueError, match=r"eval_dataset has to be one too, with the same robots in the same order"):
            PTRTrainer(policy, arguments(tmp_path), content, eval_dataset=str(content["sources"][0]["dataset"]))


class TestCard:
    @pytest.mark.full
    def test_it_says_how_to_choose_a_robot(self, content: dict[str, Any], tmp_path: Path) -> None:
        trainer = trained(content, tmp_path)
        trainer.publisher.write_card(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "| points |" in card
        assert "whose processors know its 2 sources" in card
        assert "--robot points" in card
        assert "q(m)" in card

    def test_a_policy_without_its_run_says_so_too(self) -> None:
        config = PTRConfig(base={"type": "act"}, robots=["points", "arm"], preset="ptr", num_belief_tokens=0)
        facts = CardFacts(config=config, base=BasePolicy(policy_type="act"))
        assert facts.robots == ("points", "arm")
        assert facts.needs_ptr_hf


class TestBadFrames:
    @pytest.mark.full
    def test_are_named_by_their_own_dataset(self, content: dict[str, Any], tmp_path: Path) -> None:
        bad = write_dataset(tmp_path / "bad", lengths=(12, 14))
        file = next((bad / "data").rglob("*.parquet"))
        table = pq.read_table(file)
        values = np.stack(table["action"].to_numpy(zero_copy_only=False)).copy()
        values[15] = np.nan
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), pa.float32()), 2)
        place = table.column_names.index("action")
        table = table.set_column(place, table.schema.field("action").with_type(column.type), column)
        pq.write_table(table, file)
        content["sources"] = [ARM, {"dataset": str(bad), "embodiment": POINT, "name": "bad"}]
        trained(content, tmp_path / "out", max_steps=12)
        found = json.loads((tmp_path / "out" / "ptr_nonfinite.json").read_text())["frames"]
        assert {(row["source"], row["episode"], row["index"]) for row in found} == {("bad", 1, 15)}
