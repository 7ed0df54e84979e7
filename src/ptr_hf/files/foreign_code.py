"""Code that a checkpoint's files could name: other repos' Python code never runs, and nobody is asked whether it may.

Some fields of LeRobot's policies and processor steps name a repo or folder that transformers loads a tokenizer, a processor
or a backbone from. Such a repo can bring code of its own (`auto_map`): transformers asks on the terminal whether to run it,
and where LeRobot passes `trust_remote_code=True` it runs at once.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from lerobot.configs import PreTrainedConfig
from transformers import CONFIG_MAPPING, dynamic_module_utils
from transformers.utils import cached_file

from ptr_hf.files.regular import quoted

LEROBOTS_OWN = (
    "lerobot/fast-action-tokenizer",
    "google/paligemma-3b-pt-224",
    "nvidia/Cosmos-Reason2-2B",
    "nvidia/GR00T-N1.7-3B",
)
"""Repos whose code LeRobot runs by its own defaults."""
POLICY_CODE = {"pi0_fast": ("action_tokenizer_name", "text_tokenizer_name"), "groot": ("base_model_path",)}
"""Fields of base configurations that name repos whose own code LeRobot runs (trust_remote_code)."""
STEP_CODE = {
    "action_tokenizer_processor": ("action_tokenizer_name", "paligemma_tokenizer_name"),
    "groot_n1_7_vlm_encode_v1": ("model_name",),
}
"""Settings of registered steps that name repos whose own code LeRobot runs (trust_remote_code)."""
POLICY_REPOS = {
    "evo1": ("vlm_model_name",),
    "groot": ("tokenizer_assets_repo",),
    "multi_task_dit": ("vision_encoder_name", "text_encoder_name"),
    "smolvla": ("vlm_model_name",),
    "smolvla_state": ("vlm_model_name",),
    "vla_jepa": ("qwen_model_name", "jepa_encoder_name"),
    "xvla": ("tokenizer_name",),
}
"""Fields of base configurations that name repos where transformers would ask."""
STEP_REPOS = {
    "tokenizer_processor": ("tokenizer_name",),
    "eo1_qwen_processor": ("processor_name",),
    "molmoact2_pack_inputs": ("checkpoint_path", "discrete_action_tokenizer"),
}
"""Settings of registered steps that name repos where transformers would ask."""
STEP_LOADS = {"reward_classifier_processor": ("pretrained_path",), "topreward_encoder": ("vlm_name",)}
"""Settings of registered steps that load a whole model, which names further repos: a policy needs none of them."""

_DESCRIPTIONS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_CLASSES = (
    "tokenizer_class",
    "processor_class",
    "image_processor_type",
    "video_processor_type",
    "feature_extractor_type",
)
_MAX_DESCRIPTION_BYTES = 2**24

logger = logging.getLogger(__name__)


@cache
def _defaults() -> frozenset[str]:
    """What LeRobot's own configurations name."""
    choices = PreTrainedConfig.get_known_choices()
    return frozenset(
        str(vars(choices[kind])[name])
        for kind, names in POLICY_REPOS.items()
        if kind in choices
        for name in names
        if vars(choices[kind]).get(name) is not None
    )


def check_policy_repos(kind: str, settings: Mapping[str, Any], where: str, trusted: Collection[str] = ()) -> None:
    """Check the repos that a base policy's configuration names.

    Args:
        kind: LeRobot's type of the policy.
        settings: the configuration's fields.
        where: what holds them, for the error message.
        trusted: Hub ids or folders whose own code may run where LeRobot runs it.

    Raises:
        ValueError: one of them would run code.
    """
    for name in POLICY_CODE.get(kind, ()):
        _check_trusted(settings.get(name), f"{where}: {kind}", f"base.{name}", trusted)
    for name in POLICY_REPOS.get(kind, ()):
        check_repo(settings.get(name), f"{where}: base.{name}")


def check_step_repos(name: str, settings: Mapping[str, Any], where: str, trusted: Collection[str] = ()) -> None:
    """Check the repos that the settings of a registered processor step name.

    Raises:
        ValueError: one of them would run code.
    """
    # LeRobot trusts remote code unless told otherwise
    remote = settings.get("trust_remote_code", True) is not False
    for key in STEP_CODE.get(name, ()):
        if remote:
            _check_trusted(settings.get(key), where, key, trusted)
        else:
            check_repo(settings.get(key), f"{where}, {key}")
    for key in STEP_REPOS.get(name, ()):
        check_repo(settings.get(key), f"{where}, {key}")
    for key in STEP_LOADS.get(name, ()):
        if settings.get(key) is not None:
            raise ValueError(f"{where} would load the model {quoted(settings[key])} ({key}), which no policy needs.")


def _check_trusted(source: Any, where: str, field: str, trusted: Collection[str]) -> None:
    if source is not None and source not in LEROBOTS_OWN and source not in trusted:
        raise ValueError(
            f"{where} would run code of {quoted(source)} ({field}), which is not LeRobot's own choice; name it as trusted if "
            "you have read that code."
        )


def check_repo(source: Any, where: str) -> None:
    """Refuse a repo or folder for which transformers would ask whether its code may run.

    Args:
        source: Hub id or folder; None is no repo.
        where: the field that names it, for the error message.

    Raises:
        ValueError: it brings code that transformers has no class of its own for, or is neither a Hub id nor a folder.
    """
    if source is None or source in LEROBOTS_OWN or (isinstance(source, str) and source in _defaults()):
        return
    if not isinstance(source, str) or (Path(source).exists() and not Path(source).is_dir()):
        raise ValueError(f"{where} must be a Hub id or a folder, not {quoted(source)}.")
    for name in _DESCRIPTIONS:
        path = _described(source, name)
        content = None if path is None else _content(path, where)
        if isinstance(content, dict) and content.get("auto_map") and not _known_to_transformers(content):
            raise ValueError(
                f"{where} names {quoted(source)}, whose {name} asks for code of its own (auto_map): such code is never run; "
                "name a repo that transformers can load without."
            )


def _described(source: str, name: str) -> Path | None:
    try:
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    # no such repo, or none in reach: what cannot be read cannot run, and LeRobot says so when it wants it
    except (OSError, ValueError) as error:
        logger.debug("%s of %s was not read: %s", name, source, error)
        return None
    return None if path is None else Path(path)


def _content(path: Path, where: str) -> Any:
    if path.stat().st_size > _MAX_DESCRIPTION_BYTES:
        raise ValueError(f"{where}: {path} has more than {_MAX_DESCRIPTION_BYTES} bytes.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path} does not parse as JSON.") from error


def _known_to_transformers(content: dict[str, Any]) -> bool:
    """Whether transformers has a class of its own, which it then takes unasked."""
    named = (content[key] for key in _CLASSES if isinstance(content.get(key), str))
    return content.get("model_type") in list(CONFIG_MAPPING.keys()) or any(
        hasattr(transformers, name) for name in named
    )


@contextmanager
def no_foreign_code() -> Iterator[None]:
    """While LeRobot loads what files name: transformers refuses a repo's own code instead of asking on the terminal.

    Also a decorator. What `check_repo` reads comes first; this holds for what a repo names in turn.

    Raises:
        ValueError: a repo needs code of its own.
    """
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    # transformers asks for so many seconds, and refuses at once at 0
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            "A tokenizer, processor or backbone that this policy names needs code of its own, which is never run: name one that "
            "transformers can load without."
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
