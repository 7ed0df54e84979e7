"""One rank of test_distributed.py: the same steps in every process, whatever their number."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from builders import make_chunks, make_objective, make_samples, seeded
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ptr_hf.method import (
    ChunkBatch,
    GlobalRows,
    Samples,
    gather_samples,
    global_self_normalized_loss,
    self_normalized_loss,
)

CHUNKS, SEGMENTS, STEPS = 2, 4, 3
ROWS = CHUNKS * SEGMENTS
TERMS = ("action", "identification", "ranking", "tokenizer", "loss")


class Policy(nn.Module):
    """A policy of three linear maps around the objective: one module, one forward, as data-parallel training needs."""

    def __init__(self, term: str) -> None:
        super().__init__()
        self.objective = make_objective(queue_negatives=4, capacity=16)
        self.objective.controller.hard_negative_ratio.fill_(0.5)
        self.context, self.action, self.loss = nn.Linear(6, 10), nn.Linear(6, 5), nn.Linear(6, 1)
        self.entropy = nn.Linear(6, 1)
        self.term = term

    def forward(self, x: Tensor, samples: Samples, chunk_valid: Tensor) -> Tensor:
        output = self.objective(
            ChunkBatch(
                loss=self.loss(x).square().squeeze(1),
                context=self.context(x),
                action=self.action(x),
                samples=samples,
                chunk_valid=chunk_valid,
                entropy=self.entropy(x).square().squeeze(1),
                diversity=torch.zeros(len(x)),
                segment_length=CHUNKS,
            )
        )
        # every parameter takes part, so that data-parallel training has nothing unused to wait for
        unused = 0.0 * sum(parameter.sum() for parameter in self.parameters())
        return self.objective.combine(output)[self.term] + unused


def union_batch(step: int) -> tuple[Tensor, Samples, Tensor]:
    """What all ranks see together; few targets and chunks are missing, most of them on the first rank."""
    x = torch.randn(ROWS, 6, generator=seeded(step))
    missing = torch.arange(ROWS) < 2
    samples = make_samples(ROWS, seed=step, valid=~missing)
    return x, samples, torch.arange(ROWS) != step


def run(folder: Path) -> None:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    numbering = GlobalRows(CHUNKS, SEGMENTS // ranks, rank, ranks)
    rows = numbering.own()
    results: dict[str, Tensor] = {}

    def part(values: Samples) -> Samples:
        return Samples(**{name: value[rows] for name, value in vars(values).items()})

    for term in TERMS:
        policy = Policy(term)
        model: Any = DistributedDataParallel(policy) if ranks > 1 else policy
        for step in range(STEPS):
            x, samples, chunk_valid = union_batch(step)
            policy.zero_grad()
            loss = model(x[rows], part(samples), chunk_valid[rows])
            loss.backward()
            results[f"{term}.{step}.loss"] = loss.detach() / ranks
            for name, parameter in policy.named_parameters():
                assert parameter.grad is not None
                results[f"{term}.{step}.grad.{name}"] = parameter.grad.clone()
                # a torch.optim optimizer would spend seconds on imports
                parameter.data.sub_(parameter.grad, alpha=0.1)
            policy.objective.after_step()
        policy.objective.update_controller()
        for name, value in policy.objective.state_dict().items():
            results[f"{term}.state.{name}"] = value

    gathered = gather_samples(part(make_samples(ROWS, seed=7, valid=torch.arange(ROWS) % 3 > 0)), numbering)
    for name, value in vars(gathered).items():
        results[f"gathered.{name}"] = value
    results["own"] = rows
    # without the exchange, each rank's weights would sum to one on their own
    loss, weight = torch.arange(8.0)[rows], torch.tensor([4.0, 4, 0.25, 0.25, 4, 4, 0.25, 0.25])[rows]
    results["global"] = global_self_normalized_loss(loss, weight) / ranks
    results["local"] = self_normalized_loss(loss, weight) / ranks

    evaluated = make_objective().eval()
    # ranks may evaluate different numbers of batches: this one must not wait for the other
    if rank == 0:
        results["evaluated"] = evaluated.combine(evaluated(make_chunks(3)))["loss"].detach()
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{ranks}-{rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, world, index = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{target / 'rendezvous'}", world_size=world, rank=index)
    run(target)
    dist.destroy_process_group()
