"""BeliefTokenizer (Section 4.1, Eq. 3-11): what the last chunk did, compressed into a few tokens for the next one.

Each step i of a chunk fuses the head's hidden state C_i with its action embedding A_i,

    c_i = tanh(W_f [C_i; A_i]),   ξ_i = W_a c_i,   π_im = softmax over time of ξ_im / τ_tok,   z_m = Σ_i π_im c_i,

and the M tokens z are appended to the context of the next chunk of the episode, cut from the graph. Two terms keep
the tokens useful: H_tok makes each token look at few steps, D_tok makes different tokens look at different steps.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ptr_hf.method.numerics import NeverLowered, full_precision, upcast

# root mean square of the learned first tokens, within the (-1, 1) range of the tanh features that later replace them
_INITIAL_RMS = 0.5


class BeliefUpdate(NamedTuple):
    """One update of the belief: the tokens, who they attend to, and the two regularisers, as batch means and row by row."""

    tokens: Float[Tensor, "batch tokens dim"]
    assignment: Float[Tensor, "batch steps tokens"]
    entropy: Float[Tensor, ""]
    diversity: Float[Tensor, ""]
    row_entropy: Float[Tensor, " batch"]
    row_diversity: Float[Tensor, " batch"]


class BeliefTokenizer(NeverLowered):
    """Pools a chunk's fused action features over time into M belief tokens (Eq. 3-9).

    Args:
        dim: width of the action embeddings and of the tokens.
        num_tokens: M, at least 1.
        temperature: τ_tok of the softmax over time, positive.
        context_dim: width of the head's hidden states, where it is another.

    Raises:
        ValueError: if num_tokens or temperature is not positive.

    Example:
        >>> belief = BeliefTokenizer(dim=32, num_tokens=4)(torch.randn(2, 16, 32), torch.randn(2, 16, 32))
        >>> belief.tokens.shape, belief.assignment.shape
        (torch.Size([2, 4, 32]), torch.Size([2, 16, 4]))
    """

    def __init__(self, dim: int, num_tokens: int = 4, temperature: float = 1.0, context_dim: int | None = None) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}; a BeliefTokenizer needs at least 1, build none for M = 0.")
        if temperature <= 0:
            raise ValueError(f"The tokenizer's temperature is {temperature}; pass a positive number.")
        self.temperature = temperature
        self.fuse = nn.Linear((context_dim or dim) + dim, dim)
        self.assign = nn.Linear(dim, num_tokens)

    def forward(
        self,
        context: Float[Tensor, "batch steps context_dim"],
        action: Float[Tensor, "batch steps dim"],
        mask: Bool[Tensor, "batch steps"] | None = None,
    ) -> BeliefUpdate:
        """The belief after a chunk.

        Args:
            context: C, the head's hidden states at the action positions.
            action: A, the head's action embeddings.
            mask: True where the step belongs to the episode; steps outside get no assignment, and a row without any
                step gets zero tokens and is left out of both means (0 row by row). All steps belong by default.

        Returns:
            The tokens, the assignment of steps to them, and both regularisers in nats and as squared norms.
        """
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        outside, some_step = ~mask[..., None], mask.any(dim=1)
        with full_precision(context.device):
            fused = torch.cat([context, action], dim=-1).to(self.fuse.weight.dtype).masked_fill(outside, 0.0)
            features = upcast(torch.tanh(self.fuse(fused)))
            logits = upcast(self.assign(features)) / self.temperature
            # a row without any step takes the softmax of zeros instead of the NaN of an empty one
            logits = logits.masked_fill(outside, -torch.inf).masked_fill(~some_step[:, None, None], 0.0)
            log_assignment = logits.log_softmax(dim=1)
            assignment = log_assignment.exp().masked_fill(outside, 0.0)
            tokens = torch.einsum("blm,bld->bmd", assignment, features)
            entropy = belief_entropy(assignment, log_assignment.masked_fill(outside, 0.0)).masked_fill(~some_step, 0.0)
            diversity = belief_diversity(assignment).masked_fill(~some_step, 0.0)
        rows = some_step.sum().clamp(min=1)
        return BeliefUpdate(tokens, assignment, entropy.sum() / rows, diversity.sum() / rows, entropy, diversity)


def belief_entropy(
    assignment: Float[Tensor, "batch steps tokens"], log_assignment: Float[Tensor, "batch steps tokens"]
) -> Float[Tensor, " batch"]:
    """H_tok = -(1/M) Σ_m Σ_i π log π per row (Eq. 10), in nats; logarithms of masked steps must be finite."""
    return -(assignment * log_assignment).sum(dim=1).mean(dim=-1)


def belief_diversity(assignment: Float[Tensor, "batch steps tokens"]) -> Float[Tensor, " batch"]:
    """D_tok = ‖ΠᵀΠ - I‖²_F per row (Eq. 11)."""
    gram = assignment.mT @ assignment
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum(dim=(-2, -1))


class BeliefMemory(NeverLowered):
    """Where the belief starts and how it enters the backbone: learned first tokens and one projection.

    The projection starts such that the first tokens reach the backbone with a root mean square of 1: the prefix
    embeddings of the supported policies are scaled by the square root of their width and are of that order, so the
    new tokens neither vanish beside them nor drown them.
    """

    def __init__(self, dim: int, num_tokens: int, backbone_dim: int) -> None:
        super().__init__()
        self.initial = nn.Parameter(_INITIAL_RMS * torch.randn(num_tokens, dim))
        self.inject = nn.Linear(dim, backbone_dim)
        nn.init.normal_(self.inject.weight, std=1.0 / (_INITIAL_RMS * dim**0.5))
        nn.init.zeros_(self.inject.bias)

    def start(self, batch: int) -> Float[Tensor, "{batch} tokens dim"]:
        """z_init for the first chunk of each of ``batch`` segments; it is learned, so gradients reach it."""
        return self.initial.expand(batch, -1, -1)

    def to_backbone(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens backbone_dim"]:
        """The tokens at the backbone's width, in this module's precision; the adapter casts to the backbone's."""
        with full_precision(tokens.device):
            return self.inject(tokens.to(self.inject.weight.dtype))

    @staticmethod
    def carry(tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """sg(z): the next chunk reads the belief and sends no gradient back through it."""
        return tokens.detach()
