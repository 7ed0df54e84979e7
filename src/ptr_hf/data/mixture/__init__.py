"""Several datasets, also of different robots, read as one."""
