"""Candidate pool (Section 4.2): the consequences among which the real one must be picked out.

    Y = {y⁺} ∪ {the minibatch's other targets} ∪ {the other ranks' targets} ∪ {up to 64 drawn from a FIFO of 1024}

Column 0 is the match. The sample's own target never appears among its negatives, in the batch or in the queue. With
the hard-negative ratio ρ, a share ρ of the queue's draws is similar: same task, or near in proprioceptive state.
Everything here is constant: neither the gather nor the queue carries a gradient.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ptr_hf.method.candidate_queue import CandidateQueue
from ptr_hf.method.distributed import GlobalRows
from ptr_hf.method.draws import uniform
from ptr_hf.method.numerics import full_precision, upcast

HardNegativeKey = Literal["task", "state", "task_or_state"]


@dataclass(frozen=True)
class Samples:
    """One row per chunk: its target, whether it has one, and where it comes from (-1 = unknown)."""

    targets: Float[Tensor, "batch dim"]
    valid: Bool[Tensor, " batch"]
    task: Int[Tensor, " batch"]
    source: Int[Tensor, " batch"]
    episode: Int[Tensor, " batch"]
    frame: Int[Tensor, " batch"]
    state: Float[Tensor, "batch state_dim"]

    @property
    def usable(self) -> Bool[Tensor, " batch"]:
        """Rows with a target that is finite."""
        return self.valid & self.targets.isfinite().all(dim=-1)


@dataclass(frozen=True)
class Candidates:
    """Who competes with whom: ``index`` into a shared ``pool``, column 0 the match, ``mask`` False where no candidate.

    The (batch, candidates, dim) tensor this stands for is never built in training.
    """

    pool: Float[Tensor, "pool dim"]
    index: Int[Tensor, "batch candidates"]
    mask: Bool[Tensor, "batch candidates"]

    @property
    def targets(self) -> Float[Tensor, "batch candidates dim"]:
        """The candidates one by one; large, meant for reference and tests."""
        return self.pool[self.index]

    @property
    def count(self) -> Int[Tensor, " batch"]:
        """|Y| of each sample, 0 for a sample without a target."""
        return self.mask.sum(dim=1)

    def logits(
        self, query: Float[Tensor, "batch dim"], temperature: float | Float[Tensor, ""], clamp: float = 20.0
    ) -> Float[Tensor, "batch candidates"]:
        """d = clamp(cos(u, y) / τ, ±clamp) of every candidate (Eq. 12); masked columns hold arbitrary finite values."""
        query = upcast(query)
        with full_precision(query.device):
            pool = functional.normalize(self.pool.to(query.dtype), dim=-1, eps=1e-6)
            cosine = functional.normalize(query, dim=-1, eps=1e-6) @ pool.T
        return (cosine.gather(1, self.index) / temperature).clamp(-clamp, clamp)


@torch.no_grad()
def gather_samples(samples: Samples, rows: GlobalRows) -> Samples:
    """Every rank's samples in their global places, without gradient; the samples themselves in a single process.

    Two collectives, no exchange of sizes.
    """
    dim = samples.targets.shape[1]
    floats = rows.gather(torch.cat([samples.targets, samples.state.to(samples.targets.dtype)], dim=1).detach())
    columns = (samples.valid, samples.task, samples.source, samples.episode, samples.frame)
    integers = rows.gather(torch.stack([column.long() for column in columns], dim=1))
    return Samples(
        targets=floats[:, :dim],
        valid=integers[:, 0].bool(),
        task=integers[:, 1],
        source=integers[:, 2],
        episode=integers[:, 3],
        frame=integers[:, 4],
        state=floats[:, dim:].to(samples.state.dtype),
    )


@torch.no_grad()
def build_candidates(
    local: Samples,
    everyone: Samples,
    rows: GlobalRows | None,
    queue: CandidateQueue | None,
    num_queue_negatives: int = 64,
    hard_negative_ratio: Float[Tensor, ""] | float = 0.0,
    hard_negative_key: HardNegativeKey = "task_or_state",
    seed: int = 0,
) -> Candidates:
    """The pool Y of every local sample.

    Args:
        local: this rank's samples.
        everyone: every rank's samples (``local`` itself without gather).
        rows: which of them are ``local``; None where it is all of them.
        queue: past targets, or None.
        num_queue_negatives: entries drawn from the queue for each sample, without replacement.
        hard_negative_ratio: ρ in [0, 1], the share of them drawn from similar entries; where these are too few,
            uniform draws fill up.
        hard_negative_key: what makes an entry similar: the same task, being among the ``num_queue_negatives``
            nearest in state, or either.
        seed: of the draws; a row draws the same entries on whichever rank it is.

    Returns:
        One column for the match, one for every other row of everyone, one for every draw. A sample without a usable
        target is nobody's candidate and has an empty row.

    Raises:
        ValueError: if the key is unknown or the queue holds targets of another width.
    """
    if hard_negative_key not in get_args(HardNegativeKey):
        raise ValueError(f"hard_negative_key is '{hard_negative_key}'; choose one of {get_args(HardNegativeKey)}.")
    device, total = local.targets.device, everyone.targets.shape[0]
    rows = rows or GlobalRows(1, total)
    own = rows.own(device)
    matched, usable = local.usable, everyone.usable
    # column j of row i is row (own + j) mod total of everyone, so column 0 is the match
    index = (own[:, None] + torch.arange(total, device=device)) % total
    others = usable[index] & ~_same_target(local, everyone).gather(1, index)
    pool = torch.where(usable[:, None], everyone.targets, 0.0)
    mask = torch.cat([matched[:, None], others[:, 1:]], dim=1)
    count = 0 if queue is None else min(num_queue_negatives, queue.capacity)
    if queue is not None and count > 0:
        if queue.targets.shape[1] != pool.shape[1]:
            raise ValueError(
                f"The queue holds targets of width {queue.targets.shape[1]}, the batch's have {pool.shape[1]}; "
                "build the queue with the width of the target encoder."
            )
        drawn, drawn_mask = _draw(
            local, rows.numbers(device)[own], queue, count, hard_negative_ratio, hard_negative_key, seed
        )
        index = torch.cat([index, total + drawn], dim=1)
        pool = torch.cat([pool, queue.targets.to(pool.dtype)])
        mask = torch.cat([mask, drawn_mask], dim=1)
    return Candidates(pool, index, mask & matched[:, None])


def _same_target(samples: Samples, others: Samples | CandidateQueue) -> Bool[Tensor, "batch others"]:
    """Pairs that are one frame of one episode of one source; an unknown episode or frame is nobody's."""
    known = (samples.episode >= 0) & (samples.frame >= 0)
    return (
        known[:, None]
        & (samples.source[:, None] == others.source)
        & (samples.episode[:, None] == others.episode)
        & (samples.frame[:, None] == others.frame)
    )


def _similar_entries(
    samples: Samples,
    queue: CandidateQueue,
    eligible: Bool[Tensor, "batch capacity"],
    nearest: int,
    key: HardNegativeKey,
) -> Bool[Tensor, "batch capacity"]:
    """Eligible entries of the sample's own (known) task, or among its nearest in state, as the key says."""
    same_task = (samples.task[:, None] == queue.task) & (samples.task[:, None] >= 0)
    near = torch.zeros_like(eligible)
    if queue.state.shape[1] > 0:
        distance = torch.cdist(upcast(samples.state).to(queue.state.dtype), queue.state)
        # an unknown state is NaN and near to nothing
        distance = torch.where(eligible & distance.isfinite(), distance, torch.inf)
        smallest, position = distance.topk(nearest, dim=1, largest=False)
        near = near.scatter(1, position, smallest.isfinite())
    if key == "task":
        return eligible & same_task
    return eligible & near if key == "state" else eligible & (same_task | near)


def _draw(
    samples: Samples,
    numbers: Int[Tensor, " batch"],
    queue: CandidateQueue,
    count: int,
    hard_ratio: Float[Tensor, ""] | float,
    key: HardNegativeKey,
    seed: int,
) -> tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]]:
    """``count`` queue entries per sample without replacement: first round(ρ·count) similar ones, then uniform."""
    device = samples.targets.device
    eligible = queue.filled & ~_same_target(samples, queue)
    similar = _similar_entries(samples, queue, eligible, count, key)
    # the largest of independent uniform keys are a uniform draw without replacement
    hard_keys, keys = uniform(seed, numbers, 2 * queue.capacity).chunk(2, dim=1)
    hard_key, hard_position = hard_keys.masked_fill(~similar, -1.0).topk(count, dim=1)
    wanted = torch.arange(count, device=device) < torch.round(torch.as_tensor(hard_ratio, device=device) * count)
    hard = torch.zeros_like(eligible).scatter(1, hard_position, wanted & (hard_key >= 0))
    drawn_key, drawn = keys.masked_fill(~eligible, -1.0).masked_fill(hard, 2.0).topk(count, dim=1)
    return drawn, drawn_key >= 0
