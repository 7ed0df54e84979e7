"""What policies on a Qwen3-VL backbone share: the vision tower, its features, and belief tokens before the prompt."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ptr_hf.policies.hooks import AdapterBase, captured_output, edited_call, frozen_copy, patched
from ptr_hf.policies.protocol import BeliefMask, belief_token_mask, check_layer


class Qwen3VLAdapter(AdapterBase, ABC):
    """The Qwen3-VL half of an adapter (transformers 5.5).

    Belief tokens are prepended to what the language model reads, image and text embeddings alike, at the positions
    before 0: the language model is causal, so every prompt token reads the belief and the belief reads nothing else, and
    the prompt keeps the positions it has without one.
    """

    @property
    @abstractmethod
    def _qwen(self) -> Any:
        """The `Qwen3VLModel`: vision tower and language model."""

    @property
    def context_dim(self) -> int:
        """Width of H_t: the language model's hidden size."""
        return int(self._qwen.language_model.config.hidden_size)

    @property
    @abstractmethod
    def _head_blocks(self) -> Iterable[nn.Module]:
        """The action head's transformer blocks."""

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the blocks of vision tower and language model in the backward pass."""
        self._qwen.gradient_checkpointing_enable({"use_reentrant": False})

    def compilable(self) -> Iterable[nn.Module]:
        """The MLPs of vision tower and language model, and the action head's blocks."""
        for block in (*self._qwen.visual.blocks, *self._qwen.language_model.layers):
            yield block.mlp
        yield from self._head_blocks

    def tower_is_frozen(self) -> bool:
        """Whether no parameter of the vision tower trains."""
        return not any(parameter.requires_grad for parameter in self._qwen.visual.parameters())

    def num_tower_layers(self) -> int:
        """Blocks of the vision tower."""
        return len(self._qwen.visual.blocks)

    def target_dim(self, layer: int) -> int:
        """Width of the vision tower, the same after every block."""
        check_layer(layer, self.num_tower_layers())
        return int(self._qwen.visual.config.hidden_size)

    def build_tower(self, layer: int, share: bool = False) -> nn.Module:
        """The vision tower's first `layer` blocks without its mergers; see `PolicyAdapter.build_tower`."""
        check_layer(layer, self.num_tower_layers())
        source = self._qwen.visual
        config = copy.deepcopy(source.config)
        config.depth, config.deepstack_visual_indexes = layer, []
        # The shell's own weights are never read: on the meta device they cost nothing.
        with torch.device("meta"):
            tower = type(source)(config)
        for name in ("patch_embed", "pos_embed", "rotary_pos_emb"):
            setattr(tower, name, source.get_submodule(name))
        tower.blocks = nn.ModuleList(source.blocks[:layer])
        tower.merger = nn.Identity()
        if share:
            return tower.train(source.training)
        return frozen_copy(tower)

    def tower_parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """The live tower's parameters under the names of `build_tower(layer).state_dict()`."""
        check_layer(layer, self.num_tower_layers())
        kept = ("patch_embed.", "pos_embed.", *(f"blocks.{index}." for index in range(layer)))
        for name, value in self._qwen.visual.state_dict().items():
            if name.startswith(kept):
                yield name, value

    def _check_shared(self, layer: int | None) -> None:
        if layer is None:
            return
        check_layer(layer, self.num_tower_layers())
        if not self.tower_is_frozen():
            raise ValueError("Layer states are shared only while the vision tower is frozen; pass layer=None.")

    def _encode(
        self, pixels: Float[Tensor, "patches pixels"], grid: Int[Tensor, "images 3"], rows: int, layer: int | None
    ) -> tuple[Float[Tensor, "rows levels views height width dim"], Float[Tensor, "rows states tower_dim"] | None]:
        """Merged features of images of one size, those for each deepstack level after them; states after `layer`."""
        visual = self._qwen.visual
        with captured_output(visual.blocks[(layer or 1) - 1]) as state:
            output = visual(pixels.to(visual.dtype), grid_thw=grid)
        levels = torch.stack([output.pooler_output, *output.deepstack_features])
        side = visual.spatial_merge_size
        _, height, width = grid[0].tolist()
        features = levels.unflatten(1, (rows, -1, height // side, width // side)).transpose(0, 1)
        return features, None if layer is None else state.value.detach().unflatten(0, (rows, -1))

    @contextmanager
    def _given(self, features: Sequence[Float[Tensor, "rows levels _ _ _ dim"]]) -> Iterator[None]:
        """Hand the language model these features, key after key in each row, in place of the vision tower's."""
        levels = torch.cat([value.flatten(2, 4) for value in features], dim=2).transpose(0, 1).flatten(1, 2)

        def forward(*_: Any, **__: Any) -> BaseModelOutputWithDeepstackFeatures:
            return BaseModelOutputWithDeepstackFeatures(pooler_output=levels[0], deepstack_features=list(levels[1:]))

        with patched(self._qwen.visual, "forward", forward):
            yield

    @contextmanager
    def _prepended(
        self, belief: Float[Tensor, "batch tokens context_dim"] | None, mask: BeliefMask | None
    ) -> Iterator[None]:
        """Prepend the belief to everything the language model reads."""
        if belief is None:
            yield
            return
        tokens = belief.shape[1]
        readable = belief_token_mask(belief, mask)

        def edit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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

        with edited_call(self._qwen.language_model, edit):
            yield
