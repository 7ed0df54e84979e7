"""SmolVLA without cameras: a LeRobot policy type of its own, and what PTR makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from demonstrations import write_dataset
from families_smolvla import vlm_folder
from family import ACTION_DIM, STATE, STATE_DIM, TOP, Family
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from peft import LoraConfig, get_peft_model
from policy_families import FAMILIES
from small_policies import base_policy, observation, ptr_policy, tensors_equal

import ptr_hf.configuration_ptr  # noqa: F401  the plugin registers both policy types
from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.policies import make_adapter
from ptr_hf.policies.configuration_smolvla_state import SmolVLAStateConfig
from ptr_hf.policies.modeling_smolvla_state import SmolVLAStatePolicy

INPUTS = {STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))}
SCORER = {"segment_length": 3, "queue_size": 32, "queue_negatives": 8, "scorer_warmup_steps": 2}
OUTPUTS = {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of states and actions."""
    return write_dataset(tmp_path_factory.mktemp("datasets") / "states", cameras=())


@pytest.fixture
def family() -> Family:
    return next(family for family in FAMILIES if family.name == "smolvla_state")


class TestPolicy:
    def test_lerobot_finds_it_by_its_type(self, states: Path, tmp_path: Path) -> None:
        assert get_policy_class("smolvla_state") is SmolVLAStatePolicy
        meta = LeRobotDatasetMetadata("tests/points", root=states)
        config = PreTrainedConfig.get_choice_class("smolvla_state")(
            vlm_model_name=str(vlm_folder()), num_vlm_layers=0, chunk_size=4, n_action_steps=4, device="cpu"
        )
        policy = make_policy(config, ds_meta=meta).eval()
        assert isinstance(policy, SmolVLAStatePolicy)
        policy.save_pretrained(tmp_path)
        config = PreTrainedConfig.from_pretrained(tmp_path)
        assert isinstance(config, SmolVLAStateConfig)
        config.pretrained_path, config.device = tmp_path, "cpu"
        loaded = make_policy(config, ds_meta=meta)
        assert tensors_equal(loaded.state_dict(), policy.state_dict())
        preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=meta.stats)
        batch = preprocessor({STATE: torch.rand(2, 4), "task": ["reach the goal", "push"]})
        assert postprocessor(loaded.select_action(batch)).shape == (2, 2)

    def test_it_carries_no_vision_tower(self, family: Family) -> None:
        names = family.policy().state_dict()
        assert not [name for name in names if "vision_model" in name or "connector" in name]
        assert [name for name in names if "text_model" in name]

    def test_cameras_of_the_robot_are_left_out(self, family: Family) -> None:
        camera = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
        config = family.policy().config
        config.input_features = {TOP: camera, **INPUTS}
        policy = SmolVLAStatePolicy(config).eval()
        assert list(policy.config.input_features) == [STATE]
        batch = family.batch(policy)
        noise = torch.randn(4, policy.config.chunk_size, ACTION_DIM)
        seen = policy.predict_action_chunk({**batch, TOP: torch.rand(4, 3, 32, 32)}, noise=noise)
        assert torch.equal(seen, policy.predict_action_chunk(batch, noise=noise))

    def test_the_instruction_and_the_state_are_read(self, family: Family) -> None:
        policy = family.policy().eval()
        batch, noise = family.batch(policy), torch.randn(4, policy.config.chunk_size, ACTION_DIM)
        tokens = "observation.language.tokens"
        plain = policy.predict_action_chunk(batch, noise=noise)
        for changed in ({STATE: batch[STATE] + 1}, {tokens: batch[tokens].flip(0)}):
            assert not torch.allclose(policy.predict_action_chunk({**batch, **changed}, noise=noise), plain)

    @pytest.mark.parametrize(
        ("inputs", "widths", "message"),
        [
            ({}, {}, r"reads observation.state, but its input features are: nothing"),
            (INPUTS, {"max_state_dim": 13}, r"observation.state has 14 entries and max_state_dim is 13"),
            (INPUTS, {"max_action_dim": 13}, r"action has 14 entries and max_action_dim is 13"),
        ],
    )
    def test_features_that_do_not_fit(self, inputs: dict[str, Any], widths: dict[str, int], message: str) -> None:
        config = SmolVLAStateConfig(input_features=inputs, output_features=OUTPUTS, device="cpu", **widths)
        with pytest.raises(ValueError, match=message):
            config.validate_features()


class TestAdapter:
    def test_context_is_instruction_and_state(self, family: Family) -> None:
        policy = family.policy()
        batch = family.batch(policy)
        trace = make_adapter(policy).trace(batch)
        assert trace.context.shape[1] == batch["observation.language.tokens"].shape[1] + 1
        assert trace.context_mask.sum(1).tolist() == (batch["observation.language.attention_mask"].sum(1) + 1).tolist()

    def test_target_is_the_policys_own_state_embedding(self, family: Family) -> None:
        policy = family.policy(max_state_dim=STATE_DIM + 3)
        adapter, batch = make_adapter(policy), family.batch(policy)
        assert adapter.target_keys() == (STATE,)
        assert (adapter.num_tower_layers(), adapter.target_dim(1)) == (1, 32)
        assert not adapter.tower_is_frozen(), "the state projector trains, so its consequence encoder is an EMA"
        tokens = adapter.encode_image(adapter.build_tower(1), STATE, batch[STATE])
        projector = policy.model.state_proj
        expected = batch[STATE] @ projector.weight[:, :STATE_DIM].T + projector.bias
        torch.testing.assert_close(tokens.squeeze(1), expected, rtol=1e-4, atol=1e-5)

    def test_views_hold_no_images_and_select_rows(self, family: Family) -> None:
        policy = family.policy(train_state_proj=False)
        adapter, batch = make_adapter(policy), family.batch(policy)
        assert adapter.encode_views(batch).rows(slice(0, 2)).features == {}
        views = adapter.encode_views({**batch, STATE: batch[STATE].unsqueeze(1)}, 1)
        picked = views.rows(torch.tensor([3, 0]))
        assert torch.equal(picked.tower[STATE], adapter.encode_views(batch, 1).tower[STATE][[3, 0]])

    def test_an_adapted_projector_is_followed_by_name(self, family: Family) -> None:
        policy = family.policy()
        batch = family.batch(policy)
        adapter = make_adapter(get_peft_model(policy, LoraConfig(r=2, target_modules=r".*state_proj")))
        assert not adapter.tower_is_frozen()
        tower = adapter.build_tower(1)
        before = adapter.encode_image(tower, STATE, batch[STATE])
        with torch.no_grad():
            for name, value in adapter.tower_parameters(1):
                if "lora_B" in name:
                    value.fill_(0.1)
        torch.testing.assert_close(adapter.encode_image(tower, STATE, batch[STATE]), before, rtol=0, atol=0)
        tower.load_state_dict(dict(adapter.tower_parameters(1)))
        assert not torch.allclose(adapter.encode_image(tower, STATE, batch[STATE]), before)


class TestTraining:
    @pytest.mark.full
    @pytest.mark.parametrize(
        "settings",
        [
            {"preset": "ptr", "num_belief_tokens": 0, **SCORER},
            {"preset": "ptr", "num_belief_tokens": 4, **SCORER},
            {"preset": "sft"},
            {"preset": "sft_belief", "num_belief_tokens": 4, "segment_length": 3},
        ],
        ids=["ptr", "ptr-belief", "sft", "sft-belief"],
    )
    def test_train_save_load_predict(self, states: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
        args = PTRTrainingArguments(
            output_dir=str(tmp_path / "run"),
            report_to="none",
            use_cpu=True,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            disable_tqdm=True,
            **{"preset": "ptr", **settings},
        )
        base = base_policy("smolvla", states)
        assert base.name == "smolvla_state"
        before = {name: value.clone() for name, value in base.state_dict().items()}
        trainer = PTRTrainer(base, args, train_dataset=states)
        trainer.train()
        policy = trainer.policy
        after = policy.base.state_dict()
        for name in ("model.state_proj.weight", "model.action_out_proj.weight"):
            assert not torch.equal(after[name], before[name]), name
        if settings["preset"] == "ptr":
            assert set(dict(policy.target_encoder.tower.named_parameters())) == {"projection.weight", "projection.bias"}
            assert torch.isfinite(policy.objective.queue.targets).all()
            assert len(policy.objective.queue) > 0
        trainer.save_model(str(tmp_path / "saved"))
        loaded = PTRPolicy.from_pretrained(tmp_path / "saved").eval()
        assert tensors_equal(loaded.state_dict(), policy.state_dict())
        batch = observation(policy, states, [0, 40])
        chunks = []
        for model in (policy, loaded):
            model.reset()
            noise = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
            chunks.append([model.predict_action_chunk(dict(batch), noise=noise) for _ in range(2)])
        for first, second in zip(*chunks, strict=True):
            assert torch.equal(first, second)
        moves = not torch.equal(chunks[0][0], chunks[0][1])
        assert moves == (settings.get("num_belief_tokens", 0) > 0), "only a carried belief changes the second chunk"

    def test_a_frozen_projector_is_the_target_itself(self, states: Path) -> None:
        policy = ptr_policy("smolvla", states, base={"train_state_proj": False}, num_belief_tokens=0)
        assert policy.target_encoder.shared
