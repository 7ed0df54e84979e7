"""Diffusion Policy: a U-Net denoises the action chunk under one vector of states and image keypoints."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float, Float32
from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalResidualBlock1d
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ptr_hf.policies.conditioned import ConditionedAdapter
from ptr_hf.policies.protocol import check_layer

RESNET_STEM, RESNET_STAGES = 4, 4


class DiffusionAdapter(ConditionedAdapter):
    """Reads a `DiffusionPolicy` (lerobot 0.6.1), with cameras, with an environment state, or with both.

    A_t is the clean chunk through the U-Net's first 1x1 convolution (`residual_conv`), which looks at one step at a
    time: the first block's other path mixes neighbouring and padded steps. C_t is the input of the final block.

    The consequence tower is the ResNet up to one of its four stages. A policy without cameras feeds its environment state
    raw, so that state, normalised, is the target. With batch norm, a segment that is encoded at once is normalised by its
    own statistics.

    Raises:
        ValueError: the policy compiles its U-Net, which hides the modules that PTR reads.
    """

    family = "diffusion"

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if self.base.config.compile_model:
            raise ValueError("PTR cannot read a compiled Diffusion U-Net: set compile_model=False in its config.")

    @property
    def context_dim(self) -> int:
        """Width of one observation step's conditioning: states and every camera's keypoints."""
        config = self.base.config
        states = sum(config.input_features[key].shape[0] for key in self._state_keys)
        return int(states + 2 * config.spatial_softmax_num_keypoints * len(self._cameras))

    @property
    def action_dim(self) -> int:
        """Width of A_t: the U-Net's first level."""
        return int(self.base.config.down_dims[0])

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the U-Net's residual blocks in the backward pass."""
        self._denoiser.config.gradient_checkpointing = True

    def compilable(self) -> Iterable[nn.Module]:
        """The residual blocks of the U-Net and of the ResNets: the U-Net itself, compiled, may skip PTR's hooks."""
        kinds = (DiffusionConditionalResidualBlock1d, BasicBlock, Bottleneck)
        return (module for module in self.base.diffusion.modules() if isinstance(module, kinds))

    def num_tower_layers(self) -> int:
        """ResNet stages, or 1 for the state itself."""
        return RESNET_STAGES if self._cameras else 1

    def target_dim(self, layer: int) -> int:
        """Channels of the ResNet stage, or the width of the state."""
        check_layer(layer, self.num_tower_layers())
        if not self._cameras:
            return int(self.base.config.env_state_feature.shape[0])
        block = self._layer(self._encoders[0], layer)[-1]
        return int((block.conv3 if isinstance(block, Bottleneck) else block.conv2).weight.shape[0])

    @property
    def _denoiser(self) -> Any:
        return self.base.diffusion.unet

    @property
    def _sampler(self) -> Any:
        return self.base.diffusion

    @property
    def _head(self) -> Any:
        return self._denoiser.final_conv

    @property
    def _encoders(self) -> list[Any]:
        if not self._cameras:
            return []
        encoder = self.base.diffusion.rgb_encoder
        return list(encoder) if self.base.config.use_separate_rgb_encoder_per_camera else [encoder]

    @property
    def _state_keys(self) -> list[str]:
        return [OBS_STATE, OBS_ENV_STATE] if self.base.config.env_state_feature else [OBS_STATE]

    def _steps_first(self, hidden: Float[Tensor, "batch dim steps"]) -> Float[Tensor, "batch steps dim"]:
        return hidden.transpose(1, 2)

    def _action_tokens(self, action: Float[Tensor, "batch steps dim"]) -> Float32[Tensor, "batch steps action_dim"]:
        return self._denoiser.down_modules[0][0].residual_conv(action.transpose(1, 2)).transpose(1, 2).float()

    def _tower_root(self, encoder: Any) -> Any:
        return encoder.backbone

    def _layer(self, encoder: Any, layer: int) -> Any:
        return encoder.backbone[RESNET_STEM + layer - 1]

    def _truncated(self, encoder: Any, layer: int) -> nn.Module:
        return nn.Sequential(*encoder.backbone[: RESNET_STEM + layer])

    def _run_tower(
        self, tower: nn.Module, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        return tower(pixels)

    def _tokens(self, state: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch patches dim"]:
        return state.flatten(2).transpose(1, 2)

    def _encode(
        self, encoder: Any, images: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows dim 1 1"]:
        return encoder(images)[..., None, None]

    def _from_features(self, features: Float[Tensor, "rows dim 1 1"]) -> Float[Tensor, "rows dim"]:
        return features.flatten(1)

    def _prepared(
        self, encoder: Any, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        image = image if encoder.resize is None else encoder.resize(image)
        return encoder.center_crop(image) if encoder.do_crop else image

    def _crops_at_random(self, encoder: Any) -> bool:
        return encoder.training and encoder.do_crop and self.base.config.crop_is_random
