"""A loopback stand-in for the Hub, so that the real client is tested: what it reads, and what it writes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]
LARGE = (".safetensors", ".png")  # what this Hub wants as large files
_PLACE = re.compile(r"(?:api/)?(?:(models|datasets|spaces)/)?([^/]+/[^/]+?)(\.git)?(?:/(.*))?")


@dataclass
class Stored:
    """One repository: the files of each of its revisions, and which one is its newest."""

    revisions: dict[str, dict[str, bytes]]
    head: str
    private: bool = False
    sdk: str | None = None
    tags: Collection[str] = ()  # further names of the newest

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A revision by its name: the commit, and its files."""
        commit = self.head if revision in ("main", *self.tags) else revision
        return (commit, self.revisions[commit]) if commit in self.revisions else None

    @property
    def files(self) -> dict[str, bytes]:
        """The newest files."""
        return self.revisions[self.head]


@dataclass
class Hub:
    """What the server holds, what it was asked, and how it misbehaves."""

    token: str | None = None
    repositories: dict[str, Stored] = field(default_factory=dict)  # "models/OWNER/NAME" -> repository
    gated: Collection[str] = ()
    objects: dict[str, bytes] = field(default_factory=dict)  # large files that have arrived, by sha256
    log: list[str] = field(default_factory=list)  # METHOD PATH
    bodies: list[bytes] = field(default_factory=list)
    cuts: int = 0  # large files whose connection is cut in the middle
    spared: int = 0  # large files that arrive before those
    role: str = "fineGrained"  # of the token
    busy: bool = False  # somebody else commits while files are sent
    endpoint: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def writes(self) -> list[str]:
        """What was asked of it that would change something."""
        return [line for line in self.log if not line.startswith(("GET", "HEAD"))]

    def cut(self) -> bool:
        """Whether the large file that comes now is to break off."""
        with self.lock:
            if self.spared:
                self.spared -= 1
            elif self.cuts:
                self.cuts -= 1
                return True
        return False


def _sha(*parts: bytes) -> str:
    return hashlib.sha1(b"\0".join(parts)).hexdigest()


def _oid(name: str, content: bytes) -> str:
    """What git calls the content: a blob's hash, or a large file's."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def place(self) -> tuple[str, str, str]:
            """Key of the repository, its name, and the rest of the path."""
            match = _PLACE.fullmatch(self.path.split("?")[0].strip("/"))
            assert match, self.path
            return f"{match[1] or 'models'}/{match[2]}", match[2], match[4] or ""

        # ------------------------------------------------------------------------------------------------- reading
        def do_GET(self) -> None:
            state.log.append(f"{self.command} {self.path}")
            if self.path == "/":
                return self.answer(200)
            if self.path == "/api/whoami-v2":
                if not self.known():
                    return self.answer(401, {"error": "Invalid username or password."})
                who = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": state.role}}}
                return self.answer(200, who)
            key, name, rest = self.place()
            repo = state.repositories.get(key)
            if repo is None or (repo.private and not self.known()):
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if name in state.gated and not self.path.startswith("/api/"):
                return self.answer(403 if "Authorization" in self.headers else 401, b"{}", X_Error_Code="GatedRepo")
            kind, _, after = rest.partition("/")
            revision, _, path = after.partition("/")
            found = repo.at(revision or "main")
            if found is None:
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            commit, files = found
            if kind == "tree":
                tree = [{"type": "file", "path": n, "size": len(c), "oid": _oid(n, c)} for n, c in files.items()]
                return self.answer(200, tree)
            if self.path.startswith("/api/"):
                siblings = [{"rfilename": name} | self.blob(name, c, "blobs" in self.path) for name, c in files.items()]
                return self.answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings})
            if path not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            content = files[path]
            return self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

        def blob(self, name: str, content: bytes, wanted: bool) -> dict[str, Any]:
            if not wanted:
                return {}
            large = {"lfs": {"sha256": _oid(name, content), "size": len(content), "pointerSize": 1}}
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return {"size": len(content), "blobId": git} | (large if name.endswith(LARGE) else {})

        # ------------------------------------------------------------------------------------------------- writing
        def known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {state.token}"

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            state.log.append(f"{self.command} {self.path}")
            body = self.body()
            state.bodies.append(body)
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if state.token is None or not self.known():
                return self.answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            key, _, rest = self.place()
            repo = state.repositories.get(key)
            if repo is None:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if rest.startswith("preupload/"):
                if state.busy:
                    repo.revisions["b" * 40], repo.head = repo.files | {"theirs.txt": b"theirs"}, "b" * 40
                return self.answer(200, {"files": [self.mode(repo, f["path"]) for f in json.loads(body)["files"]]})
            if rest == "info/lfs/objects/batch":
                wanted = json.loads(body)["objects"]
                return self.answer(200, {"transfer": "basic", "objects": [self.action(o) for o in wanted]})
            assert rest.startswith("commit/"), self.path
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])

        def create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] == "nobody":
                return self.answer(404, {"error": "no such namespace"})
            if wanted["organization"] == "others":
                return self.answer(403, {"error": "you have no rights here"})
            key = f"{wanted.get('type', 'model')}s/{name}"
            url = f"{state.endpoint}/{key.removeprefix('models/')}"
            if key in state.repositories:
                return self.answer(409, {"error": "You already created this repo", "url": url})
            first = {".gitattributes": b"*.safetensors filter=lfs\n"}
            private = wanted.get("visibility") == "private"
            state.repositories[key] = Stored({"0" * 40: first}, "0" * 40, private, wanted.get("sdk"))
            return self.answer(200, {"url": url, "id": name})

        def mode(self, repo: Stored, path: str) -> dict[str, Any]:
            oid = _oid(path, repo.files[path]) if path in repo.files else None
            mode = "lfs" if path.endswith(LARGE) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        def action(self, wanted: dict[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in state.objects:
                return wanted
            return wanted | {"actions": {"upload": {"href": f"{state.endpoint}/objects/{wanted['oid']}"}}}

        def commit(self, repo: Stored, lines: list[dict[str, Any]]) -> None:
            if lines[0]["value"].get("parentCommit", repo.head) != repo.head:
                return self.answer(409, {"error": "A commit has happened since. Please refresh and try again."})
            files = dict(repo.files)
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "lfsFile":
                    files[value["path"]] = state.objects[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            repo.head = _sha(repo.head.encode(), *(f"{n} {_oid(n, c)}".encode() for n, c in sorted(files.items())))
            repo.revisions[repo.head] = files
            url = f"{state.endpoint}/{self.place()[1]}/commit/{repo.head}"
            return self.answer(200, {"success": True, "commitOid": repo.head, "commitUrl": url, "hookOutput": ""})

        def do_PUT(self) -> None:
            state.log.append(f"{self.command} {self.path}")
            if self.path.endswith("/settings"):
                wanted = json.loads(self.body())
                state.repositories[self.place()[0]].private = wanted["visibility"] == "private"
                return self.answer(200, b"{}")
            if state.cut():
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
                return self.connection.close()
            content, oid = self.body(), self.path.rsplit("/", 1)[-1]
            if hashlib.sha256(content).hexdigest() != oid:
                return self.answer(400, {"error": "another content than announced"})
            state.objects[oid] = content
            return self.answer(200)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serving(state: Hub) -> Iterator[Hub]:
    """Answers for ``state`` at ``state.endpoint``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub(repositories: Mapping[str, Files], commit: str, gated: Collection[str] = ()) -> Iterator[str]:
    """Serves ``repositories`` (name -> files), each with the revisions main, v1 and ``commit``; yields the endpoint."""
    state = Hub(gated=gated)
    for name, files in repositories.items():
        state.repositories[f"models/{name}"] = Stored({commit: dict(files)}, commit, tags=("v1",))
    with serving(state):
        yield state.endpoint


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process whose Hub client talks to ``endpoint`` and caches in ``home``."""
    return os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": "127.0.0.1",
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder as :func:`hub` takes them."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
