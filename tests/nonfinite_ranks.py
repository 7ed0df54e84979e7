"""Two ranks of test_nonfinite.py in one command: a run on data with bad frames, and what each rank logged."""

import json
import os
import sys
from pathlib import Path

import torch
from meeting import meeting_place
from safetensors.torch import save_file
from small_policies import base_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ptr_hf import PTRTrainer, PTRTrainingArguments
from ptr_hf.training.nonfinite import Kind, NonFiniteWatch

RANKS = 2


def run(rank: int, points: Path, root: Path, folder: Path, place: dict[str, str]) -> None:
    """One rank."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "ACCELERATE_USE_CPU": "true",
        **place,
    }
    args = PTRTrainingArguments(
        preset="ptr",
        output_dir=str(folder / "run"),
        max_steps=12,
        logging_steps=4,
        per_device_train_batch_size=4,
        segment_length=2,
        consequence_offset=4,
        queue_size=64,
        queue_negatives=8,
        scorer_warmup_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    torch.manual_seed(0)
    trainer = PTRTrainer(base_policy("smolvla", points), args, train_dataset=root)
    assert trainer.accelerator.num_processes == RANKS
    # one rank alone meets a gradient that is not finite, at one step
    parameter = next(parameter for parameter in trainer.policy.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda grad: grad * (torch.nan if rank == 1 and trainer.state.global_step == 5 else 1.0))
    met = []
    add_frames = trainer.guard.watch.add_frames

    def count(kind: Kind, frames: torch.Tensor, episodes: torch.Tensor) -> None:
        met.append((kind, int((frames >= 0).sum())))
        add_frames(kind, frames, episodes)

    trainer.guard.watch.add_frames = count
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    figures = {
        "samples": [row["nonfinite_samples"] for row in rows],
        "gradients": [row["nonfinite_gradients"] for row in rows],
        "met": sum(number for kind, number in met if kind == "values"),
    }
    figures["sharded"] = sharded_gradient_after_the_guard(trainer.guard.watch)
    (folder / f"rank-{rank}.json").write_text(json.dumps(figures))
    state = {name: value.clone().contiguous() for name, value in trainer.policy.state_dict().items()}
    save_file(state, folder / f"rank-{rank}.safetensors")


def sharded_gradient_after_the_guard(watch: NonFiniteWatch) -> list[float]:
    """A gradient as FSDP2 shards it, one rank's part of which is not finite."""
    mesh = init_device_mesh("cpu", (RANKS,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.tensor([1.0, 2.0, torch.nan, 4.0]), mesh, [Shard(0)])
    watch.guard(nn.utils.get_total_norm([parameter.grad]), [parameter])
    assert isinstance(parameter.grad, DTensor)
    return parameter.grad.full_tensor().tolist()


if __name__ == "__main__":
    points, root, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    _store, place = meeting_place()
    workers = []
    for rank in range(RANKS):
        worker = os.fork()
        if worker == 0:
            run(rank, points, root, folder, place)
            os._exit(0)
        workers.append(worker)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) != 0 for worker in workers))
