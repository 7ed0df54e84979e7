"""The configurations of a checkpoint, parsed strictly: known fields only, numbers within what a policy can need."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import draccus
from lerobot.configs import PreTrainedConfig

from ptr_hf.configuration_ptr import PTR_CONFIG_NAME, RETIRED, PTRConfig
from ptr_hf.files.foreign_code import check_policy_repos
from ptr_hf.files.numbers import check_numbers
from ptr_hf.files.reading import printable, read_json
from ptr_hf.files.regular import inside, quoted
from ptr_hf.policies import refusal, supported_policies


def read_config(folder: Path) -> PTRConfig:
    """Parse a folder's `ptr_config.json`; the base policy's configuration in it must be complete.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not parse, has an unknown field, or a value is out of range.
    """
    path = inside(folder, PTR_CONFIG_NAME)
    try:
        raw = {name: value for name, value in read_json(path).items() if name not in RETIRED}
        choices = PreTrainedConfig.get_known_choices()
        if raw.get("type", "ptr") != "ptr":
            raise ValueError(f"its type is {quoted(raw['type'])}.")
        base = raw.get("base")
        if not isinstance(base, dict) or "type" not in base:
            raise ValueError("it lacks the base policy's configuration (base).")
        _check_fields(raw, PTRConfig, "")
        base_type = base["type"]
        if isinstance(base_type, str) and base_type in choices:
            # LeRobot's configurations of some other policies fetch what they name while they are parsed
            if base_type not in supported_policies():
                raise ValueError(refusal(base_type))
            _check_fields(base, choices[base_type], "base.")
        check_numbers(raw)
        config = draccus.decode(PTRConfig, {name: value for name, value in raw.items() if name != "type"})
        # the stored configuration is complete; where it came from may be gone, and is not looked up
        config.base_path, source = None, config.base_path
        config.base_config  # noqa: B018  reads it
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


def check_values(config: PTRConfig, folder: Path, trusted: Collection[str] = ()) -> None:
    """Check a configuration that is about to be built, whoever parsed it: LeRobot reads config.json by itself.

    Args:
        config: of the policy.
        folder: of the checkpoint it belongs to, for the error message.
        trusted: Hub ids or folders, named by the base policy's configuration, whose own code may run.

    Raises:
        ValueError: a number is larger than any policy needs, or a repo's code would run.
    """
    where, base = f"The configuration of {folder}", config.base_config
    check_numbers(config.to_dict(), where)
    check_policy_repos(base.type, vars(base), where, trusted)
