"""A sample with NaN has no say, whatever is recorded beside it, and a batch that has nothing else does no harm."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_frames import FRAME, SEEN_FROM, arguments, rows_of, spoil_gradients, spoiled, trainer_for
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from small_policies import base_policy, ptr_policy, raw_batch, tensors_equal
from torch import Tensor

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.data.screening import Screen, leave_out
from ptr_hf.processor_ptr import preprocess
from ptr_hf.training.processors import policy_processors

FAMILIES = (pytest.param("act", marks=pytest.mark.full), "smolvla")
"""ACT takes longer, with bfloat16 eight times as long on a CPU that does not compute with it."""


class LeavesOut(PTRTrainer):
    """Leaves samples out by a mask, whatever is recorded there."""

    anchors: Iterable[int] = ()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        mask = torch.isin(inputs["index"], torch.tensor(list(self.anchors)))
        return super()._prepare_inputs(leave_out(inputs, mask))


class TestABadSampleHasNoSay:
    @pytest.mark.full
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(
        ("preset", "feature", "value"),
        [
            ("ptr", "observation.state", np.nan),
            pytest.param("ptr_calibrated", "action", np.inf, marks=pytest.mark.full),
        ],
    )
    def test_training_equals_training_without_it(
        self, points: Path, tmp_path: Path, family: str, preset: str, feature: str, value: float
    ) -> None:
        """Bit for bit, although what stands in its place is another thing: the whole run, all that is learned and logged."""
        root = spoiled(points, tmp_path / "bad", {(feature, FRAME): value})
        screened = trainer_for(family, points, root, tmp_path / "screened", preset=preset)
        screened.train()
        masked = trainer_for(family, points, points, tmp_path / "masked", LeavesOut, preset=preset)
        masked.anchors = SEEN_FROM[feature]
        masked.train()

        state = screened.policy.state_dict()
        assert all(tensor.isfinite().all() for name, tensor in state.items() if "memory" not in name)
        assert tensors_equal(state, masked.policy.state_dict())
        if preset == "ptr":
            ordinary = trainer_for(family, points, points, tmp_path / "ordinary", preset=preset)
            ordinary.train()
            assert not tensors_equal(state, ordinary.policy.state_dict()), "the sample would have had a say"
        moments = [
            {f"{place}.{name}": moment for place, of in trainer.optimizer.state.items() for name, moment in of.items()}
            for trainer in (screened, masked)
        ]
        assert all(torch.equal(*pair) for pair in zip(*(list(of.values()) for of in moments), strict=True))
        own = {"nonfinite_samples", "epoch"}
        for row, other in zip(rows_of(screened), rows_of(masked), strict=True):
            assert {name: value for name, value in row.items() if name not in own} == {
                name: value for name, value in other.items() if name not in own
            }
        assert sum(row["nonfinite_samples"] for row in rows_of(screened)) > 0
        assert sum(row["nonfinite_samples"] for row in rows_of(masked)) == 0

    def test_the_others_are_weighed_as_in_a_batch_without_it(self, points: Path, tmp_path: Path) -> None:
        """ACT draws nothing in evaluation, so the batches can be compared row by row."""
        policy = ptr_policy("act", points, segment_length=1, consequence_offset=4, scorer_warmup_steps=0, queue_size=0)
        policy.eval()
        root = spoiled(points, tmp_path / "bad", {("observation.state", FRAME): np.nan})
        others = [0, 10, 60, 95]
        bad = policy.compute(prepared(policy, raw_batch(policy, root, [0, 10, FRAME, 60, 95]), points))
        without = policy.compute(prepared(policy, raw_batch(policy, points, others), points))
        clean = policy.compute(prepared(policy, raw_batch(policy, points, [0, 10, FRAME, 60, 95]), points))
        kept = [0, 1, 3, 4]
        assert bad.candidates.tolist() == [4, 4, 0, 4, 4]
        assert clean.candidates.tolist() == [5] * 5
        assert bad.weight[2] == 0
        for name in ("loss", "weight", "score", "identification"):
            assert torch.allclose(vars(bad)[name][kept], vars(without)[name], atol=1e-6), name
        assert not torch.allclose(bad.score[kept], clean.score[kept], atol=1e-6), "one candidate less"

    @pytest.mark.full
    @pytest.mark.parametrize("family", FAMILIES)
    def test_under_bfloat16_autocast(self, points: Path, tmp_path: Path, family: str) -> None:
        root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan})
        trainer = trainer_for(family, points, root, tmp_path / "run", bf16=True, max_steps=6)
        trainer.train()
        assert sum(row["nonfinite_samples"] for row in rows_of(trainer)) > 0
        assert all(row["nonfinite_gradients"] == 0 for row in rows_of(trainer))
        assert all(parameter.isfinite().all() for parameter in trainer.policy.parameters())

    @pytest.mark.full
    def test_float_images_in_a_run(self, points: Path, tmp_path: Path) -> None:
        class Broken:
            def __call__(self, frames: Tensor) -> Tensor:
                # an augmentation that divides by zero on some pictures
                return frames / (frames.mean() > threshold)

        dataset = LeRobotDataset("tests/points", root=points)
        threshold = float(dataset[30]["observation.image"].mean())
        broken = LeRobotDataset("tests/points", root=points, image_transforms=Broken())
        trainer = PTRTrainer(base_policy("act", points), arguments(tmp_path), train_dataset=broken)
        trainer.train()
        met = sum(row["nonfinite_samples"] for row in rows_of(trainer))
        assert 0 < met <= 80
        assert all(parameter.isfinite().all() for parameter in trainer.policy.parameters())


def prepared(policy: Any, batch: dict[str, Any], stats: Path) -> dict[str, Any]:
    """As `PTRTrainer` prepares a batch."""
    layout = policy.config.layout
    screen = Screen(layout, policy.config.input_features)
    meta = LeRobotDataset("tests/points", root=stats).meta
    preprocessor, _ = policy_processors(policy, meta, PTRTrainingArguments(output_dir="unused", use_cpu=True))
    batch, frames = screen.before(batch)
    return screen.after(preprocess(batch, preprocessor, layout), frames)[0]


class TestPlainPostTraining:
    @pytest.mark.full
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_place_of_a_bad_sample_is_taken_by_a_good_one(self, points: Path, tmp_path: Path, family: str) -> None:
        root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan})
        trainer = trainer_for(family, points, root, tmp_path / "run", preset="sft", max_steps=20)
        trainer.train()
        rows = rows_of(trainer)
        assert sum(row["nonfinite_samples"] for row in rows) > 0
        assert all(row["nonfinite_gradients"] == 0 for row in rows)
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert rows[-1]["loss"] < rows[0]["loss"]

    @pytest.mark.full
    def test_its_own_values_do_not_matter(self, points: Path, tmp_path: Path) -> None:
        """Neither does what stood beside the bad value: the run is the same with another number there."""
        states = []
        for number, other in enumerate((0.3, -0.7)):
            values = {("action", FRAME): np.nan, ("observation.state", FRAME): other}
            root = spoiled(points, tmp_path / f"bad-{number}", values)
            trainer = trainer_for("smolvla", points, root, tmp_path / f"run-{number}", preset="sft", max_steps=14)
            leaves_out_all_that_see = trainer.train()
            assert leaves_out_all_that_see.global_step == 14
            states.append(trainer.policy.state_dict())
        assert tensors_equal(*states)

    @pytest.mark.full
    def test_a_step_with_nan_does_not_stay_in_the_logged_loss(self, points: Path, tmp_path: Path) -> None:
        trainer = trainer_for("act", points, points, tmp_path, preset="sft", max_steps=6, logging_steps=2)
        spoil_gradients(trainer, {2}, loss_too=True)
        result = trainer.train()
        assert [row["nonfinite_gradients"] for row in rows_of(trainer)] == [0.0, 1.0, 0.0]
        assert all(math.isfinite(row["loss"]) for row in rows_of(trainer))
        assert math.isfinite(result.training_loss)


class TestNothingToLearnFrom:
    @pytest.mark.full
    @pytest.mark.parametrize("preset", ["sft", "ptr", "ptr_calibrated"])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("cause", ["nan", "past-the-end"])
    def test_a_batch_without_a_valid_row(
        self, points: Path, tmp_path: Path, family: str, preset: str, cause: str
    ) -> None:
        trainer = trainer_for(family, points, points, tmp_path, preset=preset)
        trainer.create_optimizer_and_scheduler(10)
        model, policy = trainer.model, trainer.policy
        model.train()
        batch = raw_batch(policy, points, [0, 31, 60, 96])
        if cause == "nan":
            batch["action"] = torch.full_like(batch["action"], torch.nan)
        else:
            batch["action_is_pad"] = torch.ones_like(batch["action_is_pad"])
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        assert loss.item() == 0.0
        assert loss.requires_grad
        loss.backward()
        gradients = [value.grad for value in policy.parameters() if value.grad is not None]
        assert gradients
        assert all((gradient == 0).all() for gradient in gradients)
        trainer.optimizer.step()
        policy.update()
        assert all(value.isfinite().all() for value in policy.parameters())
        # and the next, ordinary batch is learned from
        policy.zero_grad()
        loss = trainer.compute_loss(model, trainer._prepare_inputs(raw_batch(policy, points, [0, 31, 60, 96])))
        loss.backward()
        assert loss.isfinite()
        assert loss > 0

    @pytest.mark.full
    @pytest.mark.parametrize("preset", ["sft", "ptr", "ptr_calibrated"])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("spoil", [False, True], ids=["fine", "bad"])
    def test_a_batch_of_one(self, points: Path, tmp_path: Path, family: str, preset: str, spoil: bool) -> None:
        """|Y| = 1, no other action to rank by; with a bad frame some steps have nothing at all."""
        root = spoiled(points, tmp_path / "bad", {("action", f): np.nan for f in range(40, 54)}) if spoil else points
        length = {} if preset == "sft" else {"segment_length": 1, "queue_size": 0}
        trainer = trainer_for(
            family, points, root, tmp_path / "run", preset=preset, per_device_train_batch_size=1, max_steps=12, **length
        )
        before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
        trainer.train()
        rows = rows_of(trainer)
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert all(row["nonfinite_gradients"] == 0 for row in rows)
        assert (sum(row["nonfinite_samples"] for row in rows) > 0) == spoil
        assert all(value.isfinite().all() for value in trainer.policy.parameters())
        assert not tensors_equal(before, dict(trainer.policy.named_parameters()))
