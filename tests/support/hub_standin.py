"""A Hugging Face hub on the loopback interface, as far as repositories of files go: enough for its own client.

It keeps everything in memory: creating a repository, committing (small files inline, `.safetensors` through LFS),
branches, listing and fetching. Nothing here knows the package under test.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]

TOKEN = "hf_standin"


@dataclass
class Repository:
    """Commits by their hash, and what branches point to."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, message: str = "by hand", branch: str = "main") -> str:
        """Add files to a branch, and return the commit's hash."""
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        seed = json.dumps([len(self.commits), branch, sorted(content)])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = content, sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit that a branch or hash names."""
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Hub:
    """The state of the stand-in, for tests to look at and to tamper with."""

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def model(self, repo_id: str) -> Repository:
        return self.repositories.setdefault(("models", repo_id), _new_repository())

    def dataset(self, repo_id: str) -> Repository:
        return self.repositories.setdefault(("datasets", repo_id), _new_repository())


def _new_repository(private: bool = False) -> Repository:
    made = Repository(private)
    made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
    return made


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self._body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.command in ("POST", "PUT") and not path.startswith("/lfs/") and not self._may_write():
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(self._body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            self.hub.stored[path.removeprefix("/lfs/")] = self._body
            self._json({})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(self._body))
        elif path.startswith("/api/"):
            _, _, kind, owner, name, *rest = path.split("/")
            self._api(kind, f"{owner}/{name}", rest)
        else:
            self._resolve(path)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, wanted: dict[str, Any]) -> None:
        key = (f"{wanted.get('type') or 'model'}s", f"{wanted['organization']}/{wanted['name']}")
        url = f"{self.hub.endpoint}/{'' if key[0] == 'models' else f'{key[0]}/'}{key[1]}"
        if key in self.hub.repositories:
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.repositories[key] = _new_repository(private)
        self._json({"url": url, "name": key[1], "id": key[1]})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}},
            }
            for item in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _api(self, kind: str, repo_id: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get((kind, repo_id))
        if repository is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        action, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        found = repository.at(revision)
        if found is None:
            self._json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        sha, files = found
        if action == "revision":
            self._json({"id": repo_id, "sha": sha, "private": repository.private, "siblings": [], "tags": []})
        elif action == "tree":
            self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
            )
        elif action == "preupload":
            asked = json.loads(self._body)["files"]
            modes = {item["path"]: "lfs" if item["path"].endswith(".safetensors") else "regular" for item in asked}
            self._json(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
            )
        else:
            self._commit(kind, repo_id, repository, revision)

    def _commit(self, kind: str, repo_id: str, repository: Repository, branch: str) -> None:
        files: Files = {}
        message = ""
        for line in self._body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        sha = repository.commit(files, message, branch)
        home = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"
        self._json({"commitUrl": f"{home}/commit/{sha}", "commitOid": sha, "success": True})

    def _resolve(self, path: str) -> None:
        parts = path.strip("/").split("/")
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, revision, *rest = parts
        repository = self.hub.repositories.get((kind, f"{owner}/{name}"))
        found = None if repository is None else repository.at(revision)
        data = None if found is None else found[1].get("/".join(rest))
        if found is None or data is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(data).hexdigest()
        self._send(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]}, "application/octet-stream")

    def _json(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(answer).encode(), status, headers or {}, "application/json")

    def _send(self, data: bytes, status: int, headers: dict[str, str], kind: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
