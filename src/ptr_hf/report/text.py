"""Text that comes from outside (names of tasks, datasets, folders) before it is shown anywhere."""

import json
import unicodedata
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any


def visible(value: object) -> str:
    """One line of visible text: no control, direction or other invisible characters, single spaces."""
    kept = (" " if unicodedata.category(sign) in ("Cc", "Zl", "Zp") else sign for sign in str(value))
    text = "".join(sign for sign in kept if unicodedata.category(sign) not in ("Cf", "Cs", "Co", "Cn"))
    return " ".join(text.split())


def readable(value: object) -> str:
    """A text as it is, any other setting as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def drawable(name: object, longest: int | None = None) -> str:
    """A name as matplotlib draws it letter by letter: no formula, and no label that a legend would leave out.

    Args:
        name: from outside.
        longest: characters; what is longer ends in an ellipsis. None cuts nothing.
    """
    text = visible(name)
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 1]}…"
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def without_local_paths(value: Any) -> Any:
    """Settings as others may see them: of an absolute local path the last part alone, in nested dicts and lists too.

    Example:
        >>> without_local_paths({"output_dir": "/home/me/runs/cups", "model": "lerobot/smolvla_base"})
        {'output_dir': 'cups', 'model': 'lerobot/smolvla_base'}
    """
    if isinstance(value, dict):
        return {name: without_local_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_local_paths, value)) if type(value) in (list, tuple) else value
    if isinstance(value, str | Path) and _is_absolute(str(value)):
        return _last_part(str(value))
    return value


def _is_absolute(text: str) -> bool:
    return text.startswith("~/") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _last_part(text: str) -> str:
    kind: type[PurePath] = PureWindowsPath if "\\" in text else PurePosixPath
    return kind(text).name or "."
