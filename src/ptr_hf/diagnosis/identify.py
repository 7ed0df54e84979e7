"""Are actions and instructions identifiable from what followed? Heads that judge only episodes they have not learned from.

Episodes fall into two folds, task by task. The head of a fold learns from the other one, stops where a quarter of that
fold's episodes, which it does not learn from either, says so, and its candidates come from one fold at a time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ptr_hf.diagnosis.collect import rows_of
from ptr_hf.method import masked_derangement
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores import ActionIdentification, InstructionIdentification
from ptr_hf.scores.identification import CrossFitted

CANDIDATES = 64
"""Chunks that are compared with each other, as in a training step of 16 segments of 4 chunks."""
PASSES = 8
"""Judgements of every chunk, each among other candidates: their mean is what the chunk's verdict is."""
CHECK_INTERVAL = 20
SELECTING = 4
"""One in so many episodes of a fold decides when its head stops."""


@dataclass(frozen=True)
class Verdicts:
    """Of every chunk, NaN without a future.

    Attributes:
        value: log of how much likelier than a guess its own label was, nats; 0 is chance.
        null: the same of a label that is not its own.
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
    evidence: Evidence, fold: Int[Tensor, " chunks"], *, hidden_dim: int = 128, **options: object
) -> Verdicts:
    """T_a: which of the candidates' actions led from o_t to o_{t+Δ}? See `cross_fitted` for the options."""
    width = evidence.action.flatten(1).shape[1]
    return cross_fitted(
        lambda: ActionIdentification(evidence.current.shape[1], width, hidden_dim, cross_fit=False),
        evidence,
        fold,
        **options,  # type: ignore[arg-type]
    )


def identify_instructions(
    evidence: Evidence, fold: Int[Tensor, " chunks"], num_tasks: int, *, hidden_dim: int = 128, **options: object
) -> Verdicts:
    """T_l: which of the dataset's instructions was followed? See `cross_fitted` for the options."""
    return cross_fitted(
        lambda: InstructionIdentification(evidence.current.shape[1], num_tasks, hidden_dim, cross_fit=False),
        evidence,
        fold,
        **options,  # type: ignore[arg-type]
    )


def cross_fitted(
    make: Callable[[], CrossFitted],
    evidence: Evidence,
    fold: Int[Tensor, " chunks"],
    *,
    shuffled: bool = False,
    steps: int = 400,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Verdicts:
    """Verdicts on either fold by a head that has learned from the other.

    Args:
        make: builds a head without cross-fitting of its own.
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
        _learn(head, evidence, others, steps, learning_rate, shuffled, source)
        total = torch.zeros(3, len(fold))
        with torch.no_grad():
            for _ in range(PASSES):
                for batch_rows in _mixed(rows, source):
                    scored = head(_batch(evidence, batch_rows, shuffled, source), source)
                    assert scored.null is not None
                    assert scored.correct is not None
                    assert scored.candidates is not None
                    total[:, batch_rows] += torch.stack([scored.value, scored.null, scored.correct.float()])
                    candidates.append(int(scored.candidates))
        value[rows], null[rows], correct[rows] = total[:, rows] / PASSES
    return Verdicts(value, null, correct, sum(candidates) / max(1, len(candidates)))


def _learn(
    head: CrossFitted,
    evidence: Evidence,
    rows: Int[Tensor, " rows"],
    steps: int,
    learning_rate: float,
    shuffled: bool,
    source: torch.Generator,
) -> None:
    """Train on three quarters of the episodes; the weights that serve the last quarter best are kept."""
    episodes = evidence.episode[rows].unique()
    chosen = episodes[torch.randperm(len(episodes), generator=source)[: len(episodes) // SELECTING]]
    selecting = torch.isin(evidence.episode[rows], chosen)
    teaching, deciding = rows[~selecting], rows[selecting]
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    # a head that never gets better than its random start stays there, near chance
    best, kept = _loss(head, evidence, deciding, shuffled), copy.deepcopy(head.state_dict())
    for step in range(1, steps + 1):
        picked = teaching[torch.randperm(len(teaching), generator=source)[:CANDIDATES]]
        scored = head(_batch(evidence, picked, shuffled, source), source)
        assert scored.loss is not None
        optimizer.zero_grad()
        scored.loss.mean().backward()
        optimizer.step()
        if len(deciding) > 1 and (step % CHECK_INTERVAL == 0 or step == steps):
            loss = _loss(head, evidence, deciding, shuffled)
            if loss < best:
                best, kept = loss, copy.deepcopy(head.state_dict())
    if len(deciding) > 1:
        head.load_state_dict(kept)


@torch.no_grad()
def _loss(head: CrossFitted, evidence: Evidence, rows: Int[Tensor, " rows"], shuffled: bool) -> float:
    """Minus the summed verdicts of two passes, always among the same candidates."""
    source = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(2 if len(rows) else 0):
        for batch_rows in _mixed(rows, source):
            total -= float(head(_batch(evidence, batch_rows, shuffled, source), source).value.sum())
    return total


def _mixed(rows: Int[Tensor, " rows"], source: torch.Generator) -> tuple[Int[Tensor, " batch"], ...]:
    """All rows in random batches of about `CANDIDATES`, none much smaller than the others."""
    order = rows[torch.randperm(len(rows), generator=source)]
    return order.tensor_split(max(1, round(len(rows) / CANDIDATES)))


def _batch(evidence: Evidence, rows: Int[Tensor, " batch"], shuffled: bool, source: torch.Generator) -> Evidence:
    batch = rows_of(evidence, rows)
    if not shuffled:
        return batch
    other, _ = masked_derangement(torch.ones_like(batch.target_valid), source)
    return replace(batch, target=batch.target[other])
