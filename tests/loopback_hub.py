"""A loopback stand-in for the Hub, so that the real client is tested."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Files = Mapping[str, bytes]


@contextmanager
def hub(repositories: Mapping[str, Files], commit: str, gated: Collection[str] = ()) -> Iterator[str]:
    """Serves ``repositories`` (name -> files), each with the revisions main, v1 and ``commit``; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
            repo = "/".join(path.split("/")[:2])
            rest = path.removeprefix(repo).strip("/")
            if repo not in repositories:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if repo in gated and not self.path.startswith("/api/"):
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            files = repositories[repo]
            if rest.startswith("revision/") and rest.rsplit("/", 1)[-1] not in ("main", "v1", commit):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            if rest.startswith("tree/"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                return self.answer(200, json.dumps(tree).encode())
            if self.path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
            name = rest.removeprefix("resolve/").partition("/")[2]
            if name not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            return self.answer(200, files[name], ETag=f'"{name.replace("/", "-")}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


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
