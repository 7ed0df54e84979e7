"""The same PTRTrainer run in 1, 2 and 4 gloo processes: how far do the gradients differ?

    python tests/distributed_gradients.py results/distribution.json

One process imports everything and forks the ranks of every run. The last batch of the epoch is uneven, the queue, its hard
negatives and the belief are on, and every step's gradient is compared, from parameters that have followed their own run so far.
"""

import json
import math
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demonstrations import write_dataset
from meeting import meeting_place
from safetensors.torch import load_file, save_file
from small_policies import base_policy
from torch import Tensor, nn
from transformers import TrainerCallback

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.policies.base import unwrap

WORLDS = (1, 2, 4)
EPISODES = (12, 10, 8)
BATCH = 12
"""Of the 30 frames two full batches and one of 6, which four ranks of three rows each cannot share evenly."""


@dataclass(frozen=True)
class Case:
    """One comparison: a policy and the arguments of its runs."""

    family: str
    accumulation: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[int, ...] = WORLDS
    slow: bool = False

    @property
    def name(self) -> str:
        extra = [f"{key}={value}" for key, value in self.settings.items()]
        return ", ".join([self.family, f"accumulation {self.accumulation}", *extra])


CASES = (
    Case("act", slow=True),
    Case("act", 2, slow=True),
    # two processes are compared with accumulation
    Case("smolvla", worlds=(1, 4)),
    Case("smolvla", 2, slow=True),
    Case("act", 2, {"shuffle_consequences": True}, (1, 2), slow=True),
    Case("act", 1, {"preset": "ptr_calibrated"}, (1, 2), slow=True),
    Case("smolvla", 1, {"accelerator_config": {"split_batches": True}}, (1, 2), slow=True),
)
BASES = {"act": {"dropout": 0.0, "use_vae": False, "feedforward_activation": "gelu"}, "smolvla": {}}


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimiser step."""

    def __init__(self) -> None:
        self.steps: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.steps[f"gradient.{state.global_step}"] = torch.cat(parts).clone()


def smooth(module: nn.Module) -> None:
    """ReLU and max-pooling have no gradient at a tie, and another order of a sum may fall to its other side; these have."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.GELU())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        else:
            smooth(child)


def share_noise(trainer: PTRTrainer) -> None:
    """Flow matching draws noise and times; here a row's depend on its place in the global batch, not on its rank."""
    core = unwrap(trainer.policy.base).model
    calls = {"noise": 0, "time": 0}

    def rows(kind: str, count: int, draw: Any) -> Tensor:
        calls[kind] += 1
        first = trainer.args.process_index * count
        drawn = []
        for place in range(first, first + count):
            source = torch.Generator().manual_seed(1_000_003 * calls[kind] + place)
            drawn.append(draw(source))
        return torch.stack(drawn)

    core.sample_noise = lambda shape, device: rows("noise", shape[0], lambda g: torch.randn(shape[1:], generator=g))
    core.sample_time = lambda bsize, device: rows("time", bsize, lambda g: torch.rand((), generator=g) * 0.9 + 0.05)


def train(case: Case, world: int, points: Path, folder: Path) -> None:
    """One rank's run; what it has seen goes to a file of its own."""
    torch.set_num_threads(1)
    # the side pathway's first weights
    torch.manual_seed(0)
    split = case.settings.get("accelerator_config", {}).get("split_batches", False)
    steps = math.ceil(math.ceil(sum(EPISODES) / BATCH) / case.accumulation)
    options: dict[str, Any] = {
        "preset": "ptr",
        "output_dir": str(folder / "run"),
        "max_steps": steps + 2,
        "per_device_train_batch_size": BATCH if split else BATCH // world,
        "gradient_accumulation_steps": case.accumulation,
        "segment_length": 2,
        "num_belief_tokens": 2,
        "queue_size": 64,
        "queue_negatives": 8,
        "scorer_warmup_steps": 1,
        "controller_interval": 1,
        "score_refresh_steps": 1,
        "head_dim": 16,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if world > 1 else None,
    }
    args = PTRTrainingArguments(**(options | case.settings))
    kept, policy = Gradients(), base_policy(case.family, points, **BASES[case.family])
    if case.family == "act":
        smooth(policy)
    trainer = PTRTrainer(policy, args, points, callbacks=[kept])
    assert trainer.accelerator.num_processes == args.world_size == world
    if case.family == "smolvla":
        share_noise(trainer)
    if trainer.policy.objective is not None:
        # the controller would take many more steps to ask for hard negatives
        trainer.policy.objective.controller.enabled = False
        trainer.policy.objective.controller.hard_negative_ratio.fill_(0.5)
    trainer.train()
    side = {f"side.{name}": value for name, value in trainer.policy.side_state_dict().items()}
    sizes = {"processes": torch.tensor(trainer.accelerator.num_processes)}
    save_file(
        {name: value.detach().clone().contiguous() for name, value in (kept.steps | side | sizes).items()},
        folder / f"rank-{args.process_index}.safetensors",
    )


def run(case: Case, world: int, points: Path, folder: Path) -> list[dict[str, Tensor]]:
    """Fork the ranks of one run and read what they have seen."""
    folder.mkdir(parents=True)
    _store, place = meeting_place()
    ranks = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ["ACCELERATE_USE_CPU"] = "true"
                if world > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                    os.environ |= {"LOCAL_WORLD_SIZE": str(world), **place}
                train(case, world, points, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    if any(codes):
        raise RuntimeError(f"{case.name}: of {world} processes some failed ({codes}).")
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(world)]


def compare(case: Case, points: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for every number of processes: the largest relative difference of a step's gradient to one process's."""
    rows: list[dict[str, Any]] = []
    alone: dict[str, Tensor] = {}
    for world in case.worlds:
        ranks = run(case, world, points, folder / str(world))
        alone = alone or ranks[0]
        steps = sorted(name for name in alone if name.startswith("gradient."))
        side = [name for name in alone if name.startswith("side.") and alone[name].is_floating_point()]
        rows.append(
            {
                "case": case.name,
                "processes": int(ranks[0]["processes"]),
                "ranks_agree": all(
                    torch.equal(rank[name].nan_to_num(), ranks[0][name].nan_to_num()) for rank in ranks for name in side
                ),
                "gradient_norm": float(alone[steps[-1]].norm()),
                "relative_gradient_differences": [
                    float((ranks[0][name] - alone[name]).norm() / alone[name].norm()) for name in steps
                ],
                "queue_as_alone": all(
                    torch.equal(ranks[0][name], alone[name])
                    for name in alone
                    if name.startswith("side.objective.queue.") and not alone[name].is_floating_point()
                ),
            }
        )
    return rows


def main(output: Path, slow: tuple[bool, ...] = (False, True)) -> None:
    """Run the cases that are slow, or not, or all, and write their rows."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        points = write_dataset(Path(scratch) / "points", EPISODES)
        torch.manual_seed(0)
        for family, settings in BASES.items():
            base_policy(family, points, **settings)
        for number, case in enumerate(case for case in CASES if case.slow in slow):
            rows += compare(case, points, Path(scratch) / str(number))
            for row in rows[-len(case.worlds) :]:
                print(row, flush=True)
    output.write_text(
        json.dumps({"command": f"python tests/{Path(__file__).name} FILE", "runs": rows}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *[(word == "slow",) for word in sys.argv[2:]])
