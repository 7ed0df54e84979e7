"""The configurations of a checkpoint, parsed strictly: known fields only, numbers within what a policy can need."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import PreTrainedConfig

from ptr_hf.artifact_files import printable, read_json
from ptr_hf.artifact_processors import LEROBOTS_OWN
from ptr_hf.artifacts.regular_files import inside, quoted
from ptr_hf.configuration_ptr import PTR_CONFIG_NAME, PTRConfig

MAX_INTEGER = 10_000_000
MAX_STEPS = 4096
STEPS = (
    *("chunk_size", "horizon", "n_obs_steps", "n_action_steps", "segment_length", "chunk_stride", "consequence_offset"),
    "num_belief_tokens",
)
"""Fields that count steps or tokens: Python lists of that length are made of them."""
CODE_SOURCES = {"pi0_fast": ("action_tokenizer_name", "text_tokenizer_name"), "groot": ("base_model_path",)}
"""Fields of base configurations that name repos whose own code LeRobot runs (trust_remote_code)."""


def read_config(folder: Path) -> PTRConfig:
    """Parse a folder's `ptr_config.json`; the base policy's configuration in it must be complete.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not parse, has an unknown field, or a value is out of range.
    """
    path = inside(folder, PTR_CONFIG_NAME)
    try:
        raw = read_json(path)
        choices = PreTrainedConfig.get_known_choices()
        if raw.get("type", "ptr") != "ptr":
            raise ValueError(f"its type is {quoted(raw['type'])}.")
        base = raw.get("base")
        if not isinstance(base, dict) or "type" not in base:
            raise ValueError("it lacks the base policy's configuration (base).")
        _check_fields(raw, PTRConfig, "")
        base_type = base["type"]
        if isinstance(base_type, str) and base_type in choices:
            _check_fields(base, choices[base_type], "base.")
        _check_integers(raw)
        config = draccus.decode(PTRConfig, {name: value for name, value in raw.items() if name != "type"})
        # the stored configuration is complete; where it came from may be gone, and is not looked up
        config.base_path, source = None, config.base_path
        assert config.base_config is not None
        config.base_path = source
    except FileNotFoundError:
        raise
    # draccus and LeRobot's configurations raise whatever a value makes them stumble over
    except Exception as error:
        raise ValueError(f"{path} is not a PTR configuration: {printable(error.__cause__ or error)}") from error
    return config


def _check_fields(content: Mapping[str, Any], config: type, prefix: str) -> None:
    known = [item.name for item in fields(config)]
    for name in content:
        if name not in known and name != "type":
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else "was it written by a newer release?"
            raise ValueError(f"the field {quoted(prefix + name)} is unknown; {hint}")


def _check_integers(content: Any, name: str = "") -> None:
    items = enumerate(content) if isinstance(content, list) else content.items() if isinstance(content, dict) else ()
    for key, value in items:
        limit = MAX_STEPS if key in STEPS else MAX_INTEGER
        if isinstance(value, int) and abs(value) > limit:
            raise ValueError(f"{name}{key}={quoted(value)} is out of range: the limit is {limit}.")
        _check_integers(value, f"{name}{key}.")


def check_values(config: PTRConfig, folder: Path, trusted: Collection[str] = ()) -> None:
    """Check a configuration that is about to be built, whoever parsed it: LeRobot reads config.json by itself.

    Args:
        config: of the policy.
        folder: of the checkpoint it belongs to, for the error message.
        trusted: Hub ids or folders, named by the base policy's configuration, whose own code may run.

    Raises:
        ValueError: a number is larger than any policy needs, or a repo's code would run that LeRobot does not choose itself.
    """
    try:
        _check_integers(config.to_dict())
    except ValueError as error:
        raise ValueError(f"The configuration of {folder}: {error}") from error
    base = config.base_config
    for name in CODE_SOURCES.get(base.type, ()):
        source = str(vars(base)[name])
        if source not in LEROBOTS_OWN and source not in trusted:
            raise ValueError(
                f"The configuration of {folder}: {base.type} would run code of {quoted(source)} (base.{name}), which is not "
                "LeRobot's own choice; name it as trusted if you have read that code."
            )


def check_adapter_config(path: Path) -> None:
    content = read_json(path)
    source = content.get("base_model_name_or_path")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{path}: base_model_name_or_path must be a Hub id or a folder, not {quoted(source)}.")
    try:
        _check_integers(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
