"""The objective (Section 4.6, Eq. 32): from the traces of a step's chunks to one loss.

    L = L*_act + λ_id L_id + λ_rank L_rank + λ_ent H_tok + λ_div D_tok,      L*_act = Σ w ℓ / Σ w

Only the action loss is weighted. The weight, the targets, the queue and the gather are constants; nothing else is
cut, so L_id and L_rank reach the policy through the context h and the action summary e.

After the optimiser step every rank runs, in this order: the EMA of the target encoder, ``after_step`` (queue push),
and at logging steps ``update_controller``.

N ranks give the gradient that one process would give on all their rows: what a row is compared with, what is drawn for it
and what a sum is divided by never depend on which rank holds it.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ptr_hf.method.candidate_queue import CandidateQueue
from ptr_hf.method.candidates import HardNegativeKey, Samples, build_candidates, gather_samples
from ptr_hf.method.chunks import ChunkBatch, Identified, ObjectiveOutput
from ptr_hf.method.controller import AdaptiveScaleController
from ptr_hf.method.distributed import GlobalRows, sum_over_ranks
from ptr_hf.method.draws import Draws, Purpose
from ptr_hf.method.evidence import ComparisonSet, Evidence, Weigher, Weighing
from ptr_hf.method.numerics import NeverLowered
from ptr_hf.method.scorer import (
    TransitionScorer,
    identification_logits,
    identification_loss,
    identification_metrics,
    masked_derangement,
    ptr_score,
    ranking_loss,
)
from ptr_hf.method.shares import at_bounds
from ptr_hf.method.weight import (
    conservative_weight,
    effective_sample_size,
    global_self_normalized_loss,
    self_normalized_loss,
    weight_bounds,
)


@dataclass(frozen=True)
class ObjectiveConfig:
    """How chunks are compared and weighed and how Eq. 32 is put together; defaults are Table 6's.

    Attributes:
        alpha: α of Eq. 21, in [0, 1].
        weight_min: w_min of Eq. 21.
        weight_max: w_max of Eq. 21.
        identification_coef: λ_id.
        ranking_coef: λ_rank.
        entropy_coef: λ_ent.
        diversity_coef: λ_div.
        logit_clamp: bound on |d|.
        queue_negatives: negatives drawn from the queue per chunk.
        cross_rank_negatives: False leaves the other ranks' targets of the step out of the candidates; the queue is filled from
            all ranks either way, so that it stays the same on each.
        hard_negative_key: see ``build_candidates``.
        detach_scorer_inputs: keep L_id and L_rank from reaching the policy (ours; the paper lets them).
        shuffle_consequences: give every chunk another chunk's target, a control for any score.
        discount: γ^Δ', factor on the identification loss.

    Raises:
        ValueError: if a weight bound or alpha is out of range.
    """

    alpha: float = 1.0
    weight_min: float = 0.25
    weight_max: float = 4.0
    identification_coef: float = 0.05
    ranking_coef: float = 0.25
    entropy_coef: float = 1e-3
    diversity_coef: float = 1e-3
    logit_clamp: float = 20.0
    queue_negatives: int = 64
    cross_rank_negatives: bool = True
    hard_negative_key: HardNegativeKey = "task_or_state"
    detach_scorer_inputs: bool = False
    shuffle_consequences: bool = False
    discount: float = 1.0

    def __post_init__(self) -> None:
        weight_bounds(self.alpha, self.weight_min, self.weight_max)


class PTRObjective(NeverLowered):
    """Scores a step's chunks, weighs their loss and puts Eq. 32 together.

    Args:
        scorer: f(h, e), or None where a ``weigher`` asks for no identification posterior.
        queue: past targets, or None to do without.
        controller: holder of τ, β and ρ.
        config: see ``ObjectiveConfig``.
        weigher: weighs the loss by something else than Eq. 21; its heads' losses are added with coefficient 1 (their
            inputs are constants and Adam ignores the scale).
        warmup_steps: optimiser steps during which every weight is 1 while the scorer trains.
        seed: of the private random stream; the global one is never touched, so α = 0 draws the noise of plain
            post-training.
    """

    steps: Int[Tensor, ""]
    window: Float[Tensor, " statistics"]

    def __init__(
        self,
        scorer: TransitionScorer | None,
        queue: CandidateQueue | None,
        controller: AdaptiveScaleController,
        config: ObjectiveConfig = ObjectiveConfig(),
        *,
        weigher: Weigher | None = None,
        warmup_steps: int = 3000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scorer, self.queue, self.controller = scorer, queue, controller
        self.config, self.weigher = config, weigher
        self.warmup_steps, self.seed = warmup_steps, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("window", torch.zeros(6, dtype=torch.float64))
        # the step again, known without reading the device
        self._step = 0
        self._micro_step = 0
        self._step_samples: list[Samples] = []
        self._step_statistics: list[Tensor] = []
        self.register_load_state_dict_post_hook(_restore_step)

    @property
    def step(self) -> int:
        """Optimiser steps taken, known without reading the device."""
        return self._step

    def forward(self, chunks: ChunkBatch) -> ObjectiveOutput:
        """Candidates, logits, T, w, L_id and L_rank of each chunk.

        In training mode ranks exchange targets, and the step's targets and statistics are kept for ``after_step``;
        in eval mode nothing is exchanged or kept, so ranks may evaluate different numbers of batches. A chunk whose
        summaries are not finite counts as one without a target.
        """
        finite = chunks.context.isfinite().all(dim=1) & chunks.action.isfinite().all(dim=1)
        samples = replace(chunks.samples, valid=chunks.samples.usable & chunks.chunk_valid & finite)
        rows = self._rows(chunks, across=self.training)
        draws, device = Draws(self._step_seed), chunks.loss.device
        everyone = gather_samples(samples, rows)
        if self.config.shuffle_consequences:
            other, _ = masked_derangement(everyone.valid, draws.keys(rows, Purpose.SHUFFLED_CONSEQUENCE, device))
            everyone = replace(everyone, targets=everyone.targets[other])
            samples = replace(samples, targets=everyone.targets[rows.own(device)])
        # whom a chunk is compared with
        seen = rows if self.config.cross_rank_negatives else self._rows(chunks, across=False)
        others = everyone if self.config.cross_rank_negatives else samples
        if self.scorer is None:
            identified = Identified.nothing(samples.valid, chunks.loss)
        else:
            identified = self._identify(self.scorer, chunks, samples, others, seen, draws)
        weighing = self._weigh(chunks, samples, identified, ComparisonSet(seen, others.valid), draws)
        output = ObjectiveOutput(
            **(vars(identified) | {"score": identified.score.detach()}),
            loss=chunks.loss,
            weight=weighing.weight.masked_fill(~chunks.chunk_valid, 0.0),
            chunk_valid=chunks.chunk_valid,
            entropy=chunks.entropy,
            diversity=chunks.diversity,
            weighing=weighing if self.weigher is not None else None,
            source=samples.source,
            task=samples.task,
        )
        if self.scorer is None and weighing.identified is not None:
            output.score, output.correct = weighing.identified.verdict, weighing.identified.correct
            output.candidates = weighing.identified.candidates
        if self.training:
            self._micro_step += 1
            self._step_samples.append(everyone)
            self._step_statistics.append(self._statistics(output))
        return output

    @property
    def warm(self) -> bool:
        """Whether the scorer's warm-up is over."""
        return self._step >= self.warmup_steps

    @staticmethod
    def _rows(chunks: ChunkBatch, across: bool) -> GlobalRows:
        length = chunks.segment_length
        segments = len(chunks.loss) // length
        return GlobalRows.of_all_ranks(length, segments) if across else GlobalRows(length, segments)

    def _identify(
        self,
        scorer: TransitionScorer,
        chunks: ChunkBatch,
        samples: Samples,
        others: Samples,
        seen: GlobalRows,
        draws: Draws,
    ) -> Identified:
        """The identification posterior of every chunk and its two losses."""
        device = chunks.loss.device
        context = torch.where(samples.valid[:, None], chunks.context, 0.0)
        action = torch.where(samples.valid[:, None], chunks.action, 0.0)
        if self.config.detach_scorer_inputs:
            context, action = context.detach(), action.detach()
        place = seen.own(device)
        candidates = build_candidates(
            local=samples,
            everyone=others,
            rows=seen,
            queue=self.queue,
            num_queue_negatives=self.config.queue_negatives,
            hard_negative_ratio=self.controller.hard_negative_ratio,
            hard_negative_key=self.config.hard_negative_key,
            seed=draws.seed_of(Purpose.QUEUE),
        )
        mask, target_valid = candidates.mask, candidates.mask[:, 0]
        # a copy, because data-parallel training may write the buffer before backward has read it
        temperature, clamp = self.controller.temperature.clone(), self.config.logit_clamp

        logits = candidates.logits(scorer(context, action), temperature, clamp)
        other_action, comparable = masked_derangement(others.valid, draws.keys(seen, Purpose.OTHER_ACTION, device))
        ranking_valid = comparable[place]
        other_query = scorer(context, seen.gather(action)[other_action[place]])
        match = candidates.pool[candidates.index[:, :1]]
        other_logit = identification_logits(other_query, match, temperature, clamp)[:, 0]
        metrics = identification_metrics(logits, mask)
        return Identified(
            target_valid=target_valid,
            score=ptr_score(logits, mask),
            identification=identification_loss(logits, mask),
            ranking=ranking_loss(logits[:, 0], other_logit).masked_fill(~ranking_valid, 0.0),
            ranking_valid=ranking_valid,
            contrast=(logits[:, 0] - other_logit).detach(),
            correct=metrics.correct,
            margin=metrics.margin,
            candidates=mask.sum(dim=1),
        )

    def _weigh(
        self,
        chunks: ChunkBatch,
        samples: Samples,
        identified: Identified,
        compared_with: ComparisonSet,
        draws: Draws,
    ) -> Weighing:
        """Eq. 21 on T, or what the ``weigher`` makes of the evidence."""
        valid, beta = identified.target_valid, self.controller.beta
        if self.weigher is None:
            known = valid if self.warm else torch.zeros_like(valid)
            weight = conservative_weight(
                identified.score, beta, self.config.alpha, self.config.weight_min, self.config.weight_max, valid=known
            )
            nothing = torch.zeros_like(weight)
            return Weighing(weight, nothing[:, None], nothing[:, None], nothing, nothing)
        if chunks.stretches is None or chunks.current is None or chunks.motion is None or chunks.index is None:
            raise ValueError("A weigher reads stretches, current, motion and index of ChunkBatch: give all four.")
        evidence = Evidence(
            loss=chunks.loss.detach(),
            action=chunks.stretches.detach().nan_to_num(),
            current=chunks.current.nan_to_num(),
            target=samples.targets.nan_to_num(),
            target_valid=valid,
            chunk_valid=chunks.chunk_valid,
            posterior=identified.score.detach(),
            contrast=identified.contrast,
            contrast_valid=identified.ranking_valid,
            motion=chunks.motion.detach(),
            task=samples.task,
            episode=samples.episode,
            index=chunks.index,
            among=compared_with,
        )
        return self.weigher.weigh(evidence, beta, self.warm, draws)

    def combine(self, output: ObjectiveOutput) -> dict[str, Float[Tensor, ""]]:
        """Eq. 32 from this rank's chunks. In training every mean is over all ranks', with one all-reduce for all."""
        mean, config = global_self_normalized_loss if self.training else self_normalized_loss, self.config
        action, identification, ranking, entropy, diversity, *heads = mean(*self._terms(output))
        tokenizer = config.entropy_coef * entropy + config.diversity_coef * diversity
        identified = config.identification_coef * config.discount * identification
        loss = action + identified + config.ranking_coef * ranking + tokenizer
        terms = {"action": action, "identification": identification, "ranking": ranking, "tokenizer": tokenizer}
        for head in heads:
            terms["heads"] = head
            loss = loss + head
        return terms | {"loss": loss}

    @staticmethod
    def _terms(output: ObjectiveOutput) -> tuple[Float[Tensor, "terms batch"], Float[Tensor, "terms batch"]]:
        weight = output.weight
        chunks = output.chunk_valid.to(weight)
        losses = [output.loss, output.identification, output.ranking, output.entropy, output.diversity]
        weights = [weight, output.target_valid.to(weight), output.ranking_valid.to(weight), chunks, chunks]
        if output.weighing is not None:
            losses, weights = [*losses, output.weighing.head_loss], [*weights, output.weighing.head_weight]
        return torch.stack(losses), torch.stack(weights)

    @torch.no_grad()
    def metrics(self, output: ObjectiveOutput) -> dict[str, Float[Tensor, ""]]:
        """This rank's figures for the log, 0-d and still on the device; a mean over nothing is 0."""
        weight, chunk_valid, target_valid = output.weight, output.chunk_valid, output.target_valid
        chunks = chunk_valid.sum()
        comparable = target_valid & (output.candidates > 1)
        at_floor, at_ceiling = at_bounds(
            weight, weight_bounds(self.config.alpha, self.config.weight_min, self.config.weight_max)
        )
        smallest = weight.masked_fill(~chunk_valid, torch.inf).amin()
        largest = weight.masked_fill(~chunk_valid, 0.0).amax()
        return {
            "accuracy": _mean(output.correct, comparable),
            "candidates": _mean(output.candidates.float(), comparable),
            "margin": _mean(output.margin, comparable),
            "score": _mean(output.score, target_valid),
            "weight_mean": _mean(weight, chunk_valid),
            "weight_min": torch.where(chunks > 0, smallest, 0.0),
            "weight_max": largest,
            "weight_at_floor": _mean(at_floor, target_valid),
            "weight_at_ceiling": _mean(at_ceiling, target_valid),
            "effective_sample_size": effective_sample_size(weight, chunk_valid) / chunks.clamp(min=1),
            "valid_target_ratio": _mean(target_valid, chunk_valid),
            "temperature": self.controller.temperature.clone(),
            "beta": self.controller.beta.clone(),
            "hard_negative_ratio": self.controller.hard_negative_ratio.clone(),
            "belief_entropy": _mean(output.entropy, chunk_valid),
            "belief_diversity": _mean(output.diversity, chunk_valid),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimiser step and the EMA: push the step's targets, count the step, add up its statistics."""
        for samples in self._step_samples:
            if self.queue is not None:
                known = {name: vars(samples)[name] for name in ("task", "source", "episode", "frame", "state")}
                self.queue.push(samples.targets, samples.usable, **known)
        if self._step_statistics:
            self.window.add_(sum_over_ranks(torch.stack(self._step_statistics).sum(dim=0)))
        self._step_samples, self._step_statistics, self._micro_step = [], [], 0
        self._step += 1
        self.steps.fill_(self._step)
        if self.weigher is not None:
            self.weigher.after_step(self._step, self.warm)

    @torch.no_grad()
    def update_controller(self) -> None:
        """At a logging step, after ``after_step``: hand the controller the window's means over all ranks."""
        if self.scorer is None:
            return
        correct, margin, comparable, score, targets, chunks = self.window
        self.controller.update(correct / comparable, margin / comparable, score / targets, targets / chunks)
        self.window.zero_()

    def _statistics(self, output: ObjectiveOutput) -> Float[Tensor, " statistics"]:
        comparable = output.target_valid & (output.candidates > 1)
        sums = (
            output.correct & comparable,
            output.margin.masked_fill(~comparable, 0.0),
            comparable,
            output.score.masked_fill(~output.target_valid, 0.0),
            output.target_valid,
            output.chunk_valid,
        )
        return torch.stack([values.sum().to(self.window.dtype) for values in sums])

    @property
    def _step_seed(self) -> int:
        """Of this micro-step's draws, the same on every rank."""
        seed = 0
        for part in (self.seed, self._step, self._micro_step):
            seed = (seed * 1_000_003 + part) % 2**63
        return seed


def _mean(values: Float[Tensor, " batch"] | Bool[Tensor, " batch"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    values = values.float() if values.dtype == torch.bool else values
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _restore_step(objective: torch.nn.Module, incompatible_keys: object) -> None:
    """After load_state_dict, the one place where the step is read from the device."""
    assert isinstance(objective, PTRObjective)
    objective._step = int(objective.steps)
