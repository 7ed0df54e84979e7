"""VLA-JEPA: a Qwen3-VL whose embodied-action tokens condition a flow-matching action head."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ptr_hf.constants import ACTION_PAD
from ptr_hf.policies.base import features_key, part, view_key
from ptr_hf.policies.batches import action_mask, per_sample_mean
from ptr_hf.policies.hooks import captured_output, captured_result
from ptr_hf.policies.qwen3vl import Qwen3VLAdapter
from ptr_hf.policies.trace import Batch, PolicyTrace, Views


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
    features_ndim = 6
    hidden_dim = part("config.action_hidden_size")
    _qwen = part("model.qwen.model.model")
    _head = part("model.action_model")
    _action_out = part("model.action_model.action_decoder")

    @property
    def observations(self) -> tuple[str, ...]:
        """The state, where the policy's config names one."""
        return (OBS_STATE,) if self.base.config.robot_state_feature else ()

    @property
    def reads_features(self) -> bool:
        """Whether features are enough: a world model that trains looks at pictures itself."""
        return not self.base.config.enable_world_model

    def _without_coming(self, batch: Batch) -> Batch:
        """Of `num_video_frames` observations the first is the present, as LeRobot takes it."""
        axes = {OBS_STATE: 2}
        for key in self.target_keys():
            axes |= {key: self.image_ndim, features_key(key): self.features_ndim, view_key(key): 2}
        stacked = [key for key, single in axes.items() if key in batch and batch[key].ndim > single]
        frames = self.base.config.num_video_frames
        return {**batch, **{key: batch[key][:, 0] for key in stacked if batch[key].shape[1] == frames}}

    def _trace(self, batch: Batch, belief: AbstractContextManager[Any], views: Views | None) -> PolicyTrace:
        """One forward of the flow-matching loss."""
        action = batch[ACTION]
        rows = action.shape[0]
        mask = action_mask(batch, action)
        with ExitStack() as scope:
            batch = {**batch, ACTION_PAD: ~mask}
            if views is not None:
                batch |= self._enter_views(scope, views)
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

    @property
    def _last_layer(self) -> tuple[Any, str]:
        return self.base.model, "_qwen_last_decoder_hidden"

    def _autocast(self) -> AbstractContextManager[Any]:
        # the policy's own module, already loaded with it, is slow to load for nothing
        from lerobot.policies.vla_jepa.modeling_vla_jepa import _get_autocast_context

        return _get_autocast_context(next(self.base.parameters()).device.type)

    def _patches(self, image: Float[Tensor, "rows channels height width"]) -> tuple[Tensor, Tensor]:
        """Patches of one camera's images and their grids, as `Qwen3VLInterface.build_inputs` has them made."""
        interface = self.base.model.qwen
        device = interface.model.device
        images = list(interface.to_pixel_values(image))
        made = interface.processor.image_processor(images=images, return_tensors="pt", device=device, do_rescale=False)
        return made["pixel_values"].to(device), made["image_grid_thw"].to(device)

    def _enter_views(self, scope: ExitStack, views: Views) -> Batch:
        """Give the features in the tower's place; returns black images, which cost the processor alone."""
        self._give(scope, [views.features[key] for key in self.target_keys()])
        visual = self._qwen.visual.config
        side = visual.patch_size * visual.spatial_merge_size
        images = {}
        for key, value in views.features.items():
            height, width = side * value.shape[3], side * value.shape[4]
            images[key] = torch.zeros(1, 3, 1, 1, device=value.device).expand(len(value), 3, height, width)
        return images

    def _enter_features(self, scope: ExitStack, views: Views) -> Batch:
        return self._enter_views(scope, views)

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float[Tensor, "batch steps action_dim"]:
        clean = torch.full(
            action.shape[:1], self.base.config.action_num_timestep_buckets, dtype=torch.long, device=action.device
        )
        return self._head.action_encoder(action.float(), clean).float()
