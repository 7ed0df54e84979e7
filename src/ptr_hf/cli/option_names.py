"""Options that a command does not have, and the ones that were probably meant."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches

ELSEWHERE: dict[str, tuple[str, ...]] = {
    # what LeRobot, other trainers and older releases of transformers call our options
    "policy_path": (
        "policy",
        "policy.path",
        "policy.pretrained_path",
        "policy.base_path",
        "model",
        "model_name_or_path",
    ),
    "policy_type": ("policy.type",),
    "dataset": ("dataset.repo_id", "dataset.root", "dataset_path", "dataset_name", "repo_id", "data", "train_dataset"),
    "eval_dataset": ("eval.dataset", "val_dataset", "validation_dataset"),
    "dataset_revision": ("dataset.revision",),
    "output_dir": ("out", "output", "out_dir"),
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "batch", "bs", "per_gpu_train_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size",),
    "max_steps": ("steps", "num_steps", "max_train_steps", "train_steps", "num_train_steps", "offline_steps"),
    "num_train_epochs": ("epochs", "num_epochs", "max_epochs"),
    "learning_rate": ("lr", "optimizer.lr", "policy.optimizer_lr"),
    "weight_decay": ("optimizer.weight_decay", "policy.optimizer_weight_decay", "wd"),
    "max_grad_norm": ("grad_clip_norm", "optimizer.grad_clip_norm", "policy.optimizer_grad_clip_norm", "grad_clip"),
    "warmup_steps": ("num_warmup_steps", "warmup", "scheduler.num_warmup_steps", "policy.scheduler_warmup_steps"),
    "lr_scheduler_type": ("scheduler", "lr_scheduler", "scheduler.type"),
    "gradient_accumulation_steps": ("grad_accum", "accumulation_steps", "gradient_accumulation"),
    "dataloader_num_workers": ("num_workers", "workers"),
    "save_steps": ("save_freq", "save_every", "save_interval"),
    "logging_steps": ("log_freq", "log_every", "log_interval"),
    "eval_strategy": ("evaluation_strategy",),
    "eval_env": ("env", "env.type"),
    "eval_env_steps": ("env_eval_freq", "eval_freq"),
    "eval_env_episodes": ("eval.n_episodes", "n_episodes"),
    "eval_env_batch_size": ("eval.batch_size",),
    "resume_from_checkpoint": ("resume", "checkpoint", "config_path"),
    "run_name": ("job_name", "exp_name", "wandb.name"),
    "report_to": ("wandb", "wandb.enable", "logger"),
    "push_to_hub": ("policy.push_to_hub",),
    "hub_model_id": ("policy.repo_id", "hub_repo_id", "push_to"),
    "use_cpu": ("device", "policy.device", "no_cuda", "cpu"),
    "use_peft": ("peft", "lora", "peft.method_type"),
    "peft_r": ("lora_r", "lora_rank", "peft.r"),
    "bf16": ("mixed_precision", "policy.use_amp", "dtype", "policy.dtype"),
    "chunk_size": ("policy.chunk_size", "horizon", "action_horizon"),
    "rename_map": ("rename", "policy.rename_map"),
    "config": ("config_file", "yaml"),
}
NOTES = {
    "per_device_train_batch_size": "segments on each device",
    "resume_from_checkpoint": "`last`, or a checkpoint's folder",
    "report_to": "e.g. wandb",
    "use_cpu": "true or false; a GPU is used by itself",
    "bf16": "true or false",
    "eval_env_steps": "steps between two evaluations in --eval_env",
}
GONE = {"normalize_over": "it was taken out in 0.2: every micro-batch is divided by its own Σw; leave it out"}
_MEANT = {other: name for name, others in ELSEWHERE.items() for other in others}


def meant(option: str, known: Collection[str]) -> str:
    """What an unknown option was probably meant to be, as the end of a sentence; empty where nothing is near.

    Args:
        option: as given, e.g. ``--batch_size`` or ``--policy.path=lerobot/smolvla_base``.
        known: the command's own options, without dashes.
    """
    name = option.partition("=")[0].lstrip("-").replace("-", "_")
    if name in GONE:
        return f"{GONE[name]}."
    near = [_MEANT[name]] if _MEANT.get(name) in known else get_close_matches(name, known, n=1, cutoff=0.7)
    if not near:
        return ""
    note = NOTES.get(near[0])
    return f"did you mean --{near[0]}" + (f" ({note})?" if note and near[0] == _MEANT.get(name) else "?")


def unknown_options(rest: Sequence[str], known: Collection[str]) -> str:
    """The sentence about arguments that belong to no option.

    Args:
        rest: the arguments that were left over, in their order.
        known: the command's own options, without dashes.
    """
    options = [argument for argument in rest if argument.startswith("-")]
    if not options:
        return f"{' '.join(rest)} belongs to no option: every option begins with --."
    found = []
    for option in dict.fromkeys(option.partition("=")[0] for option in options):
        hint = meant(option, known)
        found.append(f"{option} is no option here" + (f"; {hint}" if hint else "."))
    return " ".join(found)
