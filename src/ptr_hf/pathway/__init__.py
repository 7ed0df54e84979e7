"""The side pathway around a policy: its parts, the targets it encodes, the summaries of a chunk."""
