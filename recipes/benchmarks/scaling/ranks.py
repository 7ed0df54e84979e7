"""Ranks as threads of one process: what each hands to the collectives, and whether together they do what one process does."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from ptr_hf.method import (
    AdaptiveScaleController,
    CandidateQueue,
    ChunkBatch,
    GlobalRows,
    ObjectiveConfig,
    PTRObjective,
    Samples,
    TransitionScorer,
    build_candidates,
    gather_samples,
)
from ptr_hf.scores import ActionIdentification, EpisodeTable, InstructionIdentification, ScoreWeigher, SlotMemory

CONTEXT, HEAD, TASKS, FRAMES = 12, 16, 3, 100


class Call(NamedTuple):
    """One collective: its kind, and the bytes of the tensor that a rank brings to it."""

    kind: str
    bytes: int


class SimulatedRanks:
    """Takes the place of ``torch.distributed`` in the method: a rank is a thread, and a collective is where all of them meet.

    Attributes:
        calls: of every rank, in order.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.calls: list[list[Call]] = [[] for _ in range(ranks)]
        self._brought: list[Tensor] = [torch.empty(0)] * ranks
        self._local = threading.local()
        self._combine: Callable[[list[Tensor]], Tensor] = torch.cat
        self._barrier = threading.Barrier(ranks, action=self._meet)

    def run[Result](self, work: Callable[[], Result]) -> list[Result]:
        """What ``work`` gives on every rank, which it learns from the method's own ``rank()``."""

        def on(rank: int) -> Result:
            self._local.rank = rank
            try:
                return work()
            except BaseException:
                # the others would wait for ever
                self._barrier.abort()
                raise

        with patch("ptr_hf.method.distributed.dist", self), ThreadPoolExecutor(self.ranks) as threads:
            return list(threads.map(on, range(self.ranks)))

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.ranks

    def get_rank(self) -> int:
        return self._local.rank

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(self._exchange("all-reduce", tensor, lambda parts: sum(parts[1:], parts[0])))

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        for part, row in zip(parts, self._exchange("all-gather", tensor, torch.stack), strict=True):
            part.copy_(row)

    def all_gather_into_tensor(self, whole: Tensor, tensor: Tensor) -> None:
        whole.copy_(self._exchange("all-gather", tensor, torch.cat))

    def reduce_scatter_tensor(self, part: Tensor, tensor: Tensor) -> None:
        total = self._exchange("reduce-scatter", tensor, lambda parts: sum(parts[1:], parts[0]))
        part.copy_(total.chunk(self.ranks)[self.get_rank()])

    def _exchange(self, kind: str, tensor: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        rank = self.get_rank()
        self.calls[rank].append(Call(kind, tensor.nbytes))
        self._brought[rank] = tensor.detach().clone()
        self._combine = combine
        self._barrier.wait()
        # nobody passes the next barrier before this rank has read the result
        return self._result

    def _meet(self) -> None:
        self._result = self._combine(self._brought)


@dataclass(frozen=True)
class Setup:
    """A step in METHOD's symbols: R, T, B, micro-batches A, d_y, d_s, d_e, and which of the collectives it needs.

    Attributes:
        scorer: the identification posterior (preset ``ptr``) or else ``action_identification`` with an episode memory.
        detach: ``detach_scorer_inputs``.
        across: ``cross_rank_negatives``.
    """

    ranks: int
    chunks: int
    segments: int
    micro_batches: int = 1
    target: int = 24
    state: int = 5
    action: int = 10
    scorer: bool = True
    detach: bool = False
    across: bool = True

    @property
    def rows(self) -> int:
        """N."""
        return self.chunks * self.segments

    @property
    def whole(self) -> "Setup":
        """The same step in one process."""
        return replace(self, ranks=1, segments=self.ranks * self.segments)


def predicted(setup: Setup, head: int = HEAD, heads: int = 2, scores: int = 2) -> list[Call]:
    """The collectives of a step and the bytes a rank brings to each, by formula; docs/scaling.md explains them."""
    n, r = setup.rows, setup.ranks
    width, copies = (setup.action, 1) if setup.scorer else (head, heads)
    actions = [Call("all-gather", 4 * n * width)] * copies if setup.across else []
    backward = [Call("all-reduce", 4 * r * n * width)] * copies if setup.across else []
    micro_batch = [
        Call("all-gather", 4 * n * (setup.target + setup.state)),
        Call("all-gather", 40 * n),
        *actions,
        Call("all-reduce", 4 * (5 if setup.scorer else 6)),
        *([] if setup.scorer and setup.detach else backward),
    ]
    memory = [] if setup.scorer else [Call("all-gather", 8 * n), Call("all-gather", 4 * scores * n)]
    return micro_batch * setup.micro_batches + [Call("all-reduce", 48)] + memory * setup.micro_batches


def ring_bytes(call: Call, ranks: int) -> float:
    """What a rank sends, and as much receives, in a ring: (R-1)·b for gathering b, 2(R-1)/R·b for reducing b, half to scatter."""
    shares = {"all-gather": 1.0, "all-reduce": 2.0 / ranks, "reduce-scatter": 1.0 / ranks}
    return shares[call.kind] * (ranks - 1) * call.bytes


def samples_of(rows: int, target: int, state: int, seed: int) -> Samples:
    """Rows of different frames, every seventh without a target."""
    source, count = torch.Generator().manual_seed(seed), torch.arange(rows)
    return Samples(
        targets=functional.normalize(torch.randn(rows, target, generator=source), dim=1),
        valid=count % 7 != 3,
        task=count % TASKS,
        source=torch.zeros_like(count),
        episode=count % 11,
        frame=count + 1000 * seed,
        state=torch.randn(rows, state, generator=source),
    )


def part(samples: Samples, rows: Tensor) -> Samples:
    """Some rows of samples."""
    return Samples(**{name: value[rows] for name, value in vars(samples).items()})


def full_queue(capacity: int, target: int, state: int) -> CandidateQueue:
    """A queue that past steps have filled."""
    queue, past = CandidateQueue(capacity, target, state), samples_of(2 * capacity, target, state, seed=99)
    queue.push(past.targets, past.usable, **{name: vars(past)[name] for name in ("task", "episode", "frame", "state")})
    return queue


def objective_of(setup: Setup) -> PTRObjective:
    """The objective that every rank begins with."""
    torch.manual_seed(0)
    scorer = TransitionScorer(CONTEXT, setup.action, setup.target, hidden_dim=16) if setup.scorer else None
    queue = full_queue(64, setup.target, setup.state) if setup.scorer else None
    weigher = None
    if not setup.scorer:
        scores = {
            "action_identification": ActionIdentification(setup.target, setup.action, HEAD),
            "instruction_identification": InstructionIdentification(setup.target, TASKS, HEAD),
        }
        weigher = ScoreWeigher(scores, SlotMemory(11, 11, len(scores)))
        none = torch.zeros(11, dtype=torch.int64)
        weigher.lay_out(EpisodeTable(FRAMES * torch.arange(11), none + FRAMES, none, none.bool(), TASKS))
    return PTRObjective(
        scorer,
        queue,
        AdaptiveScaleController(),
        ObjectiveConfig(queue_negatives=8, cross_rank_negatives=setup.across, detach_scorer_inputs=setup.detach),
        warmup_steps=0,
        weigher=weigher,
    )


def step(setup: Setup, objective: PTRObjective) -> dict[str, Tensor]:
    """One optimiser step of this rank, forward, backward and what follows; gradients by name."""
    objective = copy.deepcopy(objective)
    rows = GlobalRows.of_all_ranks(setup.chunks, setup.segments)
    own, total = rows.own(), rows.total
    for micro_batch in range(setup.micro_batches):
        source = torch.Generator().manual_seed(micro_batch)
        columns = torch.randn(total, CONTEXT + setup.action + 1, generator=source)[own]
        context, action, loss = columns.split([CONTEXT, setup.action, 1], dim=1)
        samples = part(samples_of(total, setup.target, setup.state, seed=micro_batch), own)
        chunks = ChunkBatch(
            loss=loss[:, 0].abs(),
            context=context,
            # stands for the policy's own action tokens, which get gradients unless they are detached
            action=action.clone().requires_grad_(),
            samples=samples,
            chunk_valid=torch.ones(len(own), dtype=torch.bool),
            entropy=torch.zeros(len(own)),
            diversity=torch.zeros(len(own)),
            segment_length=setup.chunks,
            stretches=action[:, None],
            current=samples.targets.flip(1),
            motion=loss[:, 0].abs(),
            index=FRAMES * samples.episode,
        )
        objective.combine(objective(chunks))["loss"].backward()
    objective.after_step()
    return {name: value.grad for name, value in objective.named_parameters() if value.grad is not None}


def counted(setup: Setup) -> list[Call]:
    """The collectives of a step as the method's code makes them, the same on every rank."""
    ranks, objective = SimulatedRanks(setup.ranks), objective_of(setup)
    ranks.run(lambda: step(setup, objective))
    assert all(calls == ranks.calls[0] for calls in ranks.calls), "ranks call different collectives"
    return ranks.calls[0]


def gradient_difference(setup: Setup) -> float:
    """‖mean over ranks - one process‖ / ‖one process‖ of the gradient on the same rows."""
    objective = objective_of(setup)
    gradients = SimulatedRanks(setup.ranks).run(lambda: step(setup, objective))
    whole = step(setup.whole, objective)
    mean = {name: sum(gradient[name] for gradient in gradients) / setup.ranks for name in whole}
    difference = torch.stack([(mean[name] - whole[name]).square().sum() for name in whole]).sum()
    norm = torch.stack([value.square().sum() for value in whole.values()]).sum()
    return float((difference / norm).sqrt())


def candidate_equality(setup: Setup, capacity: int = 1024, draws: int = 64) -> dict[str, Any]:
    """Whether every rank's candidates are the rows of those that one process has on the union of the batches."""
    union, queue = (
        samples_of(setup.whole.rows, setup.target, setup.state, seed=1),
        full_queue(capacity, setup.target, setup.state),
    )
    query = torch.randn(setup.whole.rows, setup.target, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"num_queue_negatives": draws, "hard_negative_ratio": 0.5, "seed": 3}
    alone = build_candidates(union, union, GlobalRows(setup.chunks, setup.whole.segments), queue, **options)
    logits = alone.logits(query, 0.12)

    def compare() -> tuple[bool, bool, bool, float]:
        rows = GlobalRows.of_all_ranks(setup.chunks, setup.segments)
        own = rows.own()
        local = part(union, own)
        found = build_candidates(local, gather_samples(local, rows), rows, queue, **options)
        distance = (found.logits(query[own], 0.12) - logits[own]).abs().masked_fill(~found.mask, 0.0).max()
        same = [torch.equal(value, vars(alone)[name][own]) for name, value in vars(found).items() if name != "pool"]
        return same[0], same[1], torch.equal(found.pool, alone.pool), float(distance)

    index, mask, pool, distance = zip(*SimulatedRanks(setup.ranks).run(compare), strict=True)
    return {
        **{name: value for name, value in asdict(setup).items() if name in ("ranks", "chunks", "segments")},
        "bit_equal": {"index": all(index), "mask": all(mask), "pool": all(pool)},
        "largest_logit_difference": max(distance),
    }
