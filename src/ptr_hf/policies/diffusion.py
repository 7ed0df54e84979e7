"""Diffusion Policy: a U-Net denoises the action chunk under one vector of states and image keypoints."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float, Float32
from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalResidualBlock1d
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ptr_hf.policies.base import part
from ptr_hf.policies.conditioned import ConditionedAdapter
from ptr_hf.policies.tower import VisionTower, flatten_map, resnet_tower
from ptr_hf.policies.trace import Batch


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
    _denoiser = part("diffusion.unet")
    _sampler = part("diffusion")
    _action_out = part("diffusion.unet.final_conv")
    _image_encoder = part("diffusion.rgb_encoder")

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if self.base.config.compile_model:
            raise ValueError("PTR cannot read a compiled Diffusion U-Net: set compile_model=False in its config.")

    @property
    def context_dim(self) -> int:
        """Width of one observation step's conditioning: states and every camera's keypoints."""
        config = self.base.config
        states = sum(config.input_features[key].shape[0] for key in self.observations)
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

    @property
    def observations(self) -> tuple[str, ...]:
        """The states that the policy's config names."""
        return (OBS_STATE, OBS_ENV_STATE) if self.base.config.env_state_feature else (OBS_STATE,)

    def _steps_first(self, hidden: Float[Tensor, "batch dim steps"]) -> Float[Tensor, "batch steps dim"]:
        return hidden.transpose(1, 2)

    def _action_tokens(
        self, action: Float[Tensor, "batch steps dim"], batch: Batch
    ) -> Float32[Tensor, "batch steps action_dim"]:
        return self._denoiser.down_modules[0][0].residual_conv(action.transpose(1, 2)).transpose(1, 2).float()

    def _tower_in(self, encoder: Any) -> VisionTower:
        return resnet_tower(encoder.backbone)

    def _cells(self, state: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch patches dim"]:
        return flatten_map(state)

    def _encode(
        self, encoder: Any, images: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows dim 1 1"]:
        return encoder(images)[..., None, None]

    def _from_features(self, features: Float[Tensor, "rows dim 1 1"]) -> Float[Tensor, "rows dim"]:
        return features.flatten(1)

    def _prepared(self, key: str, image: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *input"]:
        encoder = self._encoder(key)
        image = image if encoder.resize is None else encoder.resize(image)
        return encoder.center_crop(image) if encoder.do_crop else image

    def _crops_at_random(self, encoder: Any) -> bool:
        return encoder.training and encoder.do_crop and self.base.config.crop_is_random
