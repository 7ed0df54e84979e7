"""Files that others wrote: regular, undamaged, of a sane size, and unable to run code."""
