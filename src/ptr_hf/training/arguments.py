"""`PTRTrainingArguments`: transformers' training arguments and the method's hyperparameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ptr_hf.hyperparameters import PTRHyperparameters, check_type
from ptr_hf.training.ranges import check_ranges, check_renames, check_structures


@dataclass
class PTRTrainingArguments(PTRHyperparameters, TrainingArguments):
    """Arguments of `PTRTrainer`.

    Everything of `transformers.TrainingArguments` and `PTRHyperparameters`. Optimisation defaults are the paper's Table 6
    (AdamW, 1e-4, weight decay 0.01, cosine after a warm-up of 3.3 % of the run); a run has 20,000 steps (the paper's: 60,000),
    writes a checkpoint every 2,000 and keeps the last two. `per_device_train_batch_size` counts segments: one holds
    `segment_length` chunks. The preset is `ptr_offline` unless another is named.

    Raises:
        TypeError: a hyperparameter is of another type than its field.
        ValueError: a value is out of range or contradicts another one or the preset; the sentence names it.

    Example:
        >>> args = PTRTrainingArguments(output_dir="out", max_steps=5000, per_device_train_batch_size=32)
        >>> args.preset, args.weights, args.save_total_limit
        ('ptr_offline', 'auto', 2)
    """

    max_steps: int = field(
        default=None,  # type: ignore[assignment]  # None: not given
        metadata={"help": "Optimiser steps. Default: 20,000, or -1 with num_train_epochs, which counts these instead."},
    )
    num_train_epochs: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Passes over the data, in the place of max_steps. Default: -1, which counts max_steps."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule, a name of transformers."}
    )
    warmup_steps: float = field(
        default=0.033, metadata={"help": "Learning-rate warm-up: steps, or below 1 a share of the run."}
    )
    max_grad_norm: float = field(
        default=10.0, metadata={"help": "Gradients are clipped to this norm (LeRobot's default)."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between two log rows, or below 1 a share of the run."}
    )
    save_steps: float = field(
        default=2000, metadata={"help": "Steps between two checkpoints, or below 1 a share of the run."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints that are kept: the newest ones, and the best one. 0 keeps all."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses from the log; it waits for the device at every step."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  the order transformers parses
        default="tensorboard", metadata={"help": "Where logs go: tensorboard, trackio, wandb, none, or several."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: policies read dicts."})
    dataloader_persistent_workers: bool = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Start the processes that read data once, not at every epoch. Default: yes where there are any."
        },
    )
    nonfinite: Literal["skip", "stop"] = field(
        default="skip",
        metadata={
            "help": "Samples with NaN or Inf, and steps with such a gradient, are left out and named in the log and in "
            "ptr_nonfinite.json; stop ends training at the next log row instead, with a checkpoint."
        },
    )
    rename_map: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Dataset key -> policy key, as JSON, for cameras and states named differently."}
    )
    statistics: Literal["data", "policy"] = field(
        default="data",
        metadata={
            "help": "What normalises states, actions and pictures: the statistics of the training data, as in lerobot-train, or "
            "those saved with the policy, to go on exactly as it was trained. A resumed run keeps its own."
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    in_memory: bool = field(
        default=False,
        metadata={"help": "Read the whole dataset into memory first, videos decoded; up to max_gigabytes."},
    )
    max_gigabytes: float = field(default=4.0, metadata={"help": "Most memory that in_memory may take."})
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder for what a frozen vision tower makes of every frame, or auto for the Hugging Face cache. With it, "
            "computed before the first step, training decodes no video and runs no tower."
        },
    )
    cache_dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "What cache_features keeps numbers in; float32 takes twice the disk."}
    )
    truth: str | None = field(
        default=None,
        metadata={"help": "Truth sidecar of the training data, for score=oracle. Default: the one beside its folder."},
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train a PEFT adapter (LoRA) on the frozen policy, at the policy's own target modules."},
    )
    peft_r: int = field(default=16, metadata={"help": "Rank of the adapter that use_peft trains."})
    peft_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha. Default: PEFT's."})
    peft_target_modules: str | None = field(
        default=None, metadata={"help": "Regular expression of the modules to adapt. Default: the policy's own."}
    )
    eval_env: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "LeRobot environment to evaluate the policy in while it trains: its type, e.g. ptr_metaworld, or JSON with "
            "type and fields. Success goes to the log, ptr_evaluation.json and the card."
        },
    )
    eval_env_steps: int = field(
        default=0, metadata={"help": "Steps between two evaluations in eval_env; 0 evaluates at the end alone."}
    )
    eval_env_episodes: int = field(default=10, metadata={"help": "Episodes per task in eval_env."})
    eval_env_batch_size: int = field(default=10, metadata={"help": "Environments that run at once."})
    eval_env_seed: int = field(default=1000, metadata={"help": "Seed of the first episode's start; then counting on."})
    eval_env_robot: str | None = field(
        default=None, metadata={"help": "Which robot of a mixture eval_env has: a source's name or its embodiment."}
    )
    eval_env_must_succeed: bool = field(
        default=False,
        metadata={"help": "Stop training where the simulator fails, instead of reporting it and going on."},
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the published policy, as the Hub names it, e.g. apache-2.0."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the policy on the Hub."})

    # transformers parses JSON given on the command line for the fields listed here
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "rename_map", "eval_env"]  # noqa: RUF012

    def __post_init__(self, _filled: Mapping[str, Any] | None) -> None:
        PTRHyperparameters.__post_init__(self, _filled)
        self._refuse_idle(self.given)
        self._count_steps()
        self._fill("dataloader_persistent_workers", bool(self.dataloader_num_workers))
        check_ranges(self)
        check_structures(self, self._VALID_DICT_FIELDS)
        TrainingArguments.__post_init__(self)
        check_renames(self.rename_map)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop what the policy reads; leave it at False.")

    def _count_steps(self) -> None:
        """The run's length is given by max_steps or by num_train_epochs; the other is then -1."""
        steps, epochs = self.max_steps, self.num_train_epochs
        check_type("max_steps", steps, int)
        check_type("num_train_epochs", epochs, float)
        counts_epochs = epochs is not None and epochs > 0
        if steps is not None and steps > 0 and counts_epochs:
            raise ValueError(
                f"max_steps={steps} and num_train_epochs={epochs:g} were both given: drop the one that shall not count."
            )
        if steps == 0 or (steps is not None and steps < -1):
            raise ValueError(
                f"max_steps={steps} is out of range: it must be 1 or more, or -1 to count num_train_epochs."
            )
        if epochs is not None and epochs <= 0 and epochs != -1:
            raise ValueError(
                f"num_train_epochs={epochs:g} is out of range: it must be positive, or -1 to count max_steps."
            )
        if steps == -1 and not counts_epochs:
            raise ValueError("max_steps=-1 counts num_train_epochs, which was not given: give it, or the steps.")
        self._fill("max_steps", -1 if counts_epochs else 20_000)
        self._fill("num_train_epochs", -1.0)

    @property
    def segments_per_step(self) -> int:
        """Segments of an optimiser step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def peft_overrides(self) -> dict[str, Any] | None:
        """The fields above as LeRobot's `wrap_with_peft` takes them; None where use_peft is off."""
        if not self.use_peft:
            return None
        return {"r": self.peft_r, "lora_alpha": self.peft_alpha, "target_modules": self.peft_target_modules}

    @property
    def observation_renames(self) -> dict[str, str]:
        """`rename_map` as a dict; empty without one."""
        return self.rename_map if isinstance(self.rename_map, dict) else {}
