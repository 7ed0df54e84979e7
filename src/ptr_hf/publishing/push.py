"""Publishing a finished folder on the Hub: one repo, one commit a push, and nothing lost when a push does not get through."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path

import httpx
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from ptr_hf.files.regular import inside
from ptr_hf.report.files import DAMAGED
from ptr_hf.report.text import without_local_paths

NEVER_PUBLISHED = (
    "checkpoint-*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "trainer_state.json",
    "ptr_checkpoint.json",
    "ptr_window_*",
    f"*{DAMAGED}",
    ".*",
    "*/.*",
    "runs/*",
)
"""What a policy's repo has no use for: trainer state, logs, and anything pickled."""
REFUSALS = (400, 401, 403, 404)
"""Answers that stay the same however often one asks."""
STAGED = ".push_"
"""How the folders that `stage` makes begin."""
PAUSES = (1.0, 4.0)
"""Seconds before a push is tried again. The client itself repeats uploads of large files, but neither the commit nor the creation
of a repo; repeating the whole is safe, and what has arrived is not sent twice."""


class PushError(RuntimeError):
    """A push that did not get through; everything is still in the local folder.

    Attributes:
        final: whether asking again is pointless without a change (a wrong token, a name, a card that does not validate).
    """

    def __init__(self, message: str, final: bool) -> None:
        super().__init__(message)
        self.final = final


def _insistent[**Given, Result](ask: Callable[Given, Result]) -> Callable[Given, Result]:
    """Ask again after a while where the Hub may answer otherwise."""

    @wraps(ask)
    def asked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for pause in PAUSES:
            try:
                return ask(*args, **kwargs)
            except PushError as error:
                if error.final:
                    raise
                time.sleep(pause)
        return ask(*args, **kwargs)

    return asked


@dataclass(frozen=True)
class Destination:
    """Where a folder is published.

    Args:
        repo_id: user/name, or a name in the token's own namespace.
        private: whether a new repo is private; None leaves it to the namespace's default.
        revision: branch to push to, created where it is missing; None is main.
        token: of the Hub; None takes the one that `hf auth login` stored.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def _api(self) -> HfApi:
        return HfApi(token=self.token)

    @_insistent
    def create(self, folder: Path) -> "Destination":
        """Make sure that repo and branch exist; returns the destination under its full name.

        Args:
            folder: what will be pushed, for the error message.

        Raises:
            PushError: the Hub refused or could not be reached.
        """
        with self._reported(folder):
            repo_id = self._api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None:
                self._api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        return replace(self, repo_id=repo_id)

    @_insistent
    def push(
        self,
        folder: Path,
        message: str,
        *,
        tags: Sequence[str] = (),
        path_in_repo: str | None = None,
        ignore: Sequence[str] = NEVER_PUBLISHED,
    ) -> CommitInfo:
        """Upload a folder in one commit; huggingface_hub retries what may pass, and uploads only what is new.

        Args:
            folder: to upload.
            message: of the commit.
            tags: set on the commit, replacing tags of the same name.
            path_in_repo: subfolder of the repo.
            ignore: patterns of files to leave out.

        Raises:
            PushError: the Hub refused or could not be reached; says where the files are and how to push them again.
        """
        with self._reported(folder):
            check_links(folder, ignore)
            commit = self._api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                path_in_repo=path_in_repo,
                commit_message=message,
                revision=self.revision,
                ignore_patterns=list(ignore),
            )
            for tag in tags:
                if self._has_tag(tag):
                    self._api.delete_tag(self.repo_id, tag=tag)
                self._api.create_tag(self.repo_id, tag=tag, revision=commit.oid)
        return commit

    def push_later(self, folder: Path, message: str, path_in_repo: str | None = None) -> "Future[CommitInfo]":
        """`push` in the background, one after the other, of a folder that is deleted afterwards."""

        def push() -> CommitInfo:
            try:
                return self.push(folder, message, path_in_repo=path_in_repo, ignore=())
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return self._api.run_as_future(push)

    def retry_command(self, folder: Path) -> str:
        """The shell command that pushes a folder by hand."""
        revision = f" --revision {self.revision}" if self.revision else ""
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in NEVER_PUBLISHED)
        return f"hf upload {self.repo_id} {folder} .{revision} {excluded}"

    def _has_tag(self, tag: str) -> bool:
        return tag in {found.name for found in self._api.list_repo_refs(self.repo_id).tags}

    @contextmanager
    def _reported(self, folder: Path) -> Iterator[None]:
        try:
            yield
        # the client wraps what goes wrong with a large file in a RuntimeError; an invalid card is a ValueError
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
            cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
            if isinstance(cause, HfHubHTTPError):
                final = cause.response.status_code in REFUSALS
            else:
                final = isinstance(cause, ValueError) and not isinstance(cause, json.JSONDecodeError)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PushError(
                f"The push to {self.repo_id} did not get through ({type(error).__name__}: {reason}). Nothing is lost: "
                f"everything is in {folder}. To push it again: {self.retry_command(folder)}",
                final,
            ) from error


def stage(sources: Iterable[Path], parent: Path) -> Path:
    """A folder with the given files, linked where the file system can, so that a checkpoint may be rotated meanwhile.

    Args:
        sources: files; later ones replace earlier ones of the same name.
        parent: where the folder is made, on the files' own file system.

    Returns:
        The new folder; its name begins with a dot.

    Raises:
        ValueError: one of them is a symlink that leads out of its folder.
    """
    folder = Path(tempfile.mkdtemp(prefix=STAGED, dir=parent))
    try:
        for source in sources:
            inside(source.parent, source.name)
            target = folder / source.name
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def check_links(folder: Path, ignore: Sequence[str]) -> None:
    """Refuse to upload a folder in which a symlink leads to files elsewhere, whose contents would be published.

    Args:
        folder: to be uploaded, with the folders in it.
        ignore: patterns of files that are left out.

    Raises:
        ValueError: names the symlink.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("**/*")) if path.is_file()]
    for name in filter_repo_objects(names, ignore_patterns=list(ignore)):
        inside((folder / name).parent, Path(name).name)


def remove_staged(parent: Path) -> None:
    """Delete the folders of `stage` that a killed run has left, which hold files of checkpoints that are gone."""
    for folder in parent.glob(f"{STAGED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def local_needs(folder: Path) -> list[str]:
    """A sentence about every local folder that a policy's files name and that it cannot be loaded without.

    A vision-language model, a tokenizer or an adapter's base policy that is no repo on the Hub is looked for where it lay when
    the policy was saved, so such a path stays in the files.
    """
    found: dict[str, list[str]] = {}
    for name in ("config.json", "policy_preprocessor.json", "adapter_config.json"):
        if (folder / name).is_file():
            for value in _strings(json.loads((folder / name).read_text(encoding="utf-8"))):
                if without_local_paths(value) != value:
                    found.setdefault(value, []).append(name)
    return [
        f"The published {' and '.join(dict.fromkeys(names))} name the local folder {path}, without which the policy cannot be "
        "loaded, and which nobody else has: publish that folder as a repo of its own and train from its Hub id."
        for path, names in found.items()
    ]


def _strings(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for item in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _strings(item)


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that belong into a policy's repo."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not any(path.match(pattern) for pattern in NEVER_PUBLISHED)
    )
