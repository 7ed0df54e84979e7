"""Segments, datasets, the corruption protocol and the bundled demonstrations."""
