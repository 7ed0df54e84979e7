"""A checkpoint's files: what may be opened, what they may ask for."""
