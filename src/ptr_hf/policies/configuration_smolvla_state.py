"""`smolvla_state`: SmolVLA's configuration without cameras."""

from dataclasses import dataclass

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig


@PreTrainedConfig.register_subclass("smolvla_state")
@dataclass
class SmolVLAStateConfig(SmolVLAConfig):
    """A SmolVLA that reads the instruction and the robot's state, for data sets that have no camera.

    All fields are SmolVLA's; those about images mean nothing. `max_state_dim` and `max_action_dim` are best set to the
    robot's own, which saves padding.
    """

    def validate_features(self) -> None:
        """Leave cameras out of the inputs, and check that the state fits.

        Raises:
            ValueError: there is no state, or state or actions are wider than the configured maximum.
        """
        features = (self.input_features or {}).items()
        self.input_features: dict[str, PolicyFeature] | None = {
            key: item for key, item in features if item.type is not FeatureType.VISUAL
        }
        state, action = self.robot_state_feature, self.action_feature
        if state is None:
            known = ", ".join(self.input_features or {}) or "nothing"
            raise ValueError(
                f"A smolvla_state policy sees no cameras and reads observation.state, but its input features are: {known}."
            )
        if state.shape[0] > self.max_state_dim:
            raise ValueError(
                f"observation.state has {state.shape[0]} entries and max_state_dim is {self.max_state_dim}: raise it."
            )
        if action is not None and action.shape[0] > self.max_action_dim:
            raise ValueError(
                f"action has {action.shape[0]} entries and max_action_dim is {self.max_action_dim}: raise it."
            )
