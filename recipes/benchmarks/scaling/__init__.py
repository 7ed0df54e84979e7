"""What ranks send and hold, and whether together they do what one process does (docs/scaling.md)."""
