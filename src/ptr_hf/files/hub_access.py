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
    except OfflineModeIsEnabled as error:
        reason = "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or give a folder"
        raise ValueError(_sentence(kind, source, reason)) from error
    except GatedRepoError as error:
        reason = "access to it has to be granted on its page; then log in with `hf auth login`"
        raise ValueError(_sentence(kind, source, reason)) from error
    except RepositoryNotFoundError as error:
        reason = "there is no such repo, or it is private; check the name, or log in with `hf auth login`"
        raise ValueError(_sentence(kind, source, reason)) from error
    except RevisionNotFoundError as error:
        raise ValueError(_sentence(kind, source, "the repo has no such revision")) from error
    except (LocalEntryNotFoundError, httpx.TransportError) as error:
        reason = "the Hub does not answer and it is not in the cache; check the connection, or give a folder"
        raise ValueError(_sentence(kind, source, reason)) from error


def _sentence(kind: str, source: str | Path, reason: str) -> str:
    return f"The {kind} {source} is no folder here and cannot be had from the Hub: {reason}."
