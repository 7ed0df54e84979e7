"""pi0-FAST: a PaliGemma that writes the action chunk as text, one FAST token after another."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.constants import ACTION_PAD
from ptr_hf.policies.batches import belief_token_mask, per_sample_mean
from ptr_hf.policies.hooks import captured_output, captured_result, patched, preserved_modes
from ptr_hf.policies.openpi import OpenPIAdapter
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, RolloutTrace, Views

END_OF_ACTION = "|"


class PI0FastAdapter(OpenPIAdapter):
    """Reads a `PI0FastPolicy` (lerobot 0.6.1): next-token prediction instead of flow matching.

    A chunk is a sequence of `max_action_tokens` tokens (a frame of "Action: ...|" around discrete-cosine coefficients in
    byte-pair merges, then padding), so the steps of A_t and C_t are tokens and `action_mask` says which are real. H_t is
    the language model's final norm over images and instruction, which no action token reaches; A_t the embeddings of the
    recorded tokens, C_t the final norm at their positions (zero where there is none).

    The loss is the mean cross-entropy of a row's tokens; LeRobot's own is the mean over the batch's, so it weighs rows by
    how many tokens they have. Every token describes all steps of the chunk: `action_is_pad` can only leave out a chunk
    that is padding alone. A chunk that ends in padding is learned whole, as the preprocessor wrote it, with its last
    action repeated.

    The model returns one number a batch, so the per-token loss is read off `cross_entropy` itself. In sampling the
    policy embeds the begin token with the instruction, which attends to it, and in training with the action: C_t of the
    two differs by that.
    """

    family = "pi0_fast"
    preprocesses_rows = True
    masks_action_dims = False
    observations = (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
    targets = (ACTION_TOKENS, ACTION_TOKEN_MASK)
    language_models = OpenPIAdapter.language_models[:1]

    @property
    def action_steps(self) -> int:
        """Tokens in which a chunk is written."""
        return int(self.base.config.max_action_tokens)

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the next-token loss."""
        tokens = batch[ACTION_TOKENS]
        with ExitStack() as scope:
            images = self._enter_images(scope, batch, views)
            prefix_pad = scope.enter_context(belief)
            hidden = scope.enter_context(captured_output(self._language_model.norm))
            losses = scope.enter_context(captured_result(functional.cross_entropy))
            self.base.model.forward(
                *images,
                batch[OBS_LANGUAGE_TOKENS],
                batch[OBS_LANGUAGE_ATTENTION_MASK],
                tokens,
                batch[ACTION_TOKEN_MASK],
            )
        steps, context = tokens.shape[1], prefix_pad[0].shape[1] - tokens.shape[1]
        mask = _token_mask(batch)
        # The first token is given, not predicted.
        per_token = losses.value.reshape(tokens.shape[0], steps - 1, 1)
        return PolicyTrace(
            loss=per_sample_mean(per_token, mask[:, 1:]),
            context=hidden.value[:, -steps - context : -steps].float(),
            context_mask=prefix_pad[0][:, :context],
            action_tokens=self._experts.embed_language_tokens(tokens).float(),
            action_hidden=hidden.value[:, -steps:].float() * mask.unsqueeze(-1),
            action_mask=mask,
        )

    @torch.no_grad()
    def rollout(self, batch: Batch, belief: Belief | None = None, **kwargs: Any) -> RolloutTrace:
        """Write a chunk under the belief; `action_mask` ends with each row's end-of-action token."""
        self.check(batch, training=False)
        policy = self.base
        written: list[Tensor] = []
        detokenize = policy.detokenize_actions

        def detokenized(tokens: Tensor, *args: Any, **arguments: Any) -> Tensor:
            written.append(tokens)
            return detokenize(tokens, *args, **arguments)

        with (
            preserved_modes(self.policy),
            self._masked_cameras(),
            self.belief_scope(belief),
            patched(policy, "detokenize_actions", detokenized),
            _last_states(self._language_model.norm) as states,
        ):
            actions = policy.predict_action_chunk(batch, **kwargs)
        hidden = torch.stack(states, dim=1).float()
        tokens, mask = self._read_tokens(written[0], hidden.shape[1])
        missing = (0, 0, 0, max(0, policy.config.max_action_tokens - hidden.shape[1]))
        return RolloutTrace(
            actions=actions,
            action_tokens=functional.pad(self._experts.embed_language_tokens(tokens).float(), missing),
            action_hidden=functional.pad(hidden, missing),
            action_mask=functional.pad(mask, missing[2:]),
        )

    def _read_tokens(
        self, written: Int[Tensor, "batch steps"], reads: int
    ) -> tuple[Int[Tensor, "batch reads"], Bool[Tensor, "batch reads"]]:
        """What the model read to write its tokens: the begin token and all but the last, as training lays them out."""
        tokenizer = self.base._paligemma_tokenizer
        begin = torch.full_like(written[:, :1], tokenizer.bos_token_id)
        tokens = torch.cat([begin, written], dim=1)[:, :reads]
        ended = tokens == tokenizer.convert_tokens_to_ids(END_OF_ACTION)
        return tokens, ended.cumsum(dim=1) - ended.long() == 0

    def _enter_belief(
        self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None
    ) -> list[Bool[Tensor, "batch sequence"]]:
        """Prepend the belief in `embed_prefix_fast`, whose attention mask is spelled out pair by pair."""
        model = self.base.model
        original = model.embed_prefix_fast
        pads: list[Tensor] = []

        def embed_prefix(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, int, int]:
            embeddings, pad, attention, image_tokens, action_tokens = original(*args, **kwargs)
            pads.append(pad)
            if belief is None:
                return embeddings, pad, attention, image_tokens, action_tokens
            readable = belief_token_mask(belief, mask)
            extended = torch.cat([readable, pad], dim=1)
            seen = extended.clone()
            seen[:, extended.shape[1] - action_tokens :] = False
            by_belief = readable.unsqueeze(2) & seen.unsqueeze(1)
            by_others = torch.cat([pad.unsqueeze(2) & readable.unsqueeze(1), attention], dim=2)
            return (
                torch.cat([belief.to(embeddings.dtype), embeddings], dim=1),
                extended,
                torch.cat([by_belief, by_others], dim=1),
                image_tokens,
                action_tokens,
            )

        scope.enter_context(patched(model, "embed_prefix_fast", embed_prefix))
        return pads


def _token_mask(batch: Batch) -> Bool[Tensor, "batch steps"]:
    mask = batch[ACTION_TOKEN_MASK].bool()
    pad = batch.get(ACTION_PAD)
    return mask if pad is None else mask & ~pad.all(dim=1, keepdim=True)


@contextmanager
def _last_states(norm: nn.Module) -> Iterator[list[Float[Tensor, "batch hidden_dim"]]]:
    """Collect the state at the last position of every call: the token that was just read."""
    states: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _module, _args, output: states.append(output[0][:, -1]))
    try:
        yield states
    finally:
        handle.remove()
