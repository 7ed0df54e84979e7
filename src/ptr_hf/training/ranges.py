"""Ranges of the training arguments that transformers leaves to whatever stumbles over them later."""

import json
from collections.abc import Iterable
from typing import Any

from ptr_hf.hyperparameters import check_type, require

AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("eval_env_episodes", "eval_env_batch_size", "peft_r", "peft_alpha", "dataloader_prefetch_factor"),
    *("eval_accumulation_steps", "ddp_timeout"),
)
AT_LEAST_ZERO = ("dataloader_num_workers", "eval_env_steps", "eval_env_seed")
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
POSITIVE = ("logging_steps", "save_steps", "eval_steps", "adam_epsilon", "max_gigabytes")
MOMENTA = ("adam_beta1", "adam_beta2")
SEEDS = ("seed", "data_seed")
MOST_SEED = 2**32 - 1


def check_ranges(args: Any) -> None:
    """Refuse training arguments that no run can have.

    Args:
        args: `PTRTrainingArguments` before transformers looks at them.

    Raises:
        TypeError: a value is no number, or no whole one.
        ValueError: it is out of range; the sentence names argument, value and range.
    """
    for names, kind, test, expected in (
        (AT_LEAST_ONE, int, lambda value: value >= 1, "1 or more"),
        (AT_LEAST_ZERO, int, lambda value: value >= 0, "0 or more"),
        (NOT_NEGATIVE, float, lambda value: value >= 0, "0 or more"),
        (POSITIVE, float, lambda value: value > 0, "positive"),
        (MOMENTA, float, lambda value: 0 <= value < 1, "in [0, 1)"),
        (SEEDS, int, lambda value: 0 <= value <= MOST_SEED, f"between 0 and {MOST_SEED}"),
    ):
        for name in names:
            value = vars(args)[name]
            if value is not None:
                check_type(name, value, kind)
                require(test(value), name, value, expected)


def check_structures(args: Any, names: Iterable[str]) -> None:
    """Refuse text that begins like JSON and is none.

    Raises:
        ValueError: the sentence names the argument and where the text goes wrong.
    """
    for name in names:
        value = vars(args)[name]
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"{name} is no JSON ({error}): {value}") from error


def check_renames(value: Any) -> None:
    """Refuse a rename_map that is no mapping of names.

    Raises:
        ValueError: it is none.
    """
    if value is None or (isinstance(value, dict) and all(isinstance(to, str) for to in value.values())):
        return
    raise ValueError(
        f"rename_map={value!r} is no mapping: give JSON of dataset keys and policy keys, such as "
        '{"observation.images.top": "observation.images.camera1"}.'
    )
