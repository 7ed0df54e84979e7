"""VLA-JEPA: a Qwen3-VL whose embodied-action tokens condition a flow-matching action head."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from ptr_hf.constants import ACTION_PAD
from ptr_hf.policies.batches import action_mask, per_sample_mean
from ptr_hf.policies.hooks import Capture, captured_input, captured_output, captured_result, patched
from ptr_hf.policies.qwen3vl import Qwen3VLAdapter
from ptr_hf.policies.trace import Batch, Belief, BeliefMask, PolicyTrace, Views


class VLAJEPAAdapter(Qwen3VLAdapter):
    """Reads a `VLAJEPAPolicy` (lerobot 0.6.1); experimental: never run on a released checkpoint.

    H_t is the language model's final norm over the whole prompt (images, instruction, action tokens); A_t the clean chunk
    through `action_encoder` at flow time 1, which is the clean end here; C_t the input of `action_decoder`, of the first of
    a row's `repeated_diffusion_steps` noise draws. A row's loss is the mean over those draws. Belief tokens are prepended to
    the prompt, see `Qwen3VLAdapter`.

    PTR trains the action loss alone. The world-model loss compares a row's next frames with a prediction and is averaged
    over the batch inside LeRobot, and PTR splits every later frame off the rows; so the world model does not run even with
    `enable_world_model`, and its predictor stays as it was loaded.

    Two things have no module to hook. The elementwise loss is read from the one `mse_loss` call of the action head. And
    the policy prepares images inside its forward, so with given views it gets black images of the views' size, which only
    lay out the prompt. As in LeRobot, the backbone runs under bfloat16 autocast (not on MPS), and `predict_action_chunk` ignores
    `noise`.
    """

    family = "vla_jepa"

    @property
    def action_dim(self) -> int:
        """Width of A_t: the action head's inner width."""
        return int(self._head.input_embedding_dim)

    @property
    def hidden_dim(self) -> int:
        """Width of C_t: the action head's output width."""
        return int(self.base.config.action_hidden_size)

    @property
    def observations(self) -> tuple[str, ...]:
        """The state, where the policy's config names one."""
        return (OBS_STATE,) if self.base.config.robot_state_feature else ()

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the flow-matching loss."""
        action = batch[ACTION]
        rows = action.shape[0]
        mask = action_mask(batch, action)
        with ExitStack() as scope:
            batch = {**batch, ACTION_PAD: ~mask}
            if views is not None:
                batch |= self._enter_views(scope, views, rows)
            inputs = self.base._prepare_model_inputs(batch, training=False)
            prompt_mask = scope.enter_context(belief)
            context = scope.enter_context(captured_output(self._qwen.language_model.norm))
            hidden = scope.enter_context(self._captured_hidden())
            losses = scope.enter_context(captured_result(F.mse_loss))
            self.base.model.forward(**inputs)
        draws = self.base.config.repeated_diffusion_steps
        return PolicyTrace(
            loss=per_sample_mean(losses.value, mask.repeat(draws, 1)).unflatten(0, (draws, rows)).mean(dim=0),
            context=context.value[:, -prompt_mask[0].shape[1] :].float(),
            context_mask=prompt_mask[0],
            action_tokens=self._action_tokens(action, batch),
            action_hidden=hidden.value[:rows].float(),
            action_mask=mask,
        )

    def _embed_image(self, key: str, image: Float[Tensor, "rows channels _ _"]) -> Float[Tensor, "rows *features"]:
        with self._autocast():
            return self._encode(*self._pixels(image), len(image))

    def _tower_tokens(
        self, tower: nn.Module, key: str, image: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch patches target_dim"]:
        """Of images that are resized, normalised and cut into patches by the policy's own processor."""
        pixels, grid = self._pixels(image)
        with self._autocast():
            states = tower(pixels.to(next(tower.parameters()).dtype), grid_thw=grid).last_hidden_state
        return self._tokens(states, len(image))

    def _captured_hidden(self, keep: str = "first") -> AbstractContextManager[Capture]:
        return captured_input(self._head.action_decoder, keep)

    @property
    def _qwen(self) -> Any:
        return self.base.model.qwen.model.model

    @property
    def _head(self) -> Any:
        return self.base.model.action_model

    @property
    def _head_blocks(self) -> Iterable[nn.Module]:
        return self._head.model.transformer_blocks

    def _autocast(self) -> AbstractContextManager[Any]:
        # the policy's own module, already loaded with it, is slow to load for nothing
        from lerobot.policies.vla_jepa.modeling_vla_jepa import _get_autocast_context

        return _get_autocast_context(next(self.base.parameters()).device.type)

    def _pixels(self, frames: Float[Tensor, "rows channels height width"]) -> tuple[Tensor, Tensor]:
        """Patches of one camera's images and their grids, as `Qwen3VLInterface.build_inputs` has them made."""
        interface = self.base.model.qwen
        device = interface.model.device
        images = list(interface.to_pixel_values(frames))
        made = interface.processor.image_processor(images=images, return_tensors="pt", device=device, do_rescale=False)
        return made["pixel_values"].to(device), made["image_grid_thw"].to(device)

    def _enter_views(self, scope: ExitStack, views: Views, rows: int) -> Batch:
        """Give the features in the tower's place; returns black images, which cost the processor alone."""
        views.check_rows(rows)
        scope.enter_context(self._given([views.features[key] for key in self.target_keys()]))
        visual = self._qwen.visual.config
        side = visual.patch_size * visual.spatial_merge_size
        images = {}
        for key, value in views.features.items():
            height, width = side * value.shape[3], side * value.shape[4]
            images[key] = torch.zeros(1, 3, 1, 1, device=value.device).expand(rows, 3, height, width)
        return images

    @contextmanager
    def belief_scope(
        self, belief: Belief | None, mask: BeliefMask | None = None
    ) -> Iterator[list[Bool[Tensor, "batch prompt"]]]:
        """Prepend the belief and keep it out of what the action head picks from; yields the prompt's masks."""
        model = self.base.model
        original = model._qwen_last_decoder_hidden
        tokens = 0 if belief is None else belief.shape[1]
        masks: list[Tensor] = []

        def states(qwen_inputs: Any) -> Tensor:
            masks.append(qwen_inputs["attention_mask"].bool())
            return original(qwen_inputs)[:, tokens:]

        with self.exclusive(), self._prepended(belief, mask), patched(model, "_qwen_last_decoder_hidden", states):
            yield masks

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        clean = torch.full(
            action.shape[:1], self.base.config.action_num_timestep_buckets, dtype=torch.long, device=action.device
        )
        return self._head.action_encoder(action.float(), clean).float()
