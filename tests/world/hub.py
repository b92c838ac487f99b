"""A local server that answers as the Hugging Face hub does: repositories, refs, commits, large files, access."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml

LARGE = ".safetensors"
"""Files of this kind are kept as git-lfs objects and served from another host."""


class Refusal(Exception):
    """An answer with an error; the code is that of the header X-Error-Code."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, bytes], message: str = "files") -> str:
        """Put `files` on top of `ref`; return the new commit."""
        whole = self.commits[self.refs[ref]] | files
        digest = hashlib.sha1(f"{ref} {len(self.commits)}".encode())
        for name in sorted(whole):
            digest.update(name.encode() + whole[name])
        self.commits[digest.hexdigest()] = whole
        self.refs[ref] = digest.hexdigest()
        self.messages.append(message)
        return digest.hexdigest()

    def at(self, revision: str) -> str:
        found = self.refs.get(revision, revision)
        if found not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


@dataclass
class Hub:
    """The server's state. `owner` may do everything, `reader` reads what is not private, `member` reads all."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """git-lfs objects by SHA-256."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, address and Authorization of each request."""
    port: int = 0
    owner: str = "hf_ownerssecret"
    member: str = "hf_memberssecret"
    reader: str = "hf_readerssecret"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> str:
        """Where large files lie: another host for the client."""
        return f"http://localhost:{self.port}/objects"

    def repository(self, name: str, **settings: bool) -> Repository:
        return self.repositories.setdefault(name, Repository(**settings))

    def open(self, name: str, token: str | None, content: bool = False, write: bool = False) -> Repository:
        """The repository, if this token may read or `write` it; `content`: files of it, which gates protect."""
        found = self.repositories.get(name)
        known = (self.owner, self.member)
        if token is not None and token not in (*known, self.reader):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if found is None or (found.private and token not in known):
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if found.gated and content and token not in known:
            raise Refusal(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        if write and token != self.owner:
            raise Refusal(403 if token else 401, "", "Forbidden: you must use a token with write access")
        return found

    # Answers

    def info(self, name: str, revision: str, token: str | None) -> dict[str, Any]:
        found = self.open(name, token)
        commit = found.at(revision)
        siblings = [{"rfilename": path} for path in found.commits[commit]]
        return {"id": name, "sha": commit, "private": found.private, "gated": found.gated, "siblings": siblings}

    def tree(self, name: str, revision: str, token: str | None) -> list[dict[str, Any]]:
        found = self.open(name, token)
        return [entry(path, data) for path, data in sorted(found.commits[found.at(revision)].items())]

    def create(self, asked: dict[str, Any], token: str | None) -> dict[str, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if token != self.owner:
            raise Refusal(403 if token else 401, "", "You don't have the rights to create a model under this namespace")
        if name in self.repositories:
            raise Refusal(409, "", "You already created this model repo", url=f"{self.endpoint}/{name}")
        self.repository(name, private=asked.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{name}", "name": name}

    def branch(self, name: str, branch: str, token: str | None) -> dict[str, Any]:
        found = self.open(name, token, write=True)
        if branch in found.refs:
            raise Refusal(409, "", "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return {}

    def preupload(self, name: str, asked: dict[str, Any], token: str | None) -> dict[str, Any]:
        self.open(name, token, write=True)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in asked["files"]
            ]
        }

    def batch(self, name: str, asked: dict[str, Any], token: str | None) -> dict[str, Any]:
        self.open(name, token, write=True)
        wanted = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.store}/{one['oid']}"}}
            wanted.append(one if one["oid"] in self.objects else one | {"actions": upload})
        return {"transfer": "basic", "objects": wanted}

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]], token: str | None) -> dict[str, Any]:
        found = self.open(name, token, write=True)
        head, *rest = lines
        files = {}
        for line in rest:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        made = found.commit(branch, files, head["value"]["summary"])
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{made}", "commitOid": made}

    @staticmethod
    def validate(content: str) -> dict[str, Any]:
        front = yaml.safe_load(content.split("---")[1])
        assert isinstance(front, dict)
        return {"errors": [], "warnings": []}


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the tree lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


def blob(data: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Addresses of the hub's API."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do(self) -> None:
        place = urlsplit(self.path)
        header = self.headers.get("Authorization")
        self.hub.requests.append((self.command, self.path, header))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = header.removeprefix("Bearer ") if header else None
        parts = [unquote(part) for part in place.path.strip("/").split("/")]
        try:
            self.route(parts, body, token, parse_qs(place.query))
        except Refusal as refusal:
            named = {"X-Error-Code": refusal.code} if refusal.code else {}
            body = json.dumps({"error": refusal.message} | refusal.body).encode()
            self.reply(body, refusal.status, named | {"X-Error-Message": refusal.message})

    do_GET = do_HEAD = do_POST = do_PUT = do

    def route(self, parts: list[str], body: bytes, token: str | None, query: dict[str, list[str]]) -> None:
        hub, rest = self.hub, parts[4:]
        match self.command, parts:
            case "PUT", ["objects", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                hub.objects[oid] = body
                self.reply(b"")
            case "GET" | "HEAD", ["objects", oid]:
                self.reply(hub.objects[oid])
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                self.resolve(f"{owner}/{name}", revision, "/".join(path), token)
            case "GET", ["api", "models", owner, name]:
                self.json(hub.info(f"{owner}/{name}", "main", token))
            case "GET", ["api", "models", owner, name, "revision", revision]:
                self.json(hub.info(f"{owner}/{name}", revision, token))
            case "GET", ["api", "models", owner, name, "tree", revision]:
                self.json(hub.tree(f"{owner}/{name}", revision, token))
            case "POST", ["api", "repos", "create"]:
                self.json(hub.create(json.loads(body), token))
            case "POST", ["api", "models", owner, name, "branch", branch]:
                self.json(hub.branch(f"{owner}/{name}", branch, token))
            case "POST", ["api", "models", owner, name, "preupload", _]:
                self.json(hub.preupload(f"{owner}/{name}", json.loads(body), token))
            case "POST", ["api", "models", owner, name, "commit", branch]:
                lines = [json.loads(line) for line in body.splitlines()]
                self.json(hub.commit(f"{owner}/{name}", branch, lines, token))
            case "POST", [owner, repository, "info", "lfs", "objects", "batch"]:
                self.json(hub.batch(f"{owner}/{repository.removesuffix('.git')}", json.loads(body), token))
            case "POST", ["api", "validate-yaml"]:
                self.json(hub.validate(json.loads(body)["content"]))
            case _:
                raise Refusal(404, "", f"no such address ({rest}, {query})")

    def resolve(self, name: str, revision: str, path: str, token: str | None) -> None:
        found = self.hub.open(name, token, content=True)
        commit = found.at(revision)
        if path not in found.commits[commit]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = found.commits[commit][path]
        headers = {"X-Repo-Commit": commit}
        if not path.endswith(LARGE):
            self.reply(data, headers=headers | {"ETag": f'"{blob(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.objects[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        self.reply(b"", 302, headers | {"Location": f"{self.hub.store}/{oid}"})

    def json(self, value: Any) -> None:
        self.reply(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def reply(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """A running hub to which `huggingface_hub` is directed, with an empty cache and nobody logged in."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    constants = huggingface_hub.constants
    # As HF_ENDPOINT does, which is read once, when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{cache}/hub")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by git-lfs's protocol
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
