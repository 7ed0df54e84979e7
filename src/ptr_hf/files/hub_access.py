"""Sentences for a Hub that cannot be reached, or does not have what was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextmanager
def asking_the_hub(kind: str, source: str | Path) -> Iterator[None]:
    """Turn the Hub's refusals inside into one sentence each; an answer that is no refusal (500) passes.

    Args:
        kind: what is looked for, such as "policy".
        source: its name.

    Raises:
        ValueError: it could not be the name of a repo, there is none, it may not be read, or the Hub does not answer.
    """
    try:
        yield
    except HFValidationError as error:
        name = "a repo" if kind == "policy" else f"a {kind}"
        raise ValueError(f"{source} is neither a folder nor the name of {name} on the Hub (user/name).") from error
    except tuple(_REASONS) as error:
        reason = next(reason for refusal, reason in _REASONS.items() if isinstance(error, refusal))
        raise ValueError(f"The {kind} {source} is no folder here and cannot be had from the Hub: {reason}.") from error


_LOGIN = "log in with `hf auth login`"
_SILENT = "the Hub does not answer and it is not in the cache; check the connection, or give a folder"
_REASONS: dict[type[Exception], str] = {
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or give a folder",
    GatedRepoError: f"access to it has to be granted on its page; then {_LOGIN}",
    RepositoryNotFoundError: f"there is no such repo, or it is private; check the name, or {_LOGIN}",
    RevisionNotFoundError: "the repo has no such revision",
    LocalEntryNotFoundError: _SILENT,
    httpx.TransportError: _SILENT,
}
"""By the Hub's refusal; a gated repo is refused as one that is not found, too, and so stands before it."""
