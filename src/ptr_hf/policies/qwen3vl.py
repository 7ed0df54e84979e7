"""What policies on a Qwen3-VL backbone share: the vision tower, its features, and belief tokens before the prompt."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ptr_hf.policies.base import AdapterBase
from ptr_hf.policies.batches import belief_token_mask
from ptr_hf.policies.hooks import Call, edited_call, patched
from ptr_hf.policies.tower import VisionTower, transformer_tower
from ptr_hf.policies.trace import Belief, BeliefMask


class Qwen3VLAdapter(AdapterBase):
    """The Qwen3-VL half of an adapter (transformers 5.5).

    Belief tokens are prepended to what the language model reads, image and text embeddings alike, at the positions
    before 0: the language model is causal, so every prompt token reads the belief and the belief reads nothing else, and
    the prompt keeps the positions it has without one.
    """

    _qwen: Any
    """The `Qwen3VLModel`: vision tower and language model."""
    _head: Any
    """The flow-matching action head."""

    @property
    def context_dim(self) -> int:
        """Width of H_t: the language model's hidden size."""
        return int(self._qwen.language_model.config.hidden_size)

    @property
    def action_dim(self) -> int:
        """Width of A_t: the action head's input width."""
        return int(self._head.input_embedding_dim)

    @abstractmethod
    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision of the policy's own backbone."""

    @abstractmethod
    def _patches(
        self, image: Float[Tensor, "rows *shape"]
    ) -> tuple[Float[Tensor, "patches pixels"], Int[Tensor, "images 3"]]:
        """What the vision tower reads of images: their patches, and their grids."""

    @property
    @abstractmethod
    def _last_layer(self) -> tuple[Any, str]:
        """The module and the name of its method that returns the language model's last states."""

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the blocks of vision tower and language model in the backward pass."""
        self._qwen.gradient_checkpointing_enable({"use_reentrant": False})

    def compilable(self) -> Iterable[nn.Module]:
        """The MLPs of vision tower and language model, and the action head's blocks."""
        for block in (*self._qwen.visual.blocks, *self._qwen.language_model.layers):
            yield block.mlp
        yield from self._head.model.transformer_blocks

    @property
    def tower(self) -> VisionTower:
        """The vision tower without its mergers."""
        stem = ("patch_embed", "pos_embed", "rotary_pos_emb")
        return transformer_tower(self._qwen.visual, stem, "blocks", ("merger",), deepstack_visual_indexes=[])

    def _tokens(self, states: Float[Tensor, "all_patches dim"], rows: int) -> Float[Tensor, "rows patches dim"]:
        return states.unflatten(0, (rows, -1))

    def _tower_tokens(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        pixels, grid = self._patches(image)
        with self._autocast():
            states = tower(pixels.to(next(tower.parameters()).dtype), grid_thw=grid).last_hidden_state
        return self._tokens(states, len(image))

    def _embed_image(
        self, key: str, image: Float[Tensor, "rows *shape"]
    ) -> Float[Tensor, "rows levels views height width dim"]:
        """Merged features of images of one size, those for each deepstack level after them."""
        visual, rows = self._qwen.visual, len(image)
        pixels, grid = self._patches(image)
        with self._autocast():
            output = visual(pixels.to(visual.dtype), grid_thw=grid)
            levels = torch.stack([output.pooler_output, *output.deepstack_features])
        side = visual.spatial_merge_size
        _, height, width = grid[0].tolist()
        return levels.unflatten(1, (rows, -1, height // side, width // side)).transpose(0, 1)

    def _give(self, scope: ExitStack, features: Sequence[Float[Tensor, "rows levels _ _ _ dim"]]) -> None:
        """Hand the language model these features, key after key in each row, in place of the vision tower's."""
        levels = torch.cat([value.flatten(2, 4) for value in features], dim=2).transpose(0, 1).flatten(1, 2)

        def forward(*_: Any, **__: Any) -> BaseModelOutputWithDeepstackFeatures:
            return BaseModelOutputWithDeepstackFeatures(pooler_output=levels[0], deepstack_features=list(levels[1:]))

        scope.enter_context(patched(self._qwen.visual, "forward", forward))

    def _enter_belief(
        self, scope: ExitStack, belief: Belief | None, mask: BeliefMask | None
    ) -> list[Bool[Tensor, "batch prompt"]]:
        """Prepend the belief and keep it out of what the action head picks from; returns the prompt's masks."""
        owner, method = self._last_layer
        original = getattr(owner, method)
        tokens = 0 if belief is None else belief.shape[1]
        masks: list[Tensor] = []

        def states(inputs: Any) -> Tensor:
            masks.append(inputs["attention_mask"].bool())
            return original(inputs)[:, tokens:]

        scope.enter_context(patched(owner, method, states))
        if belief is None:
            return masks
        readable = belief_token_mask(belief, mask)

        def edit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            embeddings, attention = kwargs["inputs_embeds"], kwargs["attention_mask"]
            visual, position = kwargs["visual_pos_masks"], kwargs["position_ids"]
            before = torch.arange(-tokens, 0, device=position.device).expand(*position.shape[:2], tokens)
            return args, {
                **kwargs,
                "inputs_embeds": torch.cat([belief.to(embeddings.dtype), embeddings], dim=1),
                "attention_mask": torch.cat([readable.to(attention.dtype), attention], dim=1),
                "visual_pos_masks": torch.cat([torch.zeros_like(readable), visual], dim=1),
                "position_ids": torch.cat([before.to(position.dtype), position], dim=2),
            }

        scope.enter_context(edited_call(self._qwen.language_model, edit))
        return masks
