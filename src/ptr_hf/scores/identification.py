"""The roles swapped: which action, which instruction, belongs to what happened between o_t and o_{t+Δ}? (ours)

    T_a = log softmax_j s([z, y, y-z], e_j) + log K       over all ranks' action chunks: an estimate of I(a; o′ | o)
    T_l = log softmax_l s([z, y, y-z], l)   + log N       over the dataset's instructions

z and y are the consequence embeddings of o_t and o_{t+Δ}; every input is a constant, so the heads never touch the policy.
Both heads are cross-fitted: episodes fall into two folds, each fold is scored by the head that was trained on the other,
and a head cannot recognise an episode whose wrong label it has memorised. The second head costs one small MLP.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.method import full_precision, masked_derangement
from ptr_hf.method.draws import Draws, Purpose
from ptr_hf.method.evidence import Evidence
from ptr_hf.scores.score import Score, Scored

LOGIT_CLAMP = 20.0


class OutcomeEncoder(nn.Module):
    """[z, y, y-z] → hidden: each part on its own scale, and how much changed at all as one more number."""

    def __init__(self, target_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(target_dim) for _ in range(3))
        self.layers = nn.Sequential(
            nn.Linear(3 * target_dim + 1, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU()
        )

    def forward(
        self, current: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch hidden"]:
        """Encode what changed."""
        change = target - current
        size = torch.log(change.norm(dim=-1, keepdim=True) + 1e-4)
        parts = [norm(part) for norm, part in zip(self.norms, (current, target, change), strict=True)]
        return self.layers(torch.cat([*parts, size], dim=-1))


class ActionHead(nn.Module):
    """s([z, y, y-z], e_j) of every chunk with the actions of all ranks' chunks."""

    def __init__(self, target_dim: int, action_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.outcome = nn.Sequential(OutcomeEncoder(target_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim))
        self.action = nn.Sequential(
            nn.LayerNorm(action_dim),
            nn.Linear(action_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.scale = hidden_dim**-0.5

    def forward(self, evidence: Evidence) -> Float[Tensor, "batch all_rows"]:
        """Logits, row i: which chunk led from o_t to o_{t+Δ} of row i?"""
        outcome = self.outcome[1](self.outcome[0](evidence.current, evidence.target))
        actions = evidence.compared_with.rows.gather(self.action(evidence.action.flatten(1)))
        return outcome @ actions.T * self.scale


class InstructionHead(nn.Module):
    """s([z, y, y-z], l) for every instruction of the dataset."""

    def __init__(self, target_dim: int, num_tasks: int, hidden_dim: int) -> None:
        super().__init__()
        self.outcome = OutcomeEncoder(target_dim, hidden_dim)
        self.instruction = nn.Linear(hidden_dim, num_tasks)

    def forward(self, evidence: Evidence) -> Float[Tensor, "batch tasks"]:
        """Logits, row i: which instruction was being followed?"""
        return self.instruction(self.outcome(evidence.current, evidence.target))


class CrossFitted(Score):
    """Two heads of one kind; without cross-fitting a single head learns from and scores every episode."""

    has_chance = True

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def logits(self, evidence: Evidence) -> tuple[Float[Tensor, "batch candidates"], Float[Tensor, "batch candidates"]]:
        """(of the head that has not learned from the row's episode, of the head that learns from it)."""
        with full_precision(evidence.target.device):
            outputs = [head(evidence).clamp(-LOGIT_CLAMP, LOGIT_CLAMP) for head in self.heads]
        if len(outputs) == 1:
            return outputs[0], outputs[0]
        first = (fold(evidence.episode) == 0)[:, None]
        return torch.where(first, outputs[0], outputs[1]), torch.where(first, outputs[1], outputs[0])


def fold(episode: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The fold, 0 or 1, of an episode: a hash, because consecutive episodes may take turns over tasks."""
    return ((episode * 2_654_435_761) % 2**32 >> 15) & 1


def _log_share(logits: Float[Tensor, "batch candidates"], candidates: Bool[Tensor, " candidates"]) -> Tensor:
    """log softmax over the candidates, plus the log of their number: 0 is chance."""
    masked = logits.masked_fill(~candidates, -torch.inf)
    count = candidates.sum().clamp(min=1).to(logits.dtype)
    return masked.log_softmax(dim=1).nan_to_num(neginf=-4 * LOGIT_CLAMP) + count.log()


class ActionIdentification(CrossFitted):
    """T_a: finds labels that do not lead to what followed (wrong convention, delay, scale, lost actions).

    Blind to wrong instructions. Its null is the same head's verdict on another chunk's action.
    """

    def __init__(self, target_dim: int, action_dim: int, hidden_dim: int = 128, cross_fit: bool = True) -> None:
        super().__init__([ActionHead(target_dim, action_dim, hidden_dim) for _ in range(2 if cross_fit else 1)])

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """T_a of every chunk with a future, among all ranks' chunks."""
        usable, own = evidence.compared_with.valid, evidence.compared_with.rows.own(evidence.loss.device)
        other, several = masked_derangement(
            usable, draws.keys(evidence.compared_with.rows, Purpose.NULL_ACTION, usable.device)
        )
        held_out, learning = self.logits(evidence)
        shares = _log_share(held_out.detach(), usable)
        loss = -_log_share(learning, usable).gather(1, own[:, None])[:, 0]
        valid = evidence.target_valid & several[own]
        return Scored(
            value=shares.gather(1, own[:, None])[:, 0],
            valid=valid,
            null=shares.gather(1, other[own][:, None])[:, 0],
            loss=loss.masked_fill(~valid, 0.0),
            correct=valid & (shares.argmax(dim=1) == own),
            candidates=usable.sum(),
        )


class InstructionIdentification(CrossFitted):
    """T_l: finds episodes filed under another instruction; blind to everything else.

    Its null is the same head's verdict on another instruction.
    """

    def __init__(self, target_dim: int, num_tasks: int, hidden_dim: int = 128, cross_fit: bool = True) -> None:
        super().__init__([InstructionHead(target_dim, num_tasks, hidden_dim) for _ in range(2 if cross_fit else 1)])
        self.num_tasks = num_tasks

    def forward(self, evidence: Evidence, draws: Draws) -> Scored:
        """T_l of every chunk with a future; nothing with a single instruction, or of one that the head does not know."""
        held_out, learning = self.logits(evidence)
        every = torch.ones(self.num_tasks, dtype=torch.bool, device=held_out.device)
        task = evidence.task.clamp(0, self.num_tasks - 1)
        rows = evidence.compared_with.rows
        keys = draws.keys(rows, Purpose.NULL_INSTRUCTION, task.device)[rows.own(task.device)]
        shift = 1 + (keys * (self.num_tasks - 1)).to(task.dtype)
        shares = _log_share(held_out.detach(), every)
        valid = evidence.target_valid & (evidence.task < self.num_tasks) & (self.num_tasks > 1)
        loss = functional.cross_entropy(learning, task, reduction="none")
        return Scored(
            value=shares.gather(1, task[:, None])[:, 0],
            valid=valid,
            null=shares.gather(1, ((task + shift) % self.num_tasks)[:, None])[:, 0],
            loss=loss.masked_fill(~valid, 0.0),
            correct=valid & (shares.argmax(dim=1) == task),
            candidates=torch.full_like(task[:1].sum(), self.num_tasks),
        )
