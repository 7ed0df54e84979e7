"""GR00T N1.7: a Qwen3-VL whose prompt a flow-matching transformer attends to."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from lerobot.utils.constants import ACTION
from torch import Tensor
from torch.nn.functional import pad

from ptr_hf.policies.base import part
from ptr_hf.policies.batches import action_mask, all_true, per_sample_mean, refuse_stacked_frames, require_keys
from ptr_hf.policies.hooks import captured_output, preserved_modes, recorded_results
from ptr_hf.policies.qwen3vl import Qwen3VLAdapter
from ptr_hf.policies.trace import Batch, Belief, PolicyTrace, RolloutTrace, Views

PIXELS = "observation.pixel_values"
"""Where the patches of a row's images lie, (rows, images, height, width, pixels of a patch), all cameras together."""
PACKED, GRID = "pixel_values", "image_grid_thw"
STATE, PROMPT, PROMPT_MASK = "state", "input_ids", "attention_mask"


class GrootAdapter(Qwen3VLAdapter):
    """Reads a `GrootPolicy` (lerobot 0.6.1, GR00T N1.7); experimental: never run on a released checkpoint.

    H_t is what the action head attends to, the backbone's states after `vlln` and `vl_self_attention`, over images and
    instruction; A_t the clean chunk through `action_encoder` at the latest flow time of training (time 1 is the clean end
    here); C_t the input of `action_decoder`. Belief tokens are prepended to the prompt, see `Qwen3VLAdapter`, and cut off
    before the action head. The loss is the policy's own, of the recorded steps and the robot's own action dimensions.

    The preprocessor takes the cameras away and packs the patches of all rows on one axis, so a batch goes through
    `arrange` first, and all cameras are one view. The prompt needs no images, so with given views the patches may be
    missing.
    """

    family = "groot"
    preprocesses_rows = True
    image_ndim = 5
    observations = (STATE, PROMPT, PROMPT_MASK, "embodiment_id")
    hidden_dim = part("_groot_model.action_head.hidden_size")
    _qwen = part("_groot_model.backbone.model.model")
    _head = part("_groot_model.action_head")
    _action_out = part("_groot_model.action_head.action_decoder")

    def arrange(self, batch: Batch) -> Batch:
        """What the preprocessor returned, with the packed patches by row under `observation.pixel_values`.

        Raises:
            ValueError: the batch has no patches, or cameras of different sizes.
        """
        require_keys(batch, [PACKED, GRID, PROMPT], self.family)
        grid = batch[GRID]
        if not bool((grid == grid[:1]).all()):
            raise ValueError(
                f"The images of a batch have the patch grids {grid.unique(dim=0).tolist()}, and PTR reads GR00T only with "
                "images of one size: give all cameras one resolution."
            )
        _, height, width = grid[0].tolist()
        pixels = batch[PACKED].unflatten(0, (len(batch[PROMPT]), -1, height, width))
        return {PIXELS: pixels, **{key: value for key, value in batch.items() if key not in (PACKED, GRID)}}

    @property
    def chunk_size(self) -> int:
        """Steps in one action chunk: the recorded ones, of the model's longer horizon."""
        return len(self.base.config.action_delta_indices)

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the flow-matching loss.

        `GrootPolicy.forward` waits for the device to log; its model is called as it does, under the same autocast.
        """
        action = batch[ACTION][:, : self.chunk_size, : self._robot_dim]
        mask = action_mask(batch, action)
        padded = self._padded(action * mask.unsqueeze(-1))
        counted = self._padded(mask.unsqueeze(-1).expand_as(action).to(action.dtype))
        with ExitStack() as scope:
            inputs = {**batch, ACTION: padded, "action_mask": counted}
            inputs |= self._packed(batch[PIXELS]) if views is None else self._enter_views(scope, views)
            scope.enter_context(belief)
            context = scope.enter_context(captured_output(self._head.vl_self_attention))
            hidden = scope.enter_context(self._captured_hidden())
            scope.enter_context(self._autocast())
            inputs = self.base._filter_groot_inputs(inputs, include_action=True)
            losses = self.base._groot_model.forward(inputs)["action_loss"]
        return PolicyTrace(
            loss=per_sample_mean(losses[:, : action.shape[1], : action.shape[2]], mask),
            context=context.value.float(),
            context_mask=batch[PROMPT_MASK].bool(),
            action_tokens=self._action_tokens(action, batch),
            action_hidden=self._action_hidden(hidden.value),
            action_mask=mask,
        )

    @torch.no_grad()
    def rollout(self, batch: Batch, belief: Belief | None = None, **kwargs: Any) -> RolloutTrace:
        """Sample a chunk under the belief; `kwargs` (real-time chunking) go to `predict_action_chunk`."""
        self.check(batch, training=False)
        with (
            preserved_modes(self.policy),
            self.belief_scope(belief),
            self._captured_hidden(keep="last") as hidden,
            recorded_results(self._head, "get_action_with_features") as predicted,
        ):
            actions = self.base.predict_action_chunk({**batch, **self._packed(batch[PIXELS])}, **kwargs)
        chunk = predicted[0]["action_pred"][:, : self.chunk_size, : self._robot_dim]
        return RolloutTrace(
            actions=actions,
            action_tokens=self._action_tokens(chunk, batch),
            action_hidden=self._action_hidden(hidden.value),
            action_mask=all_true(chunk),
        )

    def gradient_checkpointing_enable(self) -> None:
        """Recompute those of vision tower and language model that train; see `AdapterBase`.

        Raises:
            ValueError: neither trains: LeRobot keeps what is frozen in eval mode, which recomputes nothing.
        """
        if not (self.base.config.tune_llm or self.base.config.tune_visual):
            raise ValueError(
                "GR00T has no gradient checkpointing while its backbone is frozen: leave it out, or train with tune_llm=True "
                "or tune_visual=True."
            )
        super().gradient_checkpointing_enable()

    def target_keys(self) -> tuple[str, ...]:
        """All cameras together."""
        return (PIXELS,)

    @property
    def _last_layer(self) -> tuple[Any, str]:
        return self.base._groot_model.backbone, "_last_decoder_layer_output"

    @property
    def _robot_dim(self) -> int:
        return int(self.base.config.output_features[ACTION].shape[0])

    def _autocast(self) -> AbstractContextManager[Any]:
        device = next(self.base.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.base.config.use_bf16)

    def _patches(self, image: Float[Tensor, "rows images height width pixels"]) -> tuple[Tensor, Tensor]:
        rows, images, height, width = image.shape[:4]
        return image.flatten(0, 3), _grid(rows * images, height, width, image.device)

    def _packed(self, pixels: Float[Tensor, "rows images height width pixels"]) -> dict[str, Tensor]:
        return dict(zip((PACKED, GRID), self._patches(pixels), strict=True))

    def _enter_views(self, scope: ExitStack, views: Views) -> dict[str, Tensor]:
        """Give the features in the tower's place; returns the grids alone, which place the images' tokens."""
        features = views.features[PIXELS]
        self._give(scope, [features])
        side = self._qwen.visual.spatial_merge_size
        rows, _, images, height, width = features.shape[:5]
        grid = _grid(rows * images, side * height, side * width, features.device)
        return {PACKED: features.new_zeros(0), GRID: grid}

    def check(self, batch: Batch, *, training: bool, with_images: bool = True) -> None:
        """Refuse a batch that the policy cannot read."""
        super().check(batch, training=training, with_images=with_images)
        refuse_stacked_frames(batch, [STATE], single_frame_ndim=3)

    def _padded(self, action: Float[Tensor, "batch steps dims"]) -> Float[Tensor, "batch horizon model_dims"]:
        head = self._head
        return pad(action, (0, head.action_dim - action.shape[2], 0, head.action_horizon - action.shape[1]))

    def _action_hidden(self, states: Float[Tensor, "batch sequence dim"]) -> Float[Tensor, "batch steps dim"]:
        return states[:, -self._head.action_horizon :][:, : self.chunk_size].float()

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dims"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        head, embodiment = self._head, batch["embodiment_id"]
        clean = torch.full(embodiment.shape, int(head.config.noise_s * head.num_timestep_buckets), device=action.device)
        tokens = head.action_encoder(self._padded(action).to(head.dtype), clean, embodiment)
        return tokens[:, : action.shape[1]].float()


def _grid(images: int, height: int, width: int, device: torch.device) -> Int[Tensor, "images 3"]:
    """Patches of each image in time, height and width."""
    return torch.tensor([[1, height, width]], device=device).expand(images, 3)
