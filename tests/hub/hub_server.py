"""A stand-in for the hub: what huggingface_hub 2.4 asks for when it downloads a repository, served from folders.

    root/owner/name/main/config.json, root/owner/name/v1/config.json, …      one folder a revision

GET       /api/models/{repo}/revision/{revision}    the commit and the names of the files
GET       /api/models/{repo}/tree/{commit}          their sizes and hashes
HEAD, GET /{repo}/resolve/{commit}/{file}           a file; its ETag is the name of the blob in the cache
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from urllib.parse import unquote, urlsplit

# What real answers carry beside the status: huggingface_hub chooses its exception by these, not by the status alone.
REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}),
    "no repository": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}),
    "no file": (404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}),
}


class HubServer:
    """Serves ``root`` on 127.0.0.1 while the ``with`` block runs.

    ``requests`` lists what was asked, as (method, path). ``refuse`` may be set to a function of (method, path) that
    says how to answer: None as usual, a status, a key of ``REFUSALS``, "html" for a page that is no hub's, or "cut"
    for half of a file and then a closed connection.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | str | None] = lambda method, path: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        for name, content in files.items():
            path = self.root / repo / revision / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def files(self, method: str = "GET") -> list[str]:
        """The names of the files that were asked for by ``method``, sorted, one entry a request."""
        paths = [path for asked, path in self.requests if asked == method and "/resolve/" in path]
        return sorted(path.split("/resolve/")[1].split("/", 1)[1] for path in paths)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a child process that takes this for the hub and ``home`` for its cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/api/models/") and "/resolve/" not in path:
            return self.answer(404)  # huggingface_hub also asks for what has nothing to do with a repository
        self.hub.requests.append((self.command, path))
        refusal = self.hub.refuse(self.command, path)
        if isinstance(refusal, int):
            return self.answer(refusal)
        if refusal in REFUSALS:
            return self.answer(*REFUSALS[refusal])
        if refusal == "html":
            return self.answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
        if path.startswith("/api/models/"):
            owner, name, what, revision = path.removeprefix("/api/models/").split("/", 3)
            file = ""
        else:
            owner, name, what, revision, file = path[1:].split("/", 4)
        repo = self.hub.root / owner / name
        if not repo.is_dir():
            return self.answer(401, {"X-Error-Message": "Invalid username or password."})  # so it is on the real one
        folders = {_commit(folder): folder for folder in repo.iterdir()}
        folder = folders.get(revision, repo / revision)
        if not folder.is_dir():
            return self.answer(*REFUSALS["no revision"])
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        if what == "revision":
            return self.json(
                {"id": f"{owner}/{name}", "sha": _commit(folder), "siblings": [{"rfilename": f} for f in files]}
            )
        if what == "tree":
            return self.json(
                [{"type": "file", "path": f, "size": len(c), "oid": _git_hash(c)} for f, c in files.items()]
            )
        if file not in files:
            return self.answer(*REFUSALS["no file"])
        headers = {"X-Repo-Commit": _commit(folder), "ETag": f'"{_git_hash(files[file])}"', "Accept-Ranges": "bytes"}
        self.answer(200, headers, files[file], cut=refusal == "cut")

    do_HEAD = do_GET

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: bool = False) -> None:
        start = 0
        if "Range" in self.headers:  # "bytes=5-": how a download that broke off goes on
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            status, headers = 206, {**(headers or {}), "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            # Nothing at all the second time: each byte that comes renews the client's patience.
            self.wfile.write(body[start : len(body) // 2] if cut else body[start:])
            self.close_connection = cut

    def log_message(self, format: str, *args: object) -> None:
        pass


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _commit(folder: Path) -> str:
    content = [(str(p.relative_to(folder)), _git_hash(p.read_bytes())) for p in folder.rglob("*") if p.is_file()]
    return hashlib.sha1(repr((folder.name, sorted(content))).encode()).hexdigest()
