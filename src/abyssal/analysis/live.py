"""The report of a run while it trains: served on this machine, kept up to date by the page itself.

The server lives in a thread beside the training and reads what the trainer writes to metrics.jsonl, only what was added
and only while somebody looks. A page asks for what is new and is answered when there is something. Making the answer
takes a thread's time from the training: it is done so rarely that it comes to at most a fiftieth.
"""

from __future__ import annotations

import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from abyssal.analysis.page import render_page, to_json
from abyssal.analysis.report import ReportedRun, report_data
from abyssal.errors import UserError

HOST = "127.0.0.1"
USUAL_PORT = 8765
_SHARE = 0.02  # of the time, for making answers
_AT_LEAST = 2.0  # seconds between two answers that are not the same
_LOOK = 0.5  # seconds between two looks at the file, while a page waits
_HOLD = 20.0  # seconds after which a page is told that nothing is new
_FAREWELL = 3.0  # seconds that the end waits for pages to come and hear of it


class Live:
    """Serves the report of a run on 127.0.0.1. The port is taken at once, so that one in use is known before anything
    is written: raises UserError then. ``port`` None is 8765 or any that is free, 0 any that is free."""

    def __init__(self, port: int | None = None) -> None:
        render_page("report", "", None)  # raises where Plotly is missing, now rather than when a page is asked for
        self._server = _bind(port)
        self._server.live = self
        self._thread: threading.Thread | None = None
        self._run: ReportedRun | None = None
        self._changed = threading.Condition()
        self._state, self._version = "live", 0
        self._data: dict[str, Any] = {}
        self._text = ""
        self._due = 0.0  # when the next answer may be made
        self._pages: dict[str, float] = {}  # pages that follow, and when they last asked

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self._server.server_address[1]}/"

    def start(self, path: Path) -> None:
        """Begins to serve the run in ``path``."""
        self._run = ReportedRun(path)
        self._refresh()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="live page", daemon=True)
        self._thread.start()

    def stop(self, state: str) -> None:
        """Tells the pages that training is over (``finished``, ``stopped`` or ``failed``) and ends the server."""
        if self._thread is not None:
            with self._changed:
                self._state = state
                self._changed.notify_all()
                end = time.monotonic() + _FAREWELL
                while self._followed() and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def page(self) -> str:
        """The page as it is now; it then asks for :meth:`news`."""
        with self._changed:
            self._refresh()
            assert self._run is not None
            return render_page("report", f"abyssal: {self._run.name}", self._data)

    def news(self, after: int, page: str) -> tuple[str | None, bool]:
        """Data that is another version than ``after``, as JSON, as soon as there is some, None if that takes long; and
        whether it says that training is over."""
        end = time.monotonic() + _HOLD
        with self._changed:
            while True:
                if page:
                    self._pages[page] = time.monotonic()
                self._refresh()
                if self._version != after:
                    return self._text, self._data["live"]["state"] != "live"
                if (left := end - time.monotonic()) <= 0:
                    return None, False
                self._changed.wait(min(left, _LOOK))

    def told(self, page: str) -> None:
        """That ``page`` has heard of the end, and will not ask again."""
        with self._changed:
            self._pages.pop(page, None)
            self._changed.notify_all()

    def _followed(self) -> bool:
        """Whether a page is still to hear of the end: one that asked a moment ago."""
        now = time.monotonic()
        self._pages = {page: asked for page, asked in self._pages.items() if now - asked < 2 * _FAREWELL}
        return bool(self._pages)

    def _refresh(self) -> None:
        assert self._run is not None
        ended = self._data and self._state != self._data["live"]["state"]
        if not ended and time.monotonic() < self._due:
            return
        begun, used = time.monotonic(), time.thread_time()
        changed = self._run.history.read(whole=self._state != "live")
        if changed or ended or not self._data:
            self._version += 1
            self._data = report_data([self._run])
            self._data["live"] = {"version": self._version, "state": self._state}
            self._text = to_json(self._data)
            self._followed()  # pages that went without a word are forgotten
            self._due = begun + max(_AT_LEAST, (time.thread_time() - used) / _SHARE)


class _Server(socketserver.ThreadingTCPServer):  # http.server's own asks the name server for the host's name
    allow_reuse_address = True
    daemon_threads = True
    live: Live

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is closed breaks its connection; that is no news. Anything else is a bug of ours, in a line."""
        if not isinstance(sys.exception(), OSError):
            print(f"abyssal: warning: live page: {sys.exception()!r}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # for a client that says nothing

    def do_GET(self) -> None:
        # A page elsewhere may point a name of its own at this machine to read what is here: only ours is answered.
        host = (self.headers.get("Host") or "").lower().rpartition(":")
        if (host[0] or host[2]) not in (HOST, "localhost"):
            self._answer(403, "text/plain", "this server answers to 127.0.0.1 and localhost only\n")
            return
        path, _, asked = self.path.partition("?")
        if path == "/":
            self._answer(200, "text/html", self.server.live.page())
        elif path == "/data.json":
            query = parse_qs(asked)
            page, after = query.get("page", [""])[0][:32], query.get("after", [""])[0][:16]
            known = int(after) if after.isascii() and after.isdecimal() else -1
            data, over = self.server.live.news(known, page)
            try:
                self._answer(204 if data is None else 200, "application/json", data or "")
            finally:
                if over:
                    self.server.live.told(page)
        else:
            self._answer(404, "text/plain", "there is / and /data.json\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the training's."""


def _bind(port: int | None) -> _Server:
    tried = (USUAL_PORT, 0) if port is None else (port,)
    for number in tried:
        try:
            return _Server((HOST, number), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "no such port"
    raise UserError(f"--port {tried[-1]}: {reason}; choose another, or 0 for any that is free")
