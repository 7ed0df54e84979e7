"""Score × Aggregation × WeightMap: the strategy that weighs the loss when it is not the paper's T, chunk by chunk."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ptr_hf.method import conservative_weight
from ptr_hf.method.distributed import sum_over_ranks
from ptr_hf.method.draws import Draws
from ptr_hf.method.evidence import Evidence, IdentifiedBy, Weigher, Weighing
from ptr_hf.scores.aggregation import EpisodeTable, SlotMemory
from ptr_hf.scores.readings import OfEpisode, known_beforehand
from ptr_hf.scores.score import Score, Scored
from ptr_hf.scores.weight_map import WeightMapName, calibrated, combined, exponential, rejection, standardized

Aggregation = Literal["sample", "segment", "trajectory"]
AGGREGATIONS: tuple[Aggregation, ...] = ("sample", "segment", "trajectory")
MissingFuture = Literal["one", "episode", "batch"]
MISSING_FUTURE: tuple[MissingFuture, ...] = ("one", "episode", "batch")


class ScoreWeigher(Weigher):
    """Weighs chunks by one score or by several together.

    ``sample`` with the ``paper`` map weighs every chunk by its own verdict of this very step, as Eq. 21 does. Every other
    combination weighs it by the mean verdict of its slot, refreshed every ``refresh_interval`` steps.

    Args:
        scores: by name; their order is that of the channels.
        memory: of the slots; None for ``sample`` with ``paper``.
        weight_map: see ``weight_map``.
        floor, ceiling: bounds of a weight before α.
        alpha: α, how far weights may leave 1.
        missing_future: what a chunk gets about which the scores say nothing: 1 (the paper), its slot's weight, or the
            minibatch's mean weight. Without a memory there are no slots, and the mean stands in for them.
        self_weighting: multiply the heads' own losses by the weights, so that they learn from what is trusted.
        refresh_interval: steps between two readings of the memory.
    """

    def __init__(
        self,
        scores: Mapping[str, Score],
        memory: SlotMemory | None,
        *,
        weight_map: WeightMapName = "exponential",
        floor: float = 0.02,
        ceiling: float = 4.0,
        alpha: float = 1.0,
        missing_future: MissingFuture = "episode",
        self_weighting: bool = True,
        refresh_interval: int = 20,
    ) -> None:
        super().__init__()
        self.scores = nn.ModuleDict(dict(scores))
        self.memory = memory
        self.weight_map = weight_map
        self.floor, self.ceiling, self.alpha = floor, ceiling, alpha
        self.missing_future = missing_future
        self.self_weighting = self_weighting
        self.refresh_interval = refresh_interval
        # β of the last step, for the paper's map at a refresh
        self._beta: Tensor | float = 1.5

    @property
    def names(self) -> tuple[str, ...]:
        """The scores, in the order of the channels."""
        return tuple(self.scores)

    def lay_out(self, episodes: EpisodeTable, seed: int = 0) -> None:
        """Prepare for a dataset's episodes: empty slots, and the numbers that are known before training."""
        if self.memory is not None:
            self.memory.fill(episodes)
        for name, score in self.scores.items():
            if isinstance(score, OfEpisode):
                score.values.copy_(known_beforehand(name, episodes, seed))

    def weigh(self, evidence: Evidence, beta: Float[Tensor, ""], warm: bool, draws: Draws) -> Weighing:
        """Weights, verdicts and the heads' losses of this rank's chunks; see ``Weigher``.

        In eval mode the episodes may be others than the memory's, so it is not read and every weight is 1.

        Raises:
            ValueError: in training, when nobody has laid out the episodes.
        """
        self._beta = beta
        scored: list[Scored] = [score(evidence, draws) for score in self.scores.values()]
        verdicts = torch.stack([_known(of.value, of.valid) for of in scored], dim=1)
        nulls = torch.stack([_known(of.null, of.valid) for of in scored], dim=1)
        if self.memory is None:
            weight = self._by_own_verdict(verdicts, beta, evidence.chunk_valid, warm)
        else:
            weight = torch.ones_like(evidence.loss)
            if self.training:
                weight = self._by_slot(self.memory, verdicts, evidence, warm)
        losses = [of.loss for of in scored if of.loss is not None]
        head_loss = torch.stack(losses).sum(dim=0) if losses else torch.zeros_like(evidence.loss)
        learns = (evidence.target_valid & evidence.chunk_valid).to(weight)
        return Weighing(
            weight=weight,
            verdicts=verdicts,
            nulls=nulls,
            head_loss=head_loss,
            head_weight=learns * weight if self.self_weighting else learns,
            identified=next((_identified(of) for of in scored if of.correct is not None), None),
        )

    @torch.no_grad()
    def after_step(self, step: int, warm: bool) -> None:
        """Remember the step's verdicts of all ranks, and read the memory at every ``refresh_interval``-th step."""
        if self.memory is None:
            return
        for slot, verdict in self.step_verdicts:
            self.memory.remember(slot, verdict)
        self.step_verdicts = []
        if warm and step % self.refresh_interval == 0:
            self.memory.weight.copy_(self.slot_weights(self.memory.mean, self.memory.group))

    @torch.no_grad()
    def slot_weights(
        self, values: Float[Tensor, "slots scores"], group: Int[Tensor, " slots"]
    ) -> Float[Tensor, " slots"]:
        """The weight of every slot from its mean verdicts; a slot of which nothing is known gets the mean weight.

        Args:
            values: mean verdicts, NaN where there is none.
            group: of the slots; verdicts are compared within a group.
        """
        if self.weight_map == "paper":
            verdict = torch.where(values.isfinite(), values, 0.0).sum(dim=1)
            weight = conservative_weight(verdict, self._beta, 1.0, self.floor, self.ceiling)
            known = values.isfinite().any(dim=1)
        elif self.weight_map == "calibrated":
            has_chance = torch.tensor([score.has_chance for score in self.scores.values()], device=group.device)
            weight = calibrated(values, group, has_chance, self.floor)
            known = values.isfinite().any(dim=1)
        else:
            z = combined(standardized(values, group))
            known = z.isfinite()
            z = torch.where(known, z, 0.0)
            weight = (
                rejection(z, self.floor) if self.weight_map == "rejection" else exponential(z, self.floor, self.ceiling)
            )
        weight = 1.0 + self.alpha * (weight - 1.0)
        mean = torch.where(known, weight, 0.0).sum() / known.sum().clamp(min=1)
        return torch.where(known, weight, torch.where(known.any(), mean, 1.0))

    def _by_own_verdict(
        self,
        verdicts: Float[Tensor, "batch scores"],
        beta: Float[Tensor, ""],
        chunk_valid: Bool[Tensor, " batch"],
        warm: bool,
    ) -> Float[Tensor, " batch"]:
        known = verdicts.isfinite().all(dim=1) & chunk_valid
        verdict = torch.where(known[:, None], verdicts, 0.0).sum(dim=1)
        valid = known if warm else torch.zeros_like(known)
        weight = conservative_weight(verdict, beta, self.alpha, self.floor, self.ceiling, valid)
        return self._mean_where_unknown(weight, known) if warm and self.missing_future != "one" else weight

    def _by_slot(
        self,
        memory: SlotMemory,
        verdicts: Float[Tensor, "batch scores"],
        evidence: Evidence,
        warm: bool,
    ) -> Float[Tensor, " batch"]:
        if not len(memory.weight):
            raise ValueError(
                "The episodes to be weighed are unknown: call PTRPolicy.set_episodes(EpisodeTable.from_metadata("
                "dataset.meta)) before training, as PTRTrainer and LeRobot's factory do."
            )
        slot = memory.slot(evidence.episode, evidence.index)
        self.step_verdicts.append((slot, verdicts.masked_fill(~evidence.chunk_valid[:, None], torch.nan)))
        if not warm:
            return torch.ones_like(evidence.loss)
        # a slot never seen keeps the weight it was laid out with
        weight = memory.weight[slot]
        if self.missing_future == "episode":
            return weight
        known = verdicts.isfinite().any(dim=1) & evidence.chunk_valid
        return (
            torch.where(known, weight, 1.0) if self.missing_future == "one" else self._mean_where_unknown(weight, known)
        )

    def _mean_where_unknown(
        self, weight: Float[Tensor, " batch"], known: Bool[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        sums = torch.stack([torch.where(known, weight, 0.0).sum(), known.sum().to(weight)])
        # ranks may evaluate different numbers of batches, so only training looks at all of them
        total, count = sum_over_ranks(sums) if self.training else sums
        return torch.where(known | (count == 0), weight, total / count.clamp(min=1))


def _identified(of: Scored) -> IdentifiedBy:
    assert of.correct is not None
    assert of.candidates is not None
    return IdentifiedBy(
        verdict=torch.where(of.valid, of.value, 0.0),
        correct=of.correct,
        candidates=torch.where(of.valid, of.candidates, 0),
    )


def _known(values: Float[Tensor, " batch"] | None, valid: Bool[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    if values is None:
        return torch.full(valid.shape, torch.nan, device=valid.device)
    return torch.where(valid & values.isfinite(), values, torch.nan).detach().float()
