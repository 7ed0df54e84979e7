"""Are actions and instructions identifiable from what followed? Heads that judge only episodes they have not learned from.

Episodes fall into two folds, task by task. The head of a fold learns from the other one. A quarter of that fold's
episodes, which it does not learn from either, decides when it stops and how sure it may be, so that a nat is worth a nat;
its candidates come from one fold at a time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.diagnosis.collect import rows_of
from ptr_hf.method import masked_derangement
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores.identification import LOGIT_CLAMP, ActionHead, InstructionHead

CANDIDATES = 64
"""Chunks that are compared with each other, as in a training step of 16 segments of 4 chunks."""
PASSES = 8
"""Judgements of every chunk, each among other candidates: their mean is what the chunk's verdict is."""
CHECK_INTERVAL = 20
SELECTING = 4
"""One in so many episodes of a fold decides when its head stops."""
SHARPNESS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""What a head's logits may be multiplied with: a head that has memorised is surer than it is right."""

Answer = Callable[[Evidence], Int[Tensor, " batch"]]


@dataclass(frozen=True)
class Verdicts:
    """Of every chunk, NaN without a future.

    Attributes:
        value: log of how much likelier than a guess its own label was, nats; 0 is chance.
        null: the same of another chunk's label.
        correct: how often its own label was the likeliest.
        candidates: how many labels there were.
    """

    value: Float[Tensor, " chunks"]
    null: Float[Tensor, " chunks"]
    correct: Float[Tensor, " chunks"]
    candidates: float


def two_folds(task: Int[Tensor, " chunks"], episode: Int[Tensor, " chunks"], seed: int = 0) -> Int[Tensor, " chunks"]:
    """0 or 1 for every chunk, the same for all of an episode, with half of each task's episodes in either."""
    source = torch.Generator().manual_seed(seed)
    fold = torch.zeros_like(episode)
    turn = 0
    for number in task.unique():
        own = episode[task == number].unique()
        for place in torch.randperm(len(own), generator=source).tolist():
            fold[episode == own[place]] = turn % 2
            turn += 1
    return fold


def identify_actions(
    evidence: Evidence,
    fold: Int[Tensor, " chunks"],
    *,
    shuffled: bool = False,
    steps: int = 400,
    hidden_dim: int = 128,
    seed: int = 0,
) -> Verdicts:
    """T_a: which of the candidates' actions led from o_t to o_{t+Δ}? See `cross_fitted`."""
    dim, width = evidence.current.shape[1], evidence.action.flatten(1).shape[1]
    return cross_fitted(
        lambda: ActionHead(dim, width, hidden_dim),
        lambda batch: torch.arange(len(batch.loss)),
        evidence,
        fold,
        shuffled=shuffled,
        steps=steps,
        seed=seed,
    )


def identify_instructions(
    evidence: Evidence,
    fold: Int[Tensor, " chunks"],
    num_tasks: int,
    *,
    shuffled: bool = False,
    steps: int = 400,
    hidden_dim: int = 128,
    seed: int = 0,
) -> Verdicts:
    """T_l: which of the dataset's instructions was followed? See `cross_fitted`."""
    return cross_fitted(
        lambda: InstructionHead(evidence.current.shape[1], num_tasks, hidden_dim),
        lambda batch: batch.task,
        evidence,
        fold,
        shuffled=shuffled,
        steps=steps,
        seed=seed,
    )


def cross_fitted(
    make: Callable[[], nn.Module],
    answer: Answer,
    evidence: Evidence,
    fold: Int[Tensor, " chunks"],
    *,
    shuffled: bool,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Verdicts:
    """Verdicts on either fold by a head that has learned from the other.

    Args:
        make: builds a head, which gives logits (batch, labels).
        answer: the label of every chunk, a column of the logits.
        evidence: of the whole dataset.
        fold: of every chunk.
        shuffled: control: give every chunk another one's future.
        steps: at most so many.
        learning_rate: of AdamW.
        seed: of weights, batches and shuffling.
    """
    value, null, correct = torch.full((3, len(fold)), torch.nan)
    candidates = []
    for number in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            head = make()
        source = torch.Generator().manual_seed(seed + number)
        others = ((fold != number) & evidence.target_valid).nonzero()[:, 0]
        rows = ((fold == number) & evidence.target_valid).nonzero()[:, 0]
        if len(others) < 2 or len(rows) < 2:
            continue
        sharpness = _learn(head, answer, evidence, others, steps, learning_rate, shuffled, source)
        total = torch.zeros(3, len(fold))
        with torch.no_grad():
            for _ in range(PASSES):
                for batch_rows in _mixed(rows, source):
                    batch = _batch(evidence, batch_rows, shuffled, source)
                    own = answer(batch)
                    other, _ = _permutation(len(batch.loss), source)
                    logits = _logits(head, batch)
                    shares = _nats(logits * sharpness)
                    picked = [shares.gather(1, label[:, None])[:, 0] for label in (own, own[other])]
                    total[:, batch_rows] += torch.stack([*picked, (logits.argmax(dim=1) == own).float()])
                    candidates.append(logits.shape[1])
        value[rows], null[rows], correct[rows] = total[:, rows] / PASSES
    return Verdicts(value, null, correct, sum(candidates) / max(1, len(candidates)))


def _learn(
    head: nn.Module,
    answer: Answer,
    evidence: Evidence,
    rows: Int[Tensor, " rows"],
    steps: int,
    learning_rate: float,
    shuffled: bool,
    source: torch.Generator,
) -> float:
    """Train on three quarters of the episodes; keep the weights, and return the sharpness, that serve the last quarter best."""
    episodes = evidence.episode[rows].unique()
    chosen = episodes[torch.randperm(len(episodes), generator=source)[: len(episodes) // SELECTING]]
    selecting = torch.isin(evidence.episode[rows], chosen)
    teaching, deciding = rows[~selecting], rows[selecting]
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.1)
    best, sharpness, kept = -torch.inf, 1.0, head.state_dict()
    for step in range(1, steps + 1):
        picked = teaching[torch.randperm(len(teaching), generator=source)[:CANDIDATES]]
        batch = _batch(evidence, picked, shuffled, source)
        optimizer.zero_grad()
        functional.cross_entropy(_logits(head, batch), answer(batch)).backward()
        optimizer.step()
        if len(deciding) > 1 and (step % CHECK_INTERVAL == 0 or step == steps):
            nats = _served(head, answer, evidence, deciding, shuffled)
            if float(nats.max()) > best:
                best, sharpness, kept = (
                    float(nats.max()),
                    SHARPNESS[int(nats.argmax())],
                    copy.deepcopy(head.state_dict()),
                )
    if len(deciding) > 1:
        head.load_state_dict(kept)
    return sharpness


@torch.no_grad()
def _served(
    head: nn.Module, answer: Answer, evidence: Evidence, rows: Int[Tensor, " rows"], shuffled: bool
) -> Float[Tensor, " sharpness"]:
    """Nats above chance, summed over two passes that always have the same candidates, for every sharpness."""
    source = torch.Generator().manual_seed(0)
    total = torch.zeros(len(SHARPNESS))
    for _ in range(2):
        for batch_rows in _mixed(rows, source):
            batch = _batch(evidence, batch_rows, shuffled, source)
            logits, own = _logits(head, batch), answer(batch)[:, None]
            total += torch.stack([_nats(logits * sharpness).gather(1, own).sum() for sharpness in SHARPNESS])
    return total


def _logits(head: nn.Module, batch: Evidence) -> Float[Tensor, "batch labels"]:
    return head(batch).clamp(-LOGIT_CLAMP, LOGIT_CLAMP)


def _nats(logits: Float[Tensor, "batch labels"]) -> Float[Tensor, "batch labels"]:
    """Log of how much likelier than a guess every label is."""
    return logits.log_softmax(dim=1) + torch.tensor(float(logits.shape[1])).log()


def _mixed(rows: Int[Tensor, " rows"], source: torch.Generator) -> tuple[Int[Tensor, " batch"], ...]:
    """All rows in random batches of about `CANDIDATES`, none much smaller than the others."""
    order = rows[torch.randperm(len(rows), generator=source)]
    return order.tensor_split(max(1, round(len(rows) / CANDIDATES)))


def _permutation(rows: int, source: torch.Generator) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Another row for every row."""
    return masked_derangement(torch.ones(rows, dtype=torch.bool), torch.rand(rows, generator=source))


def _batch(evidence: Evidence, rows: Int[Tensor, " batch"], shuffled: bool, source: torch.Generator) -> Evidence:
    batch = rows_of(evidence, rows)
    if not shuffled:
        return batch
    other, _ = _permutation(len(batch.loss), source)
    return replace(batch, target=batch.target[other])
