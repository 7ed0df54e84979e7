"""Can what followed be told from the action? The paper's question, with a scorer that has converged (Eq. 12 to 14)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.scoring.crossfit import CrossFit, FoldedMLP, Reweigh, taken
from ptr_hf.scoring.question import Answer, CannotAskError, Question

HORIZON = 8
"""Δ, frames from the action to its consequence."""
WIDTH, TEMPERATURE, CANDIDATES = 32, 0.12, 256


class ConsequenceFromAction(Question):
    """Pick out the state that followed from those that followed elsewhere, given the state and the actions up to it."""

    name = "consequence_from_action"
    title = "Does what happened follow from the actions?"
    sentence = "what happened does not follow from the actions"

    def ask(self, fit: CrossFit, reweigh: Reweigh) -> Answer:
        """T of every frame, in nats, among the consequences of 256 frames of the whole dataset."""
        if not fit.recordings.state.shape[1]:
            raise CannotAskError("there is no proprioception, so nothing is known of what followed an action")
        if fit.folds < 2:
            raise CannotAskError("it takes two episodes to judge one by the other")
        size = fit.state.shape[1]
        network = _Scorer(fit, torch.Generator().manual_seed(fit.settings.seed))
        others = torch.as_tensor(fit.rows, device=fit.settings.device)
        drawn = torch.randint(len(others), (CANDIDATES,), generator=torch.Generator().manual_seed(fit.settings.seed))
        pool = others[drawn.to(others.device)]

        def before(rows: Tensor) -> Tensor:
            flat = rows.reshape(-1)
            state = taken(fit.state, flat)
            acted = taken(fit.action, fit.at(flat, range(HORIZON)))
            step = state - taken(fit.state, fit.at(flat, (-1,))[:, 0])
            return torch.cat([state, step, acted.flatten(1)], dim=1).reshape(*rows.shape, -1)

        def after(rows: Tensor) -> Tensor:
            flat = rows.reshape(-1)
            followed = taken(fit.state, fit.at(flat, (HORIZON,))[:, 0])
            return torch.cat([followed, followed - taken(fit.state, flat)], dim=1).reshape(*rows.shape, 2 * size)

        def loss(rows: Tensor) -> Tensor:
            query, target = network.query(before(rows)), network.target(after(rows))
            logits = _cosine(query, target) / TEMPERATURE
            own = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
            return functional.cross_entropy(logits.flatten(0, 1), own.flatten())

        def judge(fold: int, rows: Tensor) -> Tensor:
            query = functional.normalize(network.query.of_fold(fold, before(rows)), dim=-1)
            match = (query * functional.normalize(network.target.of_fold(fold, after(rows)), dim=-1)).sum(dim=-1)
            rest = query @ functional.normalize(network.target.of_fold(fold, after(pool)), dim=-1).T
            logits = (
                torch.cat([match[:, None], rest.masked_fill(rows[:, None] == pool, -torch.inf)], dim=1) / TEMPERATURE
            )
            return (logits.log_softmax(dim=1)[:, :1] + math.log(CANDIDATES + 1)).clamp(min=-math.log(CANDIDATES))

        scores = fit.fit(network, loss, judge, reweigh, self.title, effort=0.5)
        return Answer((self.name,), scores)


class _Scorer(nn.Module):
    """The query of state and actions, and the target of what followed, in one space."""

    def __init__(self, fit: CrossFit, generator: torch.Generator) -> None:
        super().__init__()
        size, actions = fit.state.shape[1], fit.action.shape[1]
        hidden = fit.settings.hidden // 2
        self.query = FoldedMLP(fit.folds, 2 * size + HORIZON * actions, hidden, WIDTH, generator)
        self.target = FoldedMLP(fit.folds, 2 * size, hidden, WIDTH, generator)


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    return functional.normalize(left, dim=-1) @ functional.normalize(right, dim=-1).transpose(1, 2)
