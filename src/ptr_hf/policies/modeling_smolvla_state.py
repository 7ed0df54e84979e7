"""`smolvla_state`: SmolVLA without cameras. LeRobot finds this module by its name."""

from typing import Any

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from ptr_hf.policies.configuration_smolvla_state import SmolVLAStateConfig


class SmolVLAStatePolicy(SmolVLAPolicy):
    """LeRobot's `SmolVLAPolicy` on instruction and state alone; its vision tower and connector are left out."""

    config_class = SmolVLAStateConfig
    name = "smolvla_state"

    def __init__(self, config: SmolVLAStateConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        vlm = self.model.vlm_with_expert.get_vlm_model()
        vlm.vision_model, vlm.connector = nn.Identity(), nn.Identity()

    def prepare_images(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """No images and no masks, whatever the batch holds."""
        return [], []
