"""LeRobot discovers this module by name; importing it registers the `ptr` policy, the processor steps of policies of
several robots, and the `ptr_metaworld` environment."""

import ptr_hf.configuration_ptr
import ptr_hf.data.mixture.processor
import ptr_hf.envs.metaworld_config  # noqa: F401
