"""LeRobot discovers this module by name; importing it registers the `ptr` policy and the `ptr_metaworld` environment."""

import ptr_hf.configuration_ptr
import ptr_hf.data.benchmark_env  # noqa: F401
