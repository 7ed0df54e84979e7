"""`PTRTrainer`: what it takes, what it writes, and that stopping and resuming changes nothing."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy
from peft import LoraConfig, get_peft_model
from small_policies import CHUNK, base_policy, ptr_policy, stats_of, tensors_equal, vlm_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import default_collate
from transformers import get_scheduler

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments
from ptr_hf.policies.tiny import tiny_smolvla
from ptr_hf.report.dynamics import DYNAMICS_COLUMNS, DYNAMICS_FILE, read_dynamics
from ptr_hf.report.files import REPORT_FILE

SECRET = "hf_secretsecretsecret"
SMALL = {"segment_length": 2, "queue_size": 64, "queue_negatives": 8}


def arguments(folder: Path, **settings: Any) -> PTRTrainingArguments:
    defaults = {
        "preset": "ptr",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PTRTrainingArguments(output_dir=str(folder), **{**defaults, **settings})


def long_run(folder: Path, points: Path) -> PTRTrainer:
    """The same 12 steps whenever it is called: a checkpoint and an evaluation half way, belief and scorer on."""
    args = arguments(
        folder,
        max_steps=12,
        logging_steps=3,
        save_strategy="steps",
        save_steps=6,
        eval_strategy="steps",
        eval_steps=6,
        report_to="tensorboard",
        hub_token=SECRET,
        num_belief_tokens=2,
        scorer_warmup_steps=2,
        controller_interval=2,
        **SMALL,
    )
    few = LeRobotDataset("tests/points", root=points, episodes=[3])
    return PTRTrainer(base_policy("smolvla", points), args, train_dataset=points, eval_dataset=few)


@pytest.fixture(scope="module")
def finished(points: Path, tmp_path_factory: pytest.TempPathFactory) -> PTRTrainer:
    trainer = long_run(tmp_path_factory.mktemp("runs") / "undisturbed", points)
    trainer.train()
    trainer.save_model()
    return trainer


def output_of(trainer: PTRTrainer) -> Path:
    return Path(trainer.args.output_dir)


class TestPlainPostTraining:
    @pytest.mark.parametrize(("family", "steps"), [("smolvla", 8), pytest.param("act", 8, marks=pytest.mark.full)])
    def test_sft_equals_a_hand_written_loop_bit_for_bit(
        self, points: Path, family: str, steps: int, tmp_path: Path
    ) -> None:
        args = arguments(tmp_path, preset="sft", max_steps=steps, learning_rate=1e-3, optim="adamw_torch")
        trainer = PTRTrainer(base_policy(family, points), args, train_dataset=points)
        read: list[list[int]] = []

        def before_forward(_module: nn.Module, inputs: tuple[dict[str, Any], ...]) -> None:
            torch.manual_seed(len(read))
            read.append(inputs[0]["index"].tolist())

        trainer.policy.register_forward_pre_hook(before_forward)
        trainer.train()
        logged = [row["loss_action"] for row in trainer.state.log_history if "loss_action" in row]

        alone = base_policy(family, points).train()
        meta = LeRobotDatasetMetadata("tests/points", root=points)
        dataset = LeRobotDataset(
            "tests/points", root=points, delta_timestamps=resolve_delta_timestamps(alone.config, meta)
        )
        preprocessor, _ = make_pre_post_processors(alone.config, dataset_stats=meta.stats)
        groups = alone.get_optim_params()
        for group in groups if isinstance(groups, list) else []:
            if "lr" in group:
                group["lr"] *= 1e-3 / alone.config.optimizer_lr
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)
        losses = []
        for step, index in enumerate(read):
            batch = preprocessor(default_collate([dataset[frame] for frame in index]))
            torch.manual_seed(step)
            loss, _ = alone(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(alone.parameters(), 10.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert len(logged) == steps
        assert logged == losses
        # in the order in which transformers reads with Accelerate
        theirs = list(SeedableRandomSampler(dataset, data_seed=args.seed))
        drawn = [frame for index in read for frame in index]
        assert drawn == theirs[: len(drawn)]
        assert len(drawn) < len(theirs)
        assert tensors_equal(trainer.policy.base.state_dict(), alone.state_dict())
        assert not tensors_equal(alone.state_dict(), base_policy(family, points).state_dict())


class TestLogs:
    @pytest.mark.full
    def test_every_metric_is_logged(self, finished: PTRTrainer) -> None:
        rows = [row for row in finished.state.log_history if "loss" in row]
        assert [row["step"] for row in rows] == [3, 6, 9, 12]
        lists = {"weight_histogram", "weight_bin_edges", "sources", "tasks", "share_bound"}
        scalars = DYNAMICS_COLUMNS.keys() - {"run", "step"} - lists
        for row in rows:
            assert scalars <= row.keys()
            assert all(type(row[name]) in (float, int) for name in scalars)
        assert rows[0]["weight_max"] > 1.0, "the third step is past the warm-up"
        assert rows[-1]["valid_target_ratio"] < 1.0, "some chunks end with their episode"

    def test_dynamics_hold_every_column(self, finished: PTRTrainer) -> None:
        dynamics = read_dynamics(output_of(finished) / DYNAMICS_FILE)
        assert dynamics.runs == ("ptr",)
        assert dynamics.steps("ptr").tolist() == [3, 6, 9, 12]
        assert set(dynamics.table.column_names) == set(DYNAMICS_COLUMNS)
        for name in DYNAMICS_COLUMNS:
            # a single dataset has no sources to tell apart
            assert (dynamics.table[name].null_count == 0) == (name != "sources"), name
        counts = [sum(row) for row in dynamics.table["weight_histogram"].to_pylist()]
        ratios = dynamics.column("valid_target_ratio", "ptr")
        assert all(0 < count <= 3 * 4 * 2 for count in counts)
        assert counts[0] < 24 or ratios[0] == 1.0
        logged = [row["score"] for row in finished.state.log_history if "score" in row]
        assert dynamics.column("score", "ptr").tolist() == pytest.approx(logged)

    def test_tensorboard_receives_them(self, finished: PTRTrainer) -> None:
        folders = {path.parent for path in output_of(finished).rglob("events.out.tfevents.*")}
        assert len(folders) == 1
        events = EventAccumulator(str(folders.pop()))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {"train/loss", "train/score", "train/weight_mean", "train/temperature", "eval/loss"} <= tags
        assert [event.step for event in events.Scalars("train/score")] == [3, 6, 9, 12]

    def test_evaluation_loss(self, finished: PTRTrainer) -> None:
        losses = [row["eval_loss"] for row in finished.state.log_history if "eval_loss" in row]
        assert len(losses) == 2
        assert losses[1] != losses[0]
        before = {name: value.clone() for name, value in finished.policy.state_dict().items()}
        assert finished.evaluate()["eval_loss"] > 0
        assert tensors_equal(finished.policy.state_dict(), before)


class TestFiles:
    def test_the_folder_holds_policy_processors_and_arguments(self, finished: PTRTrainer) -> None:
        for folder in (output_of(finished), output_of(finished) / "checkpoint-6"):
            names = {path.name for path in folder.iterdir()}
            expected = {"config.json", "model.safetensors", "ptr_config.json", "ptr_scorer.safetensors"}
            assert expected | {"policy_preprocessor.json", "policy_postprocessor.json", "training_args.json"} <= names
        arguments = json.loads((output_of(finished) / "training_args.json").read_text())
        assert arguments["max_steps"] == 12
        assert arguments["num_belief_tokens"] == 2

    def test_the_model_card_and_the_report_lie_beside_it(self, finished: PTRTrainer) -> None:
        card = (output_of(finished) / "README.md").read_text()
        assert card.startswith("---\n")
        assert "| steps | 12 |" in card or "12 steps" in card
        page = (output_of(finished) / REPORT_FILE).read_text()
        assert "Training dynamics" in page
        assert (output_of(finished) / "figures" / "ptr_dynamics.png").is_file()

    def test_the_saved_policy_is_the_trained_one(self, finished: PTRTrainer) -> None:
        loaded = PTRPolicy.from_pretrained(output_of(finished))
        assert tensors_equal(loaded.state_dict(), finished.policy.state_dict())
        assert loaded.objective.step == 12
        assert loaded.objective.warmup_steps == 2

    def test_no_pickled_arguments_and_no_token_anywhere(self, finished: PTRTrainer) -> None:
        files = [path for path in output_of(finished).rglob("*") if path.is_file()]
        assert len(files) > 20
        leaking = [path.name for path in files if SECRET.encode() in path.read_bytes()]
        assert leaking == []
        pickled = {path.name for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")}
        assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}, "transformers' own state for resuming"


class TestResume:
    def test_6_to_12_equals_12_undisturbed(self, finished: PTRTrainer, points: Path, tmp_path: Path) -> None:
        shutil.copytree(output_of(finished) / "checkpoint-6", tmp_path / "checkpoint-6")
        shutil.copy(output_of(finished) / DYNAMICS_FILE, tmp_path / DYNAMICS_FILE)
        resumed = long_run(tmp_path, points)
        with torch.no_grad():
            for parameter in resumed.policy.parameters():
                parameter.zero_()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert tensors_equal(resumed.policy.state_dict(), finished.policy.state_dict())
        queues = [trainer.policy.objective.queue.ordered() for trainer in (resumed, finished)]
        assert tensors_equal(*queues)
        assert len(queues[0]["targets"]) > 0
        columns = [read_dynamics(output_of(trainer) / DYNAMICS_FILE).table for trainer in (resumed, finished)]
        assert columns[0].equals(columns[1])

    def test_a_folder_that_is_no_ptr_checkpoint_is_refused(self, points: Path, tmp_path: Path) -> None:
        base_policy("act", points).save_pretrained(tmp_path / "plain")
        trainer = PTRTrainer(base_policy("act", points), arguments(tmp_path, **SMALL), train_dataset=points)
        with pytest.raises(ValueError, match=r"plain is no PTR checkpoint; resume from a checkpoint-<step> folder"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "plain"))

    @pytest.mark.full
    def test_a_new_run_in_the_same_folder_starts_its_dynamics_anew(self, points: Path, tmp_path: Path) -> None:
        for steps in (3, 2):
            args = arguments(tmp_path, max_steps=steps, preset="sft")
            trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
            for _ in range(2):
                trainer.train()
                assert read_dynamics(tmp_path / DYNAMICS_FILE).steps("sft").tolist() == list(range(1, steps + 1))

    @pytest.mark.full
    def test_the_best_checkpoint_comes_back_whole(self, points: Path, tmp_path: Path) -> None:
        args = arguments(
            tmp_path,
            learning_rate=1.0,
            warmup_steps=1,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            num_belief_tokens=0,
            **SMALL,
        )
        few = LeRobotDataset("tests/points", root=points, episodes=[3])
        trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points, eval_dataset=few)
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1"), "the second step is far too long"
        best = PTRPolicy.from_pretrained(trainer.state.best_model_checkpoint)
        last = PTRPolicy.from_pretrained(tmp_path / "checkpoint-2")
        assert not tensors_equal(last.state_dict(), best.state_dict())
        assert tensors_equal(trainer.policy.state_dict(), best.state_dict())

    @pytest.mark.full
    def test_a_peft_run_resumes(self, points: Path, tmp_path: Path) -> None:
        def run(folder: Path) -> PTRTrainer:
            torch.manual_seed(0)
            lora = LoraConfig(r=2, target_modules=r".*(action_in_proj|action_out_proj)")
            args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, num_belief_tokens=0, **SMALL)
            return PTRTrainer(get_peft_model(base_policy("smolvla", points), lora), args, train_dataset=points)

        undisturbed, resumed = run(tmp_path / "a"), run(tmp_path / "b")
        undisturbed.train()
        shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
        assert tensors_equal(resumed.policy.state_dict(), undisturbed.policy.state_dict())


class TestModels:
    @pytest.fixture(scope="class")
    def sources(self, points: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        """Every way to name the same policy."""
        root = tmp_path_factory.mktemp("models")
        base = base_policy("smolvla", points)
        base.save_pretrained(root / "lerobot")
        for name, processor in zip(
            ("preprocessor", "postprocessor"),
            make_pre_post_processors(base.config, dataset_stats=stats_of(points)),
            strict=True,
        ):
            processor.save_pretrained(root / "lerobot", config_filename=f"policy_{name}.json")
        trainer = PTRTrainer(base, arguments(root / "run", **SMALL), train_dataset=points)
        trainer.save_model(str(root / "ptr"))
        return {
            "folder of a LeRobot policy": str(root / "lerobot"),
            "path of a LeRobot policy": root / "lerobot",
            "LeRobot policy": base_policy("smolvla", points),
            "PTRPolicy": ptr_policy("smolvla", points, **SMALL),
            "PTR checkpoint": str(root / "ptr"),
            "loaded PTR checkpoint": PTRPolicy.from_pretrained(root / "ptr"),
        }

    @pytest.mark.parametrize(
        "name",
        [
            "folder of a LeRobot policy",
            pytest.param("path of a LeRobot policy", marks=pytest.mark.full),
            pytest.param("LeRobot policy", marks=pytest.mark.full),
            pytest.param("PTRPolicy", marks=pytest.mark.full),
            "PTR checkpoint",
            pytest.param("loaded PTR checkpoint", marks=pytest.mark.full),
        ],
    )
    def test_every_kind_of_model_trains(self, points: Path, tmp_path: Path, sources: dict[str, Any], name: str) -> None:
        settings = {} if "PTR" in name else SMALL
        trainer = PTRTrainer(
            sources[name], arguments(tmp_path, max_steps=1, warmup_steps=0, **settings), train_dataset=points
        )
        assert trainer.policy.config.segment_length == 2
        assert tensors_equal(trainer.policy.base.state_dict(), base_policy("smolvla", points).state_dict())
        trainer.train()
        assert trainer.state.global_step == 1
        assert trainer.policy.objective.step == 1
        assert not tensors_equal(trainer.policy.base.state_dict(), base_policy("smolvla", points).state_dict())

    @pytest.mark.full
    def test_a_configuration_starts_from_random_weights(self, points: Path, tmp_path: Path) -> None:
        config = ACTConfig(
            chunk_size=8,
            n_action_steps=8,
            dim_model=32,
            n_heads=4,
            dim_feedforward=64,
            pretrained_backbone_weights=None,
        )
        args = arguments(tmp_path, max_steps=1, chunk_size=4, **SMALL)
        trainer = PTRTrainer(config, args, train_dataset=points)
        assert trainer.policy.adapter.chunk_size == 4
        assert set(trainer.policy.config.input_features) == {"observation.image", "observation.state"}
        trainer.train()
        loaded = trainer.save_model(str(tmp_path / "saved")) or PTRPolicy.from_pretrained(tmp_path / "saved")
        assert tensors_equal(loaded.state_dict(), trainer.policy.state_dict())

    def test_a_configuration_without_data_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"needs a dataset to take its features from: give train_dataset too"):
            PTRTrainer(ACTConfig(), arguments(tmp_path))

    def test_a_ptr_configuration_is_refused(self, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Give the base policy's configuration.*or PTRPolicy\(config\)"):
            PTRTrainer(PTRConfig(device="cpu", base={"type": "act"}), arguments(tmp_path), train_dataset=points)

    def test_something_else_is_refused(self, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Linear is no LeRobot policy: give a LeRobot policy, a PTRPolicy"):
            PTRTrainer(nn.Linear(2, 2), arguments(tmp_path), train_dataset=points)
        features = base_policy("act", points).config
        config = VQBeTConfig(
            input_features={
                **features.input_features,
                "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            },
            output_features=features.output_features,
            pretrained_backbone_weights=None,
            device="cpu",
        )
        with pytest.raises(ValueError, match=r"does not support the policy type 'vqbet'.*Supported: act, diffusion"):
            PTRTrainer(VQBeTPolicy(config), arguments(tmp_path), train_dataset=points)

    def test_a_path_that_does_not_exist_is_refused(self, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no_such_policy is neither a folder nor .*Hub"):
            PTRTrainer(tmp_path / "no_such_policy", arguments(tmp_path), train_dataset=points)

    def test_hyperparameters_that_a_ptr_policy_would_overrule_are_refused(self, points: Path, tmp_path: Path) -> None:
        policy = ptr_policy("act", points, **SMALL)
        with pytest.raises(ValueError, match=r"alpha=0.5 was given, but the PTRPolicy brings alpha=1.0"):
            PTRTrainer(policy, arguments(tmp_path, alpha=0.5), train_dataset=points)
        # also where they equal a default; the default preset was not given
        hot = ptr_policy("act", points, temperature=0.2, **SMALL)
        with pytest.raises(ValueError, match=r"temperature=0.12 was given, but the PTRPolicy brings temperature=0.2"):
            PTRTrainer(hot, arguments(tmp_path, temperature=0.12), train_dataset=points)
        PTRTrainer(hot, arguments(tmp_path, preset=None), train_dataset=points)
        PTRTrainer(policy, arguments(tmp_path, **SMALL), train_dataset=points)


class TestAnotherRobot:
    @pytest.mark.full
    def test_a_vla_saved_for_another_robot_takes_this_ones_sizes(self, points: Path, tmp_path: Path) -> None:
        camera = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
        cameras = {f"observation.images.camera{index}": camera for index in (1, 2, 3)}
        state, action = PolicyFeature(FeatureType.STATE, (6,)), PolicyFeature(FeatureType.ACTION, (6,))
        policy = tiny_smolvla(
            ({**cameras, "observation.state": state}, {"action": action}), vlm_folder(), chunk_size=CHUNK, num_steps=2
        )
        folder = tmp_path / "released"
        policy.save_pretrained(folder)
        for processor in make_pre_post_processors(policy.config, dataset_stats={}):
            processor.save_pretrained(folder)
        renames = {"observation.image": "observation.images.camera1"}
        trainer = PTRTrainer(folder, arguments(tmp_path / "out", max_steps=2, rename_map=renames), points)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        loaded = PTRPolicy.from_pretrained(tmp_path / "final")
        assert loaded.config.robot_state_feature.shape == (4,)
        assert loaded.config.action_feature.shape == (2,)
        assert len(trainer.policy.objective.queue) > 0


class TestData:
    @pytest.mark.full
    @pytest.mark.parametrize("kind", ["folder", "string", "open dataset"])
    def test_every_kind_of_dataset_is_read_at_the_layout(self, points: Path, tmp_path: Path, kind: str) -> None:
        source = {
            "folder": points,
            "string": str(points),
            "open dataset": LeRobotDataset("tests/points", root=points, episodes=[1, 2]),
        }[kind]
        args = arguments(tmp_path, max_steps=1, **SMALL)
        trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=source)
        assert trainer.train_dataset[0]["observation.state"].shape == (3, 4)
        assert trainer.train_dataset[0]["action"].shape == (8, 2)
        assert len(trainer.train_dataset) == (64 if kind == "open dataset" else 112)
        trainer.train()

    @pytest.mark.full
    @pytest.mark.parametrize("as_json", [False, True])
    def test_renamed_cameras(self, points: Path, tmp_path: Path, as_json: bool) -> None:
        features = base_policy("smolvla", points).config.input_features
        renamed = {key.replace("observation.image", "observation.images.top"): value for key, value in features.items()}
        policy = base_policy("smolvla", points)
        policy.config.input_features = renamed
        with pytest.raises(
            ValueError, match=r"sees the camera observation.images.top.*it has observation.image.*rename_map"
        ):
            PTRTrainer(policy, arguments(tmp_path, **SMALL), train_dataset=points)
        rename = {"observation.image": "observation.images.top"}
        args = arguments(tmp_path, max_steps=1, rename_map=json.dumps(rename) if as_json else rename, **SMALL)
        trainer = PTRTrainer(policy, args, train_dataset=points)
        trainer.train()
        trainer.save_model()
        stored = json.loads((tmp_path / "policy_preprocessor.json").read_text())
        assert rename in [step["config"].get("rename_map") for step in stored["steps"]]


class TestOptimisation:
    @pytest.mark.full
    def test_accumulated_micro_batches_make_one_step(self, points: Path, tmp_path: Path) -> None:
        args = arguments(tmp_path, gradient_accumulation_steps=3, num_belief_tokens=0, **SMALL)
        trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
        seen: list[int] = []
        trainer.policy.register_forward_hook(
            lambda _module, _inputs, output: seen.append(int(output[0].target_valid.sum()))
        )
        trainer.train()
        assert len(seen) == 6
        assert trainer.policy.objective.step == 2
        assert len(trainer.policy.objective.queue) == sum(seen)
        rows = [row for row in trainer.state.log_history if "loss_action" in row]
        config = trainer.policy.config
        for row in rows:
            parts = config.identification_coef * row["loss_identification"] + config.ranking_coef * row["loss_ranking"]
            assert row["loss"] == pytest.approx(row["loss_action"] + parts, abs=2e-4)

    @pytest.mark.full
    def test_a_groups_own_learning_rate_keeps_its_ratio(self, points: Path, tmp_path: Path) -> None:
        policy = base_policy("act", points, optimizer_lr=1e-3, optimizer_lr_backbone=1e-4)
        args = arguments(tmp_path, learning_rate=1e-2, **SMALL)
        trainer = PTRTrainer(policy, args, train_dataset=points)
        groups = trainer.create_optimizer().param_groups
        backbone = {id(parameter) for parameter in policy.model.backbone.parameters()}
        rates = {any(id(parameter) in backbone for parameter in group["params"]): group["lr"] for group in groups}
        assert rates == {False: 1e-2, True: pytest.approx(1e-3)}
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        assert trained == {id(parameter) for parameter in trainer.policy.parameters() if parameter.requires_grad}

    @pytest.mark.full
    @pytest.mark.parametrize("rate", [1e-2, 0.0])
    def test_the_side_pathways_learning_rate_is_taken_as_given(self, points: Path, tmp_path: Path, rate: float) -> None:
        policy = base_policy("act", points, optimizer_lr=1e-3)
        args = arguments(tmp_path, learning_rate=rate, head_learning_rate=3e-3, **SMALL)
        trainer = PTRTrainer(policy, args, train_dataset=points)
        assert trainer.create_optimizer().param_groups[-1]["lr"] == 3e-3

    @pytest.mark.full
    def test_the_scorer_alone_learns_at_learning_rate_0(self, points: Path, tmp_path: Path) -> None:
        args = arguments(tmp_path, learning_rate=0.0, head_learning_rate=1e-3, num_belief_tokens=0, **SMALL)
        trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
        before = copy.deepcopy(trainer.policy.state_dict())
        trainer.train()
        after = trainer.policy.state_dict()
        base = [name for name in before if name.startswith("base.")]
        assert base
        assert all(torch.equal(before[name], after[name]) for name in base)
        assert any(not torch.equal(before[name], after[name]) for name in before if ".scorer." in name)

    @pytest.mark.full
    @pytest.mark.parametrize(
        "settings",
        [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}],
        ids=["gradient checkpointing", "torch.compile"],
    )
    def test_saving_memory_or_time_changes_nothing(
        self, points: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        losses = []
        for name, extra in (("plain", {}), ("switched", settings)):
            args = arguments(tmp_path / name, max_steps=2, num_belief_tokens=2, **SMALL, **extra)
            torch.manual_seed(0)
            trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
            trainer.train()
            trainer.save_model()
            losses.append(trainer.state.log_history[-1]["train_loss"])
            assert {**args.to_dict(), **extra} == args.to_dict(), "the arguments stay as they were given"
            loaded = PTRPolicy.from_pretrained(tmp_path / name)
            assert tensors_equal(loaded.state_dict(), trainer.policy.state_dict())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    @pytest.mark.full
    def test_bf16_trains(self, points: Path, tmp_path: Path) -> None:
        args = arguments(tmp_path, max_steps=3, bf16=True, num_belief_tokens=2, warmup_steps=0, **SMALL)
        trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
        before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
        trainer.train()
        after = trainer.policy.state_dict()
        assert {parameter.dtype for parameter in trainer.policy.parameters()} == {torch.float32}
        assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
        for part in ("base.", "belief.", "objective.scorer."):
            assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)), part

    @pytest.mark.full
    def test_the_warmup_is_a_share_of_the_run(self, points: Path, tmp_path: Path) -> None:
        args = arguments(tmp_path, max_steps=4, scorer_warmup_steps=0.5, num_belief_tokens=0, **SMALL)
        trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=points)
        trainer.train()
        largest = [row["weight_max"] for row in trainer.state.log_history if "weight_max" in row]
        assert largest[:2] == [1.0, 1.0]
        assert min(largest[2:]) > 1.0


class TestRefusals:
    def test_several_gpus_without_a_launcher(self, points: Path, tmp_path: Path) -> None:
        args = arguments(tmp_path)
        assert args.n_gpu <= 1
        # There are not two GPUs here: this is what transformers finds on a machine that has them.
        args._n_gpu = 2
        with pytest.raises(ValueError, match=r"2 GPUs are visible.*accelerate launch --multi_gpu --num_processes 2"):
            PTRTrainer(base_policy("act", points), args, train_dataset=points)

    def test_training_on_nothing(self, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nothing to train on: give PTRTrainer a train_dataset"):
            PTRTrainer(base_policy("smolvla", points), arguments(tmp_path, preset="sft")).train()

    def test_gradient_checkpointing_of_a_policy_without_it(self, points: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"act policy.*no gradient checkpointing"):
            PTRTrainer(base_policy("act", points), arguments(tmp_path, gradient_checkpointing=True))
