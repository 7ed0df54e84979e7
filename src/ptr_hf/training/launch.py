"""Guard rails of a launch: what would quietly train something else is refused before any training time is spent.

Launchers that start one process where several were asked for, `nn.DataParallel`, ranks that hold different numbers of rows,
and ranks that were started with different settings.
"""

import os
import sys
from collections.abc import Mapping, Sequence, Sized
from hashlib import sha256
from pathlib import Path
from typing import Any

import draccus
import psutil  # type: ignore[import-untyped]
from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, gather_object
from lerobot.configs import PreTrainedConfig
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.publishing.card_facts import TrainingData, library_versions
from ptr_hf.training.launcher_watch import watch_launcher

MAY_DIFFER = frozenset(
    {
        # where a rank runs, reads, caches and logs
        *("local_rank", "output_dir", "logging_dir", "run_name", "truth", "max_gigabytes"),
        *("log_level", "log_level_replica", "disable_tqdm", "report_to", "resume_from_checkpoint"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("dataloader_persistent_workers", "device", "pretrained_path", "base_path"),
    }
)
"""Settings that ranks may hold different values of; everything else has to be the same on all of them."""
SHOWN = 6
"""Differences that an error names; the number of all of them stands beside them."""
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.launch")
"""Programs, or modules of `python -m`, that start the processes of a run and end with all of them."""
SIMPLE_LAUNCH = ("ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR")
"""What `accelerate launch` leaves in the environment where it starts one process though it was asked for several."""


def check_launch(args: TrainingArguments) -> None:
    """Refuse a launch that would train something else than was asked for; from here on, end with the launcher.

    Args:
        args: the run's, with its process group set up.

    Raises:
        ValueError: one process where several were asked for, several that do not know of each other, several GPUs without a
            launcher, ranks that could hold different numbers of rows or rows without their text, or DeepSpeed; the sentence
            has the right command.
    """
    watch_launcher(is_launcher)
    script = Path(sys.argv[0]).name or "train.py"
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible without a launcher, which would run nn.DataParallel and break the method: start "
            f"with `accelerate launch --multi_gpu --num_processes {args.n_gpu} {script} ...`, or show one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "PTR does not run under DeepSpeed, whose checkpoints are pickles: use FSDP2, which shards as much, "
            f"`accelerate launch --config_file recipes/accelerate/fsdp2.yaml {script} ...`."
        )
    state = args.distributed_state
    if args.world_size > 1 and state is not None and state.distributed_type == DistributedType.NO:
        raise ValueError(
            f"{args.world_size} processes were started but Accelerate would not average their gradients: on a machine without "
            "GPUs add use_cpu=True (`--use_cpu true`), and leave ddp_backend out."
        )
    if args.world_size == 1:
        asked = max(_processes_of_the_launcher(), int(os.environ.get("WORLD_SIZE", "1")))
        if asked > 1:
            raise ValueError(
                f"{asked} processes were asked for but this one would train alone. On CPUs start with `accelerate launch "
                f"--multi_gpu --num_processes {asked} {script} ... --use_cpu true` (use_cpu=True in PTRTrainingArguments), on "
                f"GPUs with `accelerate launch --multi_gpu --num_processes {asked} {script} ...`; for one process ask for one "
                "(`--num_processes 1`, WORLD_SIZE unset)."
            )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches=True lets one process read for all and send tensors alone, without the "
            "instructions: leave it out, so that every process reads its own segments."
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "accelerator_config.even_batches=False lets processes hold different numbers of segments, and they would wait for "
            "each other for ever: leave it at True."
        )


def check_alike(
    args: TrainingArguments, policy: PTRPolicy, described: Sequence[TrainingData], dataset: Dataset
) -> None:
    """Compare what must be the same in all processes, once, and refuse on all of them where it is not.

    Args:
        args: of the run.
        policy: in training; the names and shapes of its parameters count.
        described: the training data, as the card names them.
        dataset: the training data.

    Raises:
        ValueError: values differ; names them, and who holds which.
    """
    if args.world_size == 1:
        return
    facts = _facts(args, policy) | {"episodes": sum(part.episodes or 0 for part in described)}
    if isinstance(dataset, Sized):
        facts["training segments"] = len(dataset)
    everyone: list[Mapping[str, Any]] = gather_object([facts])
    differences = []
    for name in sorted(set().union(*everyone)):
        held = [repr(own[name]) if name in own else "nothing" for own in everyone]
        if len(set(held)) > 1:
            ranks = {value: [rank for rank, own in enumerate(held) if own == value] for value in held}
            differences.append(f"{name}: " + ", ".join(f"{value} on {_ranks(own)}" for value, own in ranks.items()))
    if differences:
        more = f" (and {len(differences) - SHOWN} more)" if len(differences) > SHOWN else ""
        raise ValueError(
            f"The {len(everyone)} processes were not started alike. {'; '.join(differences[:SHOWN])}{more}. Start all of them "
            "with the same script, arguments, data and library versions."
        )


def _facts(args: TrainingArguments, policy: PTRPolicy) -> dict[str, Any]:
    """Small plain values by name: settings, parameters and versions."""
    names = sha256()
    parameters = list(policy.named_parameters())
    for name, value in parameters:
        names.update(f"{name} {tuple(value.shape)} {value.dtype} {value.requires_grad}\n".encode())
    facts: dict[str, Any] = {f"version of {name}": value for name, value in library_versions().items()}
    facts |= {
        "number of parameters": sum(value.numel() for _, value in parameters),
        "names, shapes and types of parameters": names.hexdigest()[:12],
    }
    settings = _plain("policy", draccus.encode(policy.config, PreTrainedConfig)) | _plain("", args.to_dict())
    shared = {name: value for name, value in settings.items() if name.rsplit(".", 1)[-1] not in MAY_DIFFER}
    return facts | {name: value for name, value in shared.items() if not name.endswith("_token")}


def _plain(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}.{name}" if prefix else str(name)
        flat |= _plain(dotted, value) if isinstance(value, Mapping) else {dotted: _placeless(value)}
    return flat


def _placeless(value: Any) -> Any:
    """Nodes may keep the same things in different folders."""
    return "a local path" if isinstance(value, str | Path) and Path(value).is_absolute() else value


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > SHOWN else ''}"


def _processes_of_the_launcher() -> int:
    """Processes that the `accelerate launch` above this process was asked for; 1 where there is none.

    The environment alone does not tell: a cluster may export MASTER_ADDR for a plain single process too.
    """
    if not all(name in os.environ for name in SIMPLE_LAUNCH):
        return 1
    for parent in psutil.Process().parents():
        try:
            arguments, folder = launch_arguments(parent.cmdline()), Path(parent.cwd())
        except psutil.Error:
            continue
        if arguments is not None:
            return processes_asked_for(arguments, folder)
    return 1


def launch_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` on a command line, however it was written; None where it is another command."""
    for index, word in enumerate(command):
        if Path(word).name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(command[index + 1 :])
        if Path(word).name == "accelerate" or word == "accelerate.commands.accelerate_cli":
            return list(command[index + 2 :]) if command[index + 1 : index + 2] == ["launch"] else None
    return None


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is one of `accelerate launch`, torchrun or DeepSpeed, which end with all of their processes."""
    if launch_arguments(command) is not None:
        return True
    words = [Path(word).name for word in command[:4] if not word.startswith("-")]
    program = words[1:2] if words and words[0].startswith("python") else words[:1]
    return program != [] and program[0] in LAUNCHERS


def processes_asked_for(arguments: list[str], folder: Path) -> int:
    """Processes that the launcher's own options, or its configuration file, ask for."""
    options = launch_command_parser().parse_known_args(arguments)[0]
    processes, machines = options.num_processes, options.num_machines
    path = options.config_file or (None if options.cpu else default_config_file)
    if path is not None and (folder / path).is_file():
        config = load_config_from_file(str(folder / path))
        if isinstance(config, ClusterConfig):
            processes, machines = processes or config.num_processes, machines or config.num_machines
    return max(processes or 1, machines or 1)
