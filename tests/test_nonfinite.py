"""What was not finite is counted, named and kept; gradients that are not finite are left out; training stops where it must."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from bad_frames import FRAME, arguments, rows_of, spoil_gradients, spoiled, trainer_for
from safetensors.torch import load_file
from small_policies import base_policy, ptr_policy, raw_batch, tensors_equal
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ptr_hf import PTRTrainer
from ptr_hf.data.screening import Screen
from ptr_hf.data.segments import segment_rows
from ptr_hf.report.dynamics import DYNAMICS_FILE, read_dynamics
from ptr_hf.training.nonfinite import NONFINITE_FILE, PATIENCE, NonFiniteWatch


class TestNamesAndCounts:
    @pytest.fixture(scope="class")
    def run(self, points: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PTRTrainer, str]:
        """An epoch on data with two bad frames; the trainer and all it has warned about."""
        folder = tmp_path_factory.mktemp("named")
        root = spoiled(points, folder / "bad", {("observation.state", FRAME): np.nan, ("action", 90): -np.inf})
        trainer = trainer_for("smolvla", points, root, folder / "run", max_steps=14, logging_steps=7)
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logging.getLogger("ptr_hf").addHandler(handler)
        trainer.train()
        logging.getLogger("ptr_hf").removeHandler(handler)
        return trainer, "\n".join(messages)

    def test_the_log_and_the_dynamics_count_them(self, run: tuple[PTRTrainer, str]) -> None:
        trainer, _ = run
        logged = [row["nonfinite_samples"] for row in rows_of(trainer)]
        assert len(logged) == 2
        assert all(type(count) is float for count in logged)
        assert sum(logged) == 11, "every sample is drawn once"
        dynamics = read_dynamics(Path(trainer.args.output_dir) / DYNAMICS_FILE)
        assert dynamics.column("nonfinite_samples", "ptr").tolist() == logged
        assert dynamics.column("nonfinite_gradients", "ptr").tolist() == [0.0] * 2

    def test_the_file_lists_them(self, run: tuple[PTRTrainer, str]) -> None:
        trainer, _ = run
        kept = json.loads((Path(trainer.args.output_dir) / NONFINITE_FILE).read_text())
        assert [(row["kind"], row["index"], row["episode"]) for row in kept["frames"]] == [
            ("values", FRAME, 1),
            ("values", 90, 2),
        ]
        assert sum(row["times"] for row in kept["frames"]) == sum(row["nonfinite_samples"] for row in rows_of(trainer))
        assert kept["gradients"] == 0

    def test_each_is_warned_about_once(self, run: tuple[PTRTrainer, str]) -> None:
        _, messages = run
        assert messages.count("40 (episode 1)") == 1
        assert messages.count("90 (episode 2)") == 1
        assert "no say" in messages
        assert NONFINITE_FILE in messages

    @pytest.mark.full
    def test_a_resumed_run_goes_on_with_the_file(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan})
        settings: dict[str, Any] = {"max_steps": 10, "logging_steps": 5, "save_strategy": "steps", "save_steps": 10}
        trainer_for("smolvla", points, root, tmp_path / "run", **settings).train()
        first = json.loads((tmp_path / "run" / NONFINITE_FILE).read_text())["frames"][0]["times"]
        caplog.clear()
        resumed = trainer_for("smolvla", points, root, tmp_path / "run", **settings | {"max_steps": 20})
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
        (row,) = json.loads((tmp_path / "run" / NONFINITE_FILE).read_text())["frames"]
        assert row["index"] == FRAME
        assert row["times"] > first
        assert "no say" not in caplog.text, "it has been named before"
        anew = trainer_for("smolvla", points, points, tmp_path / "run", max_steps=2, logging_steps=1)
        anew.train()
        assert not (tmp_path / "run" / NONFINITE_FILE).exists(), "a new run on clean data has nothing to report"

    @pytest.mark.full
    def test_a_run_resumed_between_two_rows_logs_the_same(self, points: Path, tmp_path: Path) -> None:
        root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan})
        settings: dict[str, Any] = {"max_steps": 16, "logging_steps": 8, "save_steps": 6, "save_total_limit": 0}
        settings |= {"save_strategy": "steps"}
        whole = trainer_for("smolvla", points, root, tmp_path / "run", **settings)
        spoil_gradients(whole, {4, 13})
        whole.train()
        resumed = trainer_for("smolvla", points, root, tmp_path / "run", **settings)
        spoil_gradients(resumed, {4, 13})
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
        names = ("step", "loss", "nonfinite_samples", "nonfinite_gradients")
        rows = [[{name: row[name] for name in names} for row in rows_of(trainer)] for trainer in (whole, resumed)]
        assert rows[0] == rows[1]
        assert [row["nonfinite_gradients"] for row in rows[0]] == [1.0, 1.0]
        assert rows[0][0]["nonfinite_samples"] > 0

    @pytest.mark.full
    def test_evaluation_leaves_them_out_and_says_so(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan})
        policy = base_policy("act", points)
        trainer = PTRTrainer(policy, arguments(tmp_path / "run"), train_dataset=points, eval_dataset=root)
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        assert "40 (episode 1)" in caplog.text
        assert "evaluation loss" in caplog.text

    @pytest.mark.full
    def test_a_loss_that_is_not_finite_names_its_chunk(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A recorded value that is finite, but so large that its squared error is not."""
        root = spoiled(points, tmp_path / "huge", {("action", FRAME): 1e25})
        trainer = trainer_for("smolvla", points, root, tmp_path / "run", max_steps=20)
        trainer.train()
        rows = rows_of(trainer)
        assert sum(row["nonfinite_samples"] for row in rows) > 0
        assert all(row["nonfinite_gradients"] == 0 for row in rows), "the objective cuts it off before the square"
        assert "a loss that is not finite" in caplog.text
        kept = json.loads((tmp_path / "run" / NONFINITE_FILE).read_text())
        assert {(row["kind"], row["episode"]) for row in kept["frames"]} == {("loss", 1)}
        assert {row["index"] for row in kept["frames"]} <= {37, 38, 39, 40}, "chunks that hold the frame"
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert all(tensor.isfinite().all() for tensor in trainer.policy.state_dict().values())

    @pytest.mark.full
    def test_statistics_with_nan_do_not_spoil_the_run(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As LeRobot records such data: normalising by them would make every sample NaN."""
        values = {("observation.state", FRAME): np.nan, ("action", 90): np.inf}
        root = spoiled(points, tmp_path / "bad", values, with_statistics=True)
        trainer = trainer_for("act", points, root, tmp_path / "run", max_steps=20)
        trainer.train()
        assert "meta/stats.json" in caplog.text
        rows = rows_of(trainer)
        assert 0 < sum(row["nonfinite_samples"] for row in rows) < 40
        assert all(row["nonfinite_gradients"] == 0 for row in rows)
        assert rows[-1]["loss"] < rows[0]["loss"]
        trainer.save_model()
        saved = list((tmp_path / "run").glob("*normalizer*.safetensors"))
        assert saved
        assert all(value.isfinite().all() for path in saved for value in load_file(path).values())

    @pytest.mark.full
    def test_stop_ends_the_run_with_a_checkpoint(self, points: Path, tmp_path: Path) -> None:
        root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan})
        trainer = trainer_for("act", points, root, tmp_path / "run", max_steps=40, nonfinite="stop")
        with pytest.raises(ValueError, match=r"40 \(episode 1\)"):
            trainer.train()
        step = trainer.state.global_step
        assert step < 40
        assert step % 5 == 0
        going_on = trainer_for("act", points, root, tmp_path / "run", max_steps=step + 5)
        going_on.train(resume_from_checkpoint=True)
        assert going_on.state.global_step == step + 5


class TestGradients:
    @pytest.mark.parametrize(
        ("family", "optim", "max_grad_norm"),
        [
            ("smolvla", "adamw_torch_fused", 10.0),
            pytest.param("act", "adamw_torch_fused", 10.0, marks=pytest.mark.full),
            pytest.param("act", "adamw_torch", 0.0, marks=pytest.mark.full),
        ],
    )
    def test_a_step_without_a_finite_gradient_leaves_everything_finite(
        self,
        points: Path,
        tmp_path: Path,
        family: str,
        optim: str,
        max_grad_norm: float,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        trainer = trainer_for(family, points, points, tmp_path, optim=optim, max_grad_norm=max_grad_norm)
        spoil_gradients(trainer, {3, 7, 8})
        trainer.train()
        assert [row["nonfinite_gradients"] for row in rows_of(trainer)] == [1.0, 2.0]
        assert all(tensor.isfinite().all() for tensor in trainer.policy.state_dict().values())
        moments = [moment for of in trainer.optimizer.state.values() for moment in of.values() if moment is not None]
        assert all(torch.as_tensor(moment).isfinite().all() for moment in moments)
        assert "2 of the 5 steps up to step 10" in caplog.text
        assert json.loads((tmp_path / NONFINITE_FILE).read_text()) == {"frames": [], "gradients": 3}

    @pytest.mark.full
    def test_such_a_step_moves_nothing_without_momentum(self, points: Path, tmp_path: Path) -> None:
        trainer = trainer_for("act", points, points, tmp_path, optim="sgd", weight_decay=0.0, max_steps=4)
        spoil_gradients(trainer, {0, 1, 2, 3})
        before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
        trainer.train()
        assert tensors_equal(before, dict(trainer.policy.named_parameters()))

    @pytest.mark.full
    @pytest.mark.parametrize("logging_steps", [1, pytest.param(12, marks=pytest.mark.full)])
    def test_a_run_without_any_finite_gradient_stops(self, points: Path, tmp_path: Path, logging_steps: int) -> None:
        trainer = trainer_for(
            "smolvla",
            points,
            points,
            tmp_path,
            max_steps=60,
            logging_steps=logging_steps,
            save_strategy="steps",
            save_steps=4,
            save_total_limit=0,
        )
        spoil_gradients(trainer, range(5, 60))
        with pytest.raises(FloatingPointError, match=r"not been finite for \d+ steps.*checkpoint-4\b"):
            trainer.train()
        patience = max(PATIENCE, logging_steps)
        assert patience <= trainer.state.global_step - 5 <= patience + logging_steps

    @pytest.mark.full
    def test_stop_does_so_at_the_next_row(self, points: Path, tmp_path: Path) -> None:
        trainer = trainer_for("act", points, points, tmp_path, nonfinite="stop")
        spoil_gradients(trainer, {1})
        with pytest.raises(ValueError, match="gradient of a step was not finite"):
            trainer.train()
        assert trainer.state.global_step == 5


class TestMixedPrecision:
    """With SmolVLA: CPUs that have no arithmetic for float16 take ten times as long for the convolutions of ACT's ResNet."""

    def trainer(self, points: Path, folder: Path, scaler: GradScaler, **settings: Any) -> PTRTrainer:
        """PTRTrainer with a real GradScaler; Accelerate builds one for GPUs alone, so it is put into its place here."""
        trainer = trainer_for("smolvla", points, points, folder, logging_steps=2, **settings)
        trainer.accelerator.scaler = scaler
        trainer.accelerator.native_amp = True
        return trainer

    @pytest.fixture(autouse=True)
    def fp16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Accelerate's word for it, which makes it unscale gradients before they are clipped."""
        monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda _: "fp16"))

    @pytest.mark.full
    def test_overflows_of_the_scaler_are_nobodys_fault(
        self, points: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The scale starts so high that the first steps overflow, as it does in every such run."""
        scaler = GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-32, growth_interval=1000)
        trainer = self.trainer(points, tmp_path, scaler, max_steps=10)
        before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
        trainer.train()
        assert scaler.get_scale() < 2.0**127, "some steps overflowed"
        assert all(row["nonfinite_gradients"] == 0 for row in rows_of(trainer))
        assert all(value.isfinite().all() for value in trainer.policy.parameters())
        assert not tensors_equal(before, dict(trainer.policy.named_parameters())), "later steps did not"
        assert "not finite" not in caplog.text

    @pytest.mark.full
    def test_a_scale_that_has_nowhere_to_fall_stops_the_run(self, points: Path, tmp_path: Path) -> None:
        scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        trainer = self.trainer(points, tmp_path, scaler, max_steps=60)
        spoil_gradients(trainer, range(60))
        with pytest.raises(FloatingPointError, match="no older checkpoint"):
            trainer.train()
        assert scaler.get_scale() < 1.0


@pytest.mark.full
def test_two_ranks_count_and_name_together(points: Path, tmp_path: Path) -> None:
    """They meet different numbers of bad samples, and one alone a NaN gradient; both log, write and step the same."""
    root = spoiled(points, tmp_path / "bad", {("action", FRAME): np.nan, ("observation.state", 90): np.inf})
    command = [sys.executable, str(Path(__file__).with_name("nonfinite_ranks.py")), points, root, tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["samples"] == ranks[1]["samples"]
    assert sum(ranks[0]["samples"]) == ranks[0]["met"] + ranks[1]["met"] > 0
    assert ranks[0]["met"] != ranks[1]["met"]
    assert [rank["gradients"] for rank in ranks] == [[0.0, 1.0, 0.0]] * 2
    assert [rank["sharded"] for rank in ranks] == [[0.0] * 4] * 2
    kept = json.loads((tmp_path / "run" / NONFINITE_FILE).read_text())
    assert sum(row["times"] for row in kept["frames"]) == sum(ranks[0]["samples"])
    assert {row["index"] for row in kept["frames"]} <= {FRAME, 90}
    assert done.stderr.count("40 (episode 1)") <= 1, "one of the ranks says so"
    states = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    assert tensors_equal(*states)
    assert all(value.isfinite().all() for value in states[0].values())


def test_nothing_is_read_off_the_device(points: Path) -> None:
    """On PyTorch's meta device there are no values, so any look at one raises."""
    policy = ptr_policy("act", points, segment_length=2, consequence_offset=4)
    layout = policy.config.layout
    batch = raw_batch(policy, points, [0, 31, FRAME])
    screen = Screen(layout, policy.config.input_features, substitute=True)
    screened, frames = screen.before(on_meta(batch))
    rows, frames = screen.after(on_meta(segment_rows(batch, layout)), frames)
    watch = NonFiniteWatch()
    watch.add_frames("values", frames, rows["episode_index"][:3])
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    parameter.grad = torch.zeros(3, device="meta")
    watch.guard(torch.zeros((), device="meta"), [parameter])
    assert screened["action_is_pad"].device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(frames[0] > 0)


def on_meta(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in batch.items()}
