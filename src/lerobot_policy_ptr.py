"""LeRobot discovers this module by name; importing it registers the `ptr` policy."""

import ptr_hf.configuration_ptr  # noqa: F401
