"""Repos of the loopback hub, in memory: commits, branches, tags and large files."""

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from hub_cards import check_card, read_metadata, tags_of

LARGE_SUFFIXES = frozenset({".arrow", ".bin", ".ckpt", ".gz", ".h5", ".mp4", ".npy", ".npz", ".onnx", ".parquet"})
LARGE_SUFFIXES |= {".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip"}
LARGE_BYTES = 10 * 1024 * 1024
REFS = "refs/heads/"


class Refusal(Exception):
    """An answer other than success: its status, its error code (if any), its message and what else the body says."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        errors: list[str] | None = None,
        commit: str = "",
        more: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.errors, self.commit = status, message, code, errors, commit
        self.more = more or {}


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit. `oid` is git's hash of the blob, which for a large file is its pointer."""

    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What the commit holds in place of a large file."""
        return f"oid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        blob = self.pointer if self.large else self.content
        return hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree lists it."""
        large = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}}
        return {
            "type": "file",
            "path": path,
            "size": len(self.content),
            "oid": self.oid,
            **(large if self.large else {}),
        }


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A repo with its history; what it returns is what the hub's API answers."""

    repo_type: str
    repo_id: str
    author: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lines = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LARGE_SUFFIXES))
        self._add("main", None, "initial commit", "", {".gitattributes": StoredFile(lines.encode(), large=False)})

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or (the beginning of) a hash names."""
        name = revision.removeprefix(REFS)
        sha = self.branches.get(name) or self.tags.get(name.removeprefix("refs/tags/"))
        if sha is None and len(revision) >= 5:
            sha = next((known for known in self.commits if known.startswith(revision)), None)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def file(self, revision: str, path: str) -> tuple[Commit, StoredFile]:
        commit = self.at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit=commit.sha)
        return commit, commit.files[path]

    def preupload(self, revision: str, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """How each file is to be sent, and what the revision already holds under its path."""
        known = self.at(revision).files
        answer = []
        for file in files:
            large = PurePosixPath(file["path"]).suffix in LARGE_SUFFIXES or file["size"] > LARGE_BYTES
            large = large or b"\0" in base64.b64decode(file["sample"])
            old = known.get(file["path"])
            oid = None if old is None else old.etag
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer

    def commit(self, branch: str, lines: bytes) -> Commit:
        """Apply the operations of a commit, one JSON object a line, all or none."""
        if branch.removeprefix(REFS) not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.at(branch)
        files, header = dict(head.files), None
        for line in lines.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
                continue
            path = self._checked_path(value["path"])
            if key == "file":
                files[path] = StoredFile(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refusal(400, f"LFS pointer of {path} points to a file that was not uploaded")
                files[path] = StoredFile(self.large[value["oid"]], large=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
            else:
                raise Refusal(400, f"Unknown operation {key}")
        if header is None:
            raise Refusal(400, "The commit has no header")
        if header.get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if "README.md" in files and files["README.md"] != head.files.get("README.md"):
            errors, _ = check_card(files["README.md"].content.decode(), self.repo_type)
            if errors:
                raise Refusal(400, "Invalid metadata in README.md", errors=errors)
        return self._add(branch.removeprefix(REFS), head.sha, header["summary"], header.get("description", ""), files)

    def create_branch(self, name: str, start: str | None) -> None:
        if name in self.branches:
            raise Refusal(409, f"Reference already exists: {REFS}{name}")
        self.branches[name] = self.at(start or "main").sha

    def create_tag(self, name: str, revision: str) -> None:
        if name in self.tags:
            raise Refusal(409, f"Tag reference exists already: refs/tags/{name}")
        self.tags[name] = self.at(revision).sha

    def delete_ref(self, kind: str, name: str) -> None:
        refs = self.branches if kind == "branch" else self.tags
        if name == "main" or refs.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def refs(self) -> dict[str, Any]:
        kinds = (("branches", REFS, self.branches), ("tags", "refs/tags/", self.tags))
        answer: dict[str, Any] = {"converts": [], "pullRequests": []}
        for key, prefix, refs in kinds:
            answer[key] = [{"name": n, "ref": prefix + n, "targetCommit": sha} for n, sha in refs.items()]
        return answer

    def history(self, revision: str) -> list[dict[str, Any]]:
        """The commits before a revision, newest first."""
        answer: list[dict[str, Any]] = []
        sha: str | None = self.at(revision).sha
        while sha is not None:
            commit = self.commits[sha]
            authors = [{"user": self.author}]
            answer.append(
                {"id": sha, "title": commit.title, "message": commit.message, "date": commit.date, "authors": authors}
            )
            sha = commit.parent
        return answer

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The entries below a folder, those of its subfolders too if recursive."""
        commit, inside = self.at(revision), f"{folder.strip('/')}/" if folder.strip("/") else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(inside):
                continue
            for parent in reversed(PurePosixPath(path[len(inside) :]).parents[:-1]):
                entries.setdefault(f"{inside}{parent}", self._folder(f"{inside}{parent}"))
            entries[path] = file.entry(path)
        if inside and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound", commit=commit.sha)
        return [entry for path, entry in entries.items() if recursive or "/" not in path[len(inside) :]]

    def paths_info(self, revision: str, paths: list[str]) -> list[dict[str, Any]]:
        files = self.at(revision).files
        found = [files[path].entry(path) for path in paths if path in files]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        return found + [self._folder(path) for path in folders]

    def info(self, revision: str, with_sizes: bool) -> dict[str, Any]:
        """What `model_info` and `dataset_info` are made of."""
        commit = self.at(revision)
        card = commit.files["README.md"].content.decode() if "README.md" in commit.files else ""
        data = read_metadata(card) or {}
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if with_sizes:
                sibling |= {"size": len(file.content), "blobId": file.oid}
                if file.large:
                    size = len(file.content)
                    sibling["lfs"] = {"sha256": file.sha256, "size": size, "pointerSize": len(file.pointer)}
            siblings.append(sibling)
        answer: dict[str, Any] = {
            "id": self.repo_id,
            "author": self.author,
            "sha": commit.sha,
            "createdAt": self.history(revision)[-1]["date"],
            "lastModified": commit.date,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags_of(data, card),
            "siblings": siblings,
        }
        named: dict[str, Any] = {
            key: data[key] for key in ("library_name", "pipeline_tag", "model-index") if key in data
        }
        return {**answer, **named, **({"cardData": data} if data else {})}

    def _add(self, branch: str, parent: str | None, title: str, message: str, files: dict[str, StoredFile]) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(secrets.token_hex(20), parent, title, message, date, files)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    @staticmethod
    def _folder(path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    @staticmethod
    def _checked_path(path: str) -> str:
        if path.startswith("/") or {"..", "."} & set(path.split("/")):
            raise Refusal(400, f"Invalid path {path}")
        return path
