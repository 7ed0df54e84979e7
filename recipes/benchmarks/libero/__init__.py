"""LIBERO, the paper's benchmark: scripted experts, recorded conditions, and runs on them (docs/libero.md)."""
