"""What a policy or dataset is called that lies on the Hub or in a folder here."""

import re
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


class Source(NamedTuple):
    """A Hub id, or the name of a local folder."""

    name: str
    on_hub: bool


def is_repo_id(text: str) -> bool:
    """Whether the text could name a repo as `user/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text and not re.search(r"\s", text)


def named_source(source: str | Path | None) -> Source:
    """A Hub id (`user/name`), unless a folder of that name is there; of any other path the last part alone.

    So a relative folder `a/b` that is gone looks like a Hub id: give the absolute path of what is local.
    """
    text = "" if source is None else str(source)
    if is_repo_id(text) and not Path(text).is_dir():
        return Source(text, True)
    return Source(PureWindowsPath(text).name or "unnamed", False)
