"""LeRobot discovers this module by name; importing it registers the `ptr` policy, the processor steps of policies of
several robots, and the `ptr_metaworld` environment."""

from typing import Any

import ptr_hf.data.mixture.processor
import ptr_hf.envs.metaworld_config  # noqa: F401
from ptr_hf.configuration_ptr import PTRConfig


def _weights(config: PTRConfig, dataset: Any, meta: Any) -> Any:
    # every command of LeRobot imports this module, and few read weights
    from ptr_hf.scoring.given_weights import training_weights

    return training_weights(config, dataset, meta)


PTRConfig.weights_reader = _weights
