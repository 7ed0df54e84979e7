"""What a PEFT adapter's configuration may ask for: methods that change named layers, by patterns that are quickly matched.

PEFT matches the patterns of `adapter_config.json` with every module of the policy. A regular expression of a few bytes can
keep it busy for ever, so only those pass whose matching is bounded; the ones that LeRobot and PEFT write are among them.
"""

from collections.abc import Iterable

# Python's own parser of regular expressions; it has no public name
from re import _parser as regex  # type: ignore[attr-defined]
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ptr_hf.artifacts.peft import ADAPTER_CONFIG_NAME
from ptr_hf.files.numbers import check_numbers
from ptr_hf.files.regular import quoted

MAX_NAMES = 4096
MAX_KEYS = 256
"""Fewer than the compiled expressions that Python keeps."""
MAX_PATTERN = 2048
MAX_COST = 300_000
"""Steps to match one module's name at worst: three wildcards in a row."""
NAME_LENGTH = 64

_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
_NAMES = ("modules_to_save", "layers_pattern", "target_parameters")
_KEYED = ("rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern", "block_size_pattern")
_NOTES = ("auto_mapping", "trainable_token_indices")
"""Objects that are not matched: a note of PEFT's about the base model, and the rows of an embedding."""
_NEVER = ("megatron_config", "layer_replication", "shadow_model", "adapters", "tokenizer_kwargs")
"""Settings that import a module, load another repo, or change the base policy's own layers."""
_SLOW_STARTS = ("corda", "eva", "loftq", "lora_ga", "pissa_niter")
"""New weights that are computed at length, from data or in as many rounds as the name says."""


def check_adapter(content: dict[str, Any], where: str = ADAPTER_CONFIG_NAME) -> None:
    """Check an adapter's configuration before PEFT reads it.

    Args:
        content: of `adapter_config.json`.
        where: the file, for the error message.

    Raises:
        ValueError: a setting that could run for long, load what is elsewhere or import code; names the setting.
    """
    check_numbers(content, where)
    try:
        source = content.get("base_model_name_or_path")
        if source is not None and not isinstance(source, str):
            raise ValueError(f"base_model_name_or_path must be a Hub id or a folder, not {quoted(source)}.")
        _check_method(content.get("peft_type"))
        for name, value in content.items():
            if value not in (None, [], {}, False):
                _check_setting(name, value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_setting(name: str, value: Any) -> None:
    if name in _NEVER or (isinstance(value, dict) and name not in (*_KEYED, *_NOTES, *_PATTERNS, *_NAMES)):
        raise ValueError(f"{name}={quoted(value)} is not used by adapters of policies: remove it.")
    if name in _PATTERNS and isinstance(value, str):
        _check_cost(name, [value])
    elif name in (*_PATTERNS, *_NAMES):
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or len(names) > MAX_NAMES:
            raise ValueError(f"{name} must be a list of at most {MAX_NAMES} names.")
        for own in names:
            if not _is_plain(own):
                raise ValueError(f"{name} names {quoted(own)}: letters, digits, '_', '-' and '.' make a module's name.")
    elif name in _KEYED:
        if (
            not isinstance(value, dict)
            or len(value) > MAX_KEYS
            or not all(isinstance(v, int | float) for v in value.values())
        ):
            raise ValueError(f"{name} must give numbers to at most {MAX_KEYS} names of modules.")
        # PEFT puts a wildcard before each
        _check_cost(name, value, NAME_LENGTH)
    elif name.startswith("init_") and str(value).startswith(_SLOW_STARTS):
        raise ValueError(
            f"{name}={quoted(value)} computes new weights at length before the stored ones replace them: set it to true."
        )


def _check_method(kind: Any) -> None:
    known = {method.value: config for method, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    fields = vars(known[kind])["__dataclass_fields__"] if isinstance(kind, str) and kind in known else {}
    if "target_modules" not in fields or fields.keys() & {"tokenizer_name_or_path", "shadow_model", "adapter_layers"}:
        raise ValueError(f"the method (peft_type) {quoted(kind)} is none that adapts a policy's layers, as LORA does.")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 512 and all(part.isalnum() or part in "_-." for part in name)


def _check_cost(name: str, patterns: Iterable[str], factor: int = 1) -> None:
    total = 0
    for pattern in patterns:
        total += factor * _cost_of(name, pattern)
        if total > MAX_COST:
            raise ValueError(
                f"{name}={quoted(pattern)} could take for ever to match: use names of modules, or at most three wildcards in a "
                "row and none inside another."
            )


def _cost_of(name: str, pattern: str) -> int:
    if _is_plain(pattern):
        return 1
    try:
        if len(pattern) > MAX_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters, more than {MAX_PATTERN}.")
        return _cost(regex.parse(pattern))
    # the parser raises its own error, and others for numbers and nesting that no expression has
    except (ValueError, OverflowError, RecursionError, regex.error) as error:
        raise ValueError(f"{name}={quoted(pattern)} is no pattern for names of modules: {error}") from error


def _cost(parsed: Any) -> int:
    """In how many ways, at worst, a name of 64 letters is taken apart."""
    cost = 1
    for kind, value in parsed:
        cost *= _cost_of_part(str(kind), value)
        if cost > MAX_COST:
            break
    return cost


def _cost_of_part(kind: str, value: Any) -> int:
    if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
        return 1
    if kind == "SUBPATTERN":
        return _cost(value[-1])
    if kind == "BRANCH":
        return sum(_cost(branch) for branch in value[1])
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, repeated = value
        inner = _cost(repeated)
        if high <= 1:
            return 1 + inner
        if inner > 1 or len(repeated) != 1 or str(repeated[0][0]) not in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            raise ValueError("only a single character, or a set of them, may be repeated.")
        if low > NAME_LENGTH * 8:
            raise ValueError(f"it repeats a character {low} times.")
        return NAME_LENGTH
    raise ValueError(f"{kind.lower()} is not allowed in it.")
