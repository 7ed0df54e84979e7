"""Does reweighting help when demonstrations are corrupted? Presets and controls on Meta-World (docs/corruption.md)."""
