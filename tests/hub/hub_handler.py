"""The loopback hub's HTTP side: addresses to actions, answers with the headers that the client reads, and faults."""

import base64
import hashlib
import json
import re
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from hub_cards import check_card
from hub_repos import Refusal, Repo

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub, User

Kind = int | Literal["timeout", "cut", "reset", "truncated", "lost"]
NAME = r"(?P<id>[^/]+/[^/]+?)"
API = re.compile(
    rf"^/api/(?P<type>model|dataset)s/{NAME}(?:/(?P<action>[a-z-]+)(?:/(?P<name>[^/]+)(?:/(?P<path>.+))?)?)?$"
)
RESOLVE = re.compile(rf"^/(?P<type>datasets/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
LARGE = re.compile(rf"^/(?P<type>datasets/)?{NAME}\.git/info/lfs/(?P<action>objects/batch|verify)$")
WRITES = frozenset({"preupload", "commit", "branch", "tag", "settings"})
MESSAGES = {
    409: "Cannot create repo: another conflicting operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
}


@dataclass
class Exchange:
    """One request as it came and the status it got; 0 where no answer was sent."""

    method: str
    host: str
    path: str
    headers: dict[str, str]
    status: int = 0


@dataclass
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


class HubHandler(BaseHTTPRequestHandler):
    """Serves the requests of one connection for `hub`, which the hub's own subclass sets."""

    hub: "LoopbackHub"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its head and its body

    def do_GET(self) -> None:
        """Serve a request of any method: find its fault, do what it asks, answer."""
        self.address = urlsplit(self.path)
        host = (self.headers["Host"] or "").partition(":")[0]
        self.exchange = Exchange(self.command, host, unquote(self.address.path), dict(self.headers.items()))
        self.hub.requests.append(self.exchange)
        fault = self.hub.fault_for(self.command, self.exchange.path)
        if fault in ("cut", "reset") and self.command in ("POST", "PUT", "DELETE"):
            self._body(share=0.5)
            self._break(hard=fault == "reset")
            return
        body = self._body()
        self._note_leaks(body)
        if fault == "timeout":
            self._wait()
            return
        try:
            answer = self._refused(fault) if isinstance(fault, int) else self._act(body)
        except Refusal as refusal:
            answer = self._answer_to(refusal)
        if fault == "lost":
            self._break(hard=False)
        else:
            self._send(answer, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the hub keeps its own record."""

    # what is asked

    def _act(self, body: bytes) -> Answer:
        path = self.address.path
        if path.startswith("/storage/"):
            return self._storage(path.removeprefix("/storage/"), body)
        user = self.hub.user_of(self.headers["Authorization"])
        with self.hub.lock:
            if match := API.match(path):
                return self._api(user, match["type"], match["id"], unquote(match["action"] or ""), match, body)
            if path.startswith("/api/"):
                return self._service(user, path.removeprefix("/api/"), body)
            if match := LARGE.match(path):
                repo = self.hub.find(self._type_of(match), match["id"], user, writing=True)
                return self._large(repo, match["action"], json.loads(body))
            if match := RESOLVE.match(path):
                repo = self.hub.find(self._type_of(match), match["id"], user, writing=False)
                return self._resolve(repo, unquote(match["revision"]), unquote(match["path"]))
        raise Refusal(404, f"The hub has no {path}")

    def _service(self, user: "User | None", name: str, body: bytes) -> Answer:
        if name == "whoami-v2":
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            orgs = [{"name": org} for org in sorted(user.namespaces - {user.name})]
            role = {"displayName": "tests", "role": "write" if user.writes else "read"}
            return self._json({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": role}})
        if name == "validate-yaml":
            data = json.loads(body)
            errors, warnings = check_card(data["content"], data.get("repoType", "model"))
            found = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
            return self._json(found, 400 if errors else 200)
        if name == "repos/create":
            repo = self.hub.create(user, json.loads(body))
            return self._json({"url": self.hub.address_of(repo), "id": repo.repo_id, "private": repo.private})
        if name == "repos/delete":
            data = json.loads(body)
            owner = data.get("organization") or (user.name if user is not None else "")
            repo = self.hub.find(data.get("type", "model"), f"{owner}/{data['name']}", user, writing=True)
            del self.hub.repos[repo.repo_type, repo.repo_id]
            return self._json({})
        raise Refusal(404, f"The hub has no /api/{name}")

    def _api(
        self, user: "User | None", repo_type: str, repo_id: str, action: str, match: re.Match[str], body: bytes
    ) -> Answer:
        repo = self.hub.find(repo_type, repo_id, user, writing=action in WRITES)
        name, path, query = unquote(match["name"] or "main"), unquote(match["path"] or ""), parse_qs(self.address.query)
        if action in ("", "revision"):
            return self._json(repo.info(name, with_sizes="blobs" in query))
        if action == "tree":
            return self._json(repo.tree(name, path, query.get("recursive") == ["true"]))
        if action == "paths-info":
            return self._json(repo.paths_info(name, parse_qs(body.decode()).get("paths", [])))
        if action == "refs":
            return self._json(repo.refs())
        if action == "commits":
            return self._json(repo.history(name))
        if action == "preupload":
            return self._json({"files": repo.preupload(name, json.loads(body)["files"])})
        if action == "commit":
            if "create_pr" in query:
                raise Refusal(403, "Pull requests are disabled for this repository")
            sha = repo.commit(name, body).sha
            url = f"{self.hub.address_of(repo)}/commit/{sha}"
            return self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        if action in ("branch", "tag") and self.command == "DELETE":
            repo.delete_ref(action, name)
        elif action == "branch":
            repo.create_branch(name, json.loads(body or b"{}").get("startingPoint"))
        elif action == "tag":
            repo.create_tag(json.loads(body)["tag"], name)
        elif action == "settings":
            repo.private = json.loads(body).get("visibility", "public") == "private"
        else:
            raise Refusal(404, f"The hub has no {self.address.path}")
        return self._json({})

    def _large(self, repo: Repo, action: str, data: dict[str, Any]) -> Answer:
        """Git LFS: where to send large files, and whether they arrived."""
        if action == "verify":
            if len(repo.large.get(data["oid"], b"")) != data["size"]:
                raise Refusal(404, f"Large file {data['oid']} did not arrive")
            return self._json({})
        objects = []
        for item in data["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.large:
                verify = f"{self.hub.address_of(repo)}.git/info/lfs/verify"
                upload = self.hub.sign(repo, item["oid"])
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        return self._json({"transfer": "basic", "objects": objects})

    def _storage(self, sha256: str, body: bytes) -> Answer:
        if self.headers["Authorization"] is not None:
            raise Refusal(400, "Only one auth mechanism allowed: the address is signed")
        signature = parse_qs(self.address.query).get("signature", [""])[0]
        repo, expected = self.hub.signed.get(signature, (None, ""))
        if repo is None or expected != sha256:
            raise Refusal(403, "The signature does not match the address")
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != sha256:
                raise Refusal(400, "The content does not have the announced hash")
            repo.large[sha256] = body
            return Answer(body=b"")
        return self._ranged(repo.large[sha256], {"ETag": f'"{sha256}"'})

    def _resolve(self, repo: Repo, revision: str, path: str) -> Answer:
        commit, file = repo.file(revision, path)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
        if not file.large:
            return self._ranged(file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return Answer(302, b"", {**headers, "Location": self.hub.sign(repo, file.sha256)})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Answer:
        asked, size = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or ""), len(content)
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if asked is None:
            return Answer(200, content, headers)
        first, last = asked.groups()
        begin = int(first) if first else size - int(last)
        end = min(int(last) + 1, size) if first and last else size
        if begin >= end:
            return Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
        return Answer(206, content[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    # what is answered

    @staticmethod
    def _type_of(match: re.Match[str]) -> str:
        return "dataset" if match["type"] else "model"

    @staticmethod
    def _json(data: Any, status: int = 200) -> Answer:
        return Answer(status, json.dumps(data, default=str).encode(), {"Content-Type": "application/json"})

    def _answer_to(self, refusal: Refusal) -> Answer:
        listed = {"errors": [{"message": error} for error in refusal.errors]} if refusal.errors else {}
        answer = self._json({"error": refusal.message, **listed, **refusal.more}, refusal.status)
        answer.headers["X-Error-Message"] = refusal.message
        if refusal.code is not None:
            answer.headers["X-Error-Code"] = refusal.code
        if refusal.commit:
            answer.headers["X-Repo-Commit"] = refusal.commit
        return answer

    def _refused(self, status: int) -> Answer:
        if status in (502, 503, 504):  # from a gateway in front of the hub, which does not speak JSON
            return Answer(status, b"<html>The hub was told to be down</html>", {"Content-Type": "text/html"})
        return self._answer_to(Refusal(status, MESSAGES.get(status, f"The hub was told to answer {status}")))

    def _send(self, answer: Answer, fault: Kind | None) -> None:
        self.exchange.status = answer.status
        if fault in ("cut", "reset") and (self.command == "HEAD" or not answer.body):
            self._break(hard=fault == "reset")
            return
        truncated = fault == "truncated" and self.command != "HEAD"
        body = answer.body[: len(answer.body) // 2] if truncated else answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # whoever asked may be gone by now
        with suppress(ConnectionError):
            if self.command == "HEAD":
                return
            self.wfile.write(body[: len(body) // 2] if fault in ("cut", "reset") else body)
            if fault in ("cut", "reset"):
                self._break(hard=fault == "reset")

    # the connection

    def _body(self, share: float = 1.0) -> bytes:
        """Read the body of the request, or a share of it."""
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(int(self.headers["Content-Length"] or 0) * share))
        parts: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(int(size * share)))
            if share < 1:
                return parts[0]
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _break(self, hard: bool) -> None:
        """End the connection: close it in order, or reset it."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            if hard:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # the handler's own files keep the socket open beyond close(), which would end it in order
                socket.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> None:
        """Hold the connection without an answer until the client gives up or the hub ends."""
        self.close_connection = True
        with suppress(OSError):
            while not self.hub.closing.is_set():
                ready, _, _ = select.select([self.connection], [], [], 0.05)
                if ready and not self.connection.recv(1, socket.MSG_PEEK):
                    return

    def _note_leaks(self, body: bytes) -> None:
        """Note a token anywhere but in the header made for it, and any token that the storage is sent."""
        places = {"address": self.path.encode(), "body": body}
        places |= {name: value.encode() for name, value in self.headers.items() if name.lower() != "authorization"}
        if "/commit/" in self.path:
            for line in body.splitlines():
                with suppress(KeyError, ValueError):
                    value = json.loads(line)["value"]
                    places[value["path"]] = base64.b64decode(value["content"])
        if self.address.path.startswith("/storage/"):
            places["authorization"] = (self.headers["Authorization"] or "").encode()
        for place, text in places.items():
            if any(token.encode() in text for token in self.hub.users):
                self.hub.leaks.append(f"{self.command} {self.address.path}: {place}")
