"""What a checkpoint's processor files may name before LeRobot imports and calls it.

LeRobot resolves a step by its registered name or else imports the module of its `class` and calls what it finds there with
the step's `config` as arguments: a file of a few bytes could run any program. And a registered step can be told to run the
code of another repo (`trust_remote_code`).
"""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lerobot.processor import ProcessorStep, ProcessorStepRegistry

import ptr_hf.data.mixture.processor  # noqa: F401  registers the steps of policies of several robots
from ptr_hf.files.foreign_code import check_step_repos
from ptr_hf.files.numbers import check_numbers
from ptr_hf.files.reading import read_header, read_json
from ptr_hf.files.regular import inside, quoted, regular_file

PROCESSOR_FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
MAX_STATE_BYTES = 2**26
"""Of a step's tensors, which are statistics: 64 MiB."""
STEP_KEYS = ("registry_name", "class", "config", "state_file")


def check_processors(folder: str | Path, trusted: Collection[str] = ()) -> None:
    """Check the processor files of a folder, where it has them, and the tensors they name.

    Args:
        folder: that LeRobot's `make_pre_post_processors` is about to read.
        trusted: Hub ids or folders, named by a step, whose own code may run.

    Raises:
        FileNotFoundError: a step's tensors are missing.
        ValueError: a step is not registered, would run code of a repo that LeRobot does not choose itself, asks for more than
            a policy needs, or names a file outside the folder; or a file is damaged or no regular file.
    """
    folder = Path(folder)
    found = {name: regular_file(folder, name) for name in PROCESSOR_FILES}
    if None in found.values():
        # LeRobot then looks into every JSON file of the folder for processors of an older kind
        for other in folder.glob("*.json"):
            regular_file(folder, other.name)
    for path in found.values():
        if path is not None:
            steps = read_json(path).get("steps")
            if not isinstance(steps, list):
                raise ValueError(f"{path} has no list of steps.")
            for number, step in enumerate(steps):
                _check_step(folder, path, f"{path}: step {number}", step, trusted)


def _check_step(folder: Path, path: Path, where: str, step: Any, trusted: Collection[str]) -> None:
    if not isinstance(step, dict) or not step.keys() <= set(STEP_KEYS):
        raise ValueError(f"{where} must be an object with no other keys than {', '.join(STEP_KEYS)}.")
    settings = step.get("config", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{where} has a config that is no object.")
    name = _registered(where, step)
    check_numbers(settings, f"{where} ({name})")
    check_step_repos(name, settings, f"{where} ({name})", trusted)
    if "state_file" in step:
        state = inside(folder, step["state_file"], named_in=path)
        regular_file(folder, state.name, limit=MAX_STATE_BYTES)
        if state.suffix != ".safetensors":
            raise ValueError(f"{where} reads {quoted(state.name)}; only .safetensors files are opened.")
        read_header(state)


def _registered(where: str, step: dict[str, Any]) -> str:
    """The name of a step whose class has been imported already, so that nothing new is."""
    if "registry_name" in step:
        name = step["registry_name"]
        if not isinstance(name, str) or name not in ProcessorStepRegistry.list():
            raise ValueError(
                f"{where} is {quoted(name)}, which no step is registered as; import the package that registers it first."
            )
        return name
    path = str(step.get("class", ""))
    module, _, name = path.rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if not (isinstance(found, type) and issubclass(found, ProcessorStep)):
        raise ValueError(
            f"{where} is the class {quoted(path)}, which LeRobot would import and call: only registered steps are used. If it "
            "is one of yours, import its package first."
        )
    return str(vars(found).get("_registry_name", name))
