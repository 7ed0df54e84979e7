"""A hub on loopback for the real huggingface_hub client: the part of the public API that pushing and pulling use.

    with LoopbackHub() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("lab/policy")
        hub.fail("/commit/", "POST", times=2, kind=503)

Large files go to a second host name (localhost) under signed addresses, as the public hub hands them to its storage:
the client must not send its token there. Xet is not served; the client must run without it (`environment`, `connect`).
"""

import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from hub_handler import Exchange, HubHandler, Kind
from hub_repos import Refusal, Repo

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOOPBACK = "127.0.0.1"
STORAGE = "localhost"


@dataclass(frozen=True)
class User:
    """Whoever holds a token: may see the private repos of the namespaces, and write to them if `writes`."""

    name: str
    namespaces: frozenset[str]
    writes: bool


@dataclass
class Fault:
    """What goes wrong with requests whose path matches; `left` counts down, None means always."""

    pattern: re.Pattern[str]
    method: str
    left: int | None
    kind: Kind
    hits: int = 0


@dataclass(repr=False)  # a failing test prints its arguments, which should hold no token
class LoopbackHub:
    """A hub that runs while its context is open. All of it is forgotten afterwards.

    Tokens: `token` writes to the namespaces "lab" and "ptr-tester", `read_token` reads them, `stranger_token` is another
    user's. Any other token is refused with 401.
    """

    token: str = field(default_factory=lambda: f"hf_{secrets.token_hex(17)}")
    read_token: str = field(default_factory=lambda: f"hf_{secrets.token_hex(17)}")
    stranger_token: str = field(default_factory=lambda: f"hf_{secrets.token_hex(17)}")
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    requests: list[Exchange] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    signed: dict[str, tuple[Repo, str]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        ours = frozenset({"lab", "ptr-tester"})
        self.users = {
            self.token: User("ptr-tester", ours, writes=True),
            self.read_token: User("ptr-tester", ours, writes=False),
            self.stranger_token: User("stranger", frozenset({"stranger"}), writes=True),
        }

    def __enter__(self) -> Self:
        # a class of its own ties the handler to this hub, since the server makes one handler a connection
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer((LOOPBACK, 0), handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        # the server looks for the end of its loop this often (seconds)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server.server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://{STORAGE}:{self.server.server_port}/storage"

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """A repo as the hub holds it, to be looked at without a request."""
        return self.repos[repo_type, repo_id]

    def fail(self, path_pattern: str, method: str = "*", times: int | None = 1, kind: Kind = 500) -> Fault:
        """Let requests go wrong, the next `times` of them (None: all) whose path matches.

        Kinds: a status is answered instead of serving the request; "timeout" never answers; "cut" closes the connection
        half-way through the body (of the request if it has one, else of the answer) and "reset" breaks it there;
        "truncated" answers with half of the body as if it were all; "lost" does what was asked but loses the answer.
        The client repeats `create_repo` at 409 without a pause or an end: name a number of times there.
        """
        fault = Fault(re.compile(path_pattern), method, times, kind)
        with self.lock:
            self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """No request goes wrong from now on."""
        with self.lock:
            self.faults.clear()

    def fault_for(self, method: str, path: str) -> Kind | None:
        """The kind of fault that this request meets, counted."""
        with self.lock:
            for fault in self.faults:
                if fault.left != 0 and fault.method in ("*", method) and fault.pattern.search(path):
                    fault.hits += 1
                    fault.left = None if fault.left is None else fault.left - 1
                    return fault.kind
        return None

    def seen(self, path_pattern: str, method: str = "*") -> list[Exchange]:
        """The requests so far whose path matches, in order."""
        return [r for r in self.requests if method in ("*", r.method) and re.search(path_pattern, r.path)]

    def sign(self, repo: Repo, sha256: str) -> str:
        """An address in the storage for one large file, which needs no token."""
        signature = secrets.token_hex(8)
        self.signed[signature] = (repo, sha256)
        return f"{self.storage_url}/{sha256}?signature={signature}"

    def user_of(self, authorization: str | None) -> User | None:
        """Who sends a request; None without a token."""
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def find(self, repo_type: str, repo_id: str, user: User | None, writing: bool) -> Repo:
        """A repo that a user may read, or write to."""
        repo = self.repos.get((repo_type, repo_id))
        ours = user is not None and repo_id.split("/")[0] in user.namespaces
        if repo is None or (repo.private and not ours):
            # someone who is not logged in is not told whether a repo exists
            raise Refusal(404 if user is not None else 401, "Repository not found", "RepoNotFound")
        if writing:
            if user is None:
                # over https the client takes any 401 of the API for a repo it cannot see; the code has the same effect
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            if not (ours and user.writes):
                raise Refusal(403, "Forbidden: your token does not have the right to write to this repository")
        return repo

    def create(self, user: User | None, body: dict[str, Any]) -> Repo:
        """A new repo, of the user's own namespace where none is named."""
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_type, namespace = body.get("type", "model"), body.get("organization") or user.name
        if namespace not in user.namespaces or not user.writes:
            raise Refusal(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
        key = (repo_type, f"{namespace}/{body['name']}")
        with self.lock:
            if key in self.repos:
                url = self.address_of(self.repos[key])
                raise Refusal(409, f"You already created this {repo_type} repo", more={"url": url})
            self.repos[key] = Repo(*key, author=namespace, private=body.get("visibility") == "private")
        return self.repos[key]

    def address_of(self, repo: Repo) -> str:
        return f"{self.url}/{'datasets/' if repo.repo_type == 'dataset' else ''}{repo.repo_id}"


def environment(hub: LoopbackHub, home: Path, token: str | None = None) -> dict[str, str]:
    """Environment of a process whose client is to use this hub and keep everything else under `home`.

    Args:
        token: by default the one that writes; "" for none.
    """
    kept = {key: value for key, value in os.environ.items() if key.upper() not in PROXIES and not key.startswith("HF_")}
    kept.pop("TRANSFORMERS_OFFLINE", None)
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": f"{LOOPBACK},{STORAGE}",
    }
    token = hub.token if token is None else token
    return {**kept, **settings, **({"HF_TOKEN": token} if token else {})}


def connect(hub: LoopbackHub, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
    """Let the client that this process has imported use this hub, as if `environment` had held at its import.

    The client reads its constants at each call; only its own `HfApi`, behind functions such as `upload_folder`,
    holds the address since its import. Undone with the patch.
    """
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {LOOPBACK},
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    patch.setattr(hf_api.api, "endpoint", hub.url)
    if any(name.upper() in PROXIES for name in os.environ):
        huggingface_hub.close_session()  # a client made before holds the proxy
    wanted = environment(hub, home, token)
    for name in _differing(wanted):
        if name in wanted:
            patch.setenv(name, wanted[name])
        else:
            patch.delenv(name)


def _differing(wanted: dict[str, str]) -> Iterator[str]:
    """The names of variables that are not as wanted in this process."""
    return (name for name in {**os.environ, **wanted} if os.environ.get(name) != wanted.get(name))
