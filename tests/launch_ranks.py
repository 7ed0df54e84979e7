"""Ranks of test_launch.py: one process imports everything once and forks two ranks for each case that is named.

Each rank writes what it was refused with, or its gradients of the first step and its tensors after the last one.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from meeting import meeting_place
from safetensors.torch import save_file
from small_policies import base_policy
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ptr_hf import PTRPolicy, PTRTrainer, PTRTrainingArguments

RANKS = 2
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
points, folder = Path(sys.argv[1]), Path(sys.argv[2])


class FirstGradients(TrainerCallback):
    """The gradients that the first optimiser step of this process takes, whole."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module | None = None, **__: Any) -> None:
        assert model is not None
        if not self.seen:
            named = ((name.removeprefix("module."), value.grad) for name, value in model.named_parameters())
            self.seen = {name: whole(grad) for name, grad in named if grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def arguments(name: str, **settings: Any) -> PTRTrainingArguments:
    defaults: dict[str, Any] = {
        "preset": "ptr",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "segment_length": 2,
        "scorer_warmup_steps": 0,
        "warmup_steps": 0,
        "head_dim": 16,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PTRTrainingArguments(output_dir=str(folder / name / "run"), **(defaults | settings))


def train(name: str, args: PTRTrainingArguments, family: str, resume: Path | None = None, **base: Any) -> None:
    # ranks that would draw different weights: rank 0's have to win
    torch.manual_seed(args.process_index)
    policy = base_policy(family, points, **base)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = FirstGradients()
    trainer = PTRTrainer(policy, args, train_dataset=points, callbacks=[gradients])
    trainer.train(resume_from_checkpoint=resume)
    rank = args.process_index
    state = {key: whole(value) for key, value in trainer.policy.state_dict().items()}
    save_file(state, folder / name / f"state-{rank}.safetensors")
    save_file(gradients.seen, folder / name / f"gradients-{rank}.safetensors")
    sharded = sum(isinstance(value, DTensor) for value in trainer.model.parameters())
    answer = {
        "kind": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "sharded": sharded,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    (folder / name / f"answer-{rank}.json").write_text(json.dumps(answer))


def pretend_gpus(args: PTRTrainingArguments) -> PTRTrainingArguments:
    """Lift Accelerate's limit of FSDP to accelerators; all that follows is its own code, on CPU tensors and gloo."""
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def in_ranks(name: str, work: Callable[[], None], environment: dict[str, str] | None = None) -> None:
    (folder / name).mkdir()
    _store, place = meeting_place()
    # a refused rank that left at once would take the meeting place from under one that is still arriving
    together = get_context("fork").Barrier(RANKS)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
                    **place,
                    **(environment or {}),
                }
                work()
            except ValueError as error:
                traceback.print_exc()
                (folder / name / f"refused-{rank}.txt").write_text(str(error))
            except BaseException:
                traceback.print_exc()
                together.abort()
                os._exit(1)
            with suppress(BrokenBarrierError):
                together.wait()
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(name, codes, flush=True)
    assert codes == [0] * RANKS, name


def build(name: str, **settings: Any) -> None:
    PTRTrainer(base_policy("act", points), arguments(name, **settings), train_dataset=points)


def unlike(name: str) -> None:
    rank = int(os.environ["RANK"])
    args = arguments(name, learning_rate=1e-4 * (rank + 1), seed=rank, run_name=f"rank {rank}")
    train(name, args, "act", dim_model=32 * (rank + 1))


def nested(name: str) -> None:
    PTRTrainer(base_policy("act", points), pretend_gpus(arguments(name)), train_dataset=points)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "act": ("act", {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}, {}),
    "smolvla": ("smolvla", {"save_strategy": "steps", "save_steps": 2}, {}),
    "frozen": ("smolvla", {"bf16": True}, {"freeze_vision_encoder": True, "train_expert_only": True}),
}


def run(name: str, case: str, sharded: bool, resume: Path | None = None) -> None:
    family, settings, base = CASES[case]
    args = arguments(name, run_name=f"rank {os.environ['RANK']}", **settings)
    train(name, pretend_gpus(args) if sharded else args, family, resume, **base)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for built in ("act", "smolvla"):
        base_policy(built, points)
    named = sys.argv[3:]
    if "refusals" in named:
        in_ranks("unlike", partial(unlike, "unlike"))
        in_ranks("uneven", partial(build, "uneven", accelerator_config={"even_batches": False}))
        in_ranks("alone", partial(build, "alone", use_cpu=False))
        in_ranks("unsynchronised", partial(build, "unsynchronised", use_cpu=False, ddp_backend="gloo"))
        in_ranks("fsdp on cpu", partial(build, "fsdp on cpu"), FSDP2)
        in_ranks("nested fsdp", partial(nested, "nested fsdp"), FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"})
    for case in [case for case in CASES if case in named]:
        in_ranks(f"{case}-ddp", partial(run, f"{case}-ddp", case, False))
        in_ranks(f"{case}-fsdp", partial(run, f"{case}-fsdp", case, True), FSDP2)
    for case in [case for case in ("act", "smolvla") if case in named]:
        checkpoints = folder / f"{case}-fsdp" / "run"
        resumed = f"{case}-fsdp-resumed"
        in_ranks(resumed, partial(run, resumed, case, True, checkpoints / "checkpoint-2"), FSDP2)
        loaded = PTRPolicy.from_pretrained(checkpoints / "checkpoint-4").state_dict()
        save_file({name: whole(value) for name, value in loaded.items()}, checkpoints.parent / "loaded.safetensors")
