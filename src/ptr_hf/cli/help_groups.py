"""Which options of `ptr-train` its help shows first, and what it says of some of them.

`--help` prints `train_help.txt` without importing torch. The file is written anew, and compared in the tests, by

    python -m ptr_hf.cli.train_options > src/ptr_hf/cli/train_help.txt
"""

from pathlib import Path

HELP_FILE = Path(__file__).parent / "train_help.txt"

GROUPS: dict[str, tuple[str, ...]] = {
    "what is trained on what": (
        *("policy_path", "policy_type", "policy_overrides", "use_peft"),
        *("dataset", "mixture", "rename_map", "statistics", "in_memory", "cache_features"),
    ),
    "the run": (
        *("output_dir", "config", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "learning_rate", "warmup_steps", "seed", "bf16", "gradient_checkpointing"),
        *("dataloader_num_workers", "use_cpu"),
    ),
    "the method": ("preset", "weights", "false_alarms", "weight_min", "chunk_size", "compare_sft"),
    "checkpoints and logs": (
        *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "logging_steps", "report_to"),
    ),
    "evaluation": ("eval_dataset", "eval_env", "eval_env_steps"),
    "publishing": ("push_to_hub", "hub_model_id", "license"),
}

WORDS: dict[str, str] = {
    "preset": "What weighs the demonstrations: ptr_offline inspects the data before training; sft is plain fine-tuning; ptr is "
    "the paper's scorer in the step. docs/training.md has the others.",
    "weights": "Weights of the demonstrations: auto inspects the data first, else a parquet or csv file (docs/weights.md).",
    "weight_min": "Weight of what is found to be bad.",
    "chunk_size": "Actions per chunk. Default: the policy's own.",
    "output_dir": "Folder for checkpoints, logs, report and model card.",
    "per_device_train_batch_size": "Segments on each device in a forward pass; one holds segment_length chunks.",
    "gradient_accumulation_steps": "Forward passes of an optimiser step.",
    "seed": "Seed of everything that is drawn.",
    "bf16": "Compute in bfloat16 (on a GPU), the weights kept in float32.",
    "gradient_checkpointing": "Compute activations twice instead of keeping them: less memory, a fifth slower.",
    "dataloader_num_workers": "Processes that read and decode data beside each training process.",
    "use_cpu": "Train on the CPU although there is a GPU.",
    "save_strategy": "When checkpoints are written: steps, epoch, best or no; the final policy is always written.",
    "resume_from_checkpoint": "`last`, or a checkpoint's folder: go on with that run.",
    "push_to_hub": "Publish policy, card and report at every save and at the end.",
    "hub_model_id": "Repository to publish to, as user/name. Default: the name of output_dir.",
}
"""In the place of the fields' own help, which is longer, or speaks of another kind of model."""
