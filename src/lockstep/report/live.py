"""A run followed in a browser: served on the loopback address alone, to whoever knows the address's token.

main thread     stat and lock, every second ─► files changed? render ─► ``shown`` replaced whole
server threads  one a request: host, token, name, method ─► bytes of ``shown``; no request opens a file
browser         state.json every 2 s ─► another version ─► the page again, put in place (``assets/live.js``)

Rendering has one thread and a tenth of its time, so that neither a large run nor many requests take the
processor from the training beside it. Nothing is written.
"""

import contextlib
import hmac
import secrets
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec

from lockstep.errors import RunError, UsageError
from lockstep.records.printable import printable
from lockstep.report.build import of_run
from lockstep.report.document import Report
from lockstep.report.page import Live, page
from lockstep.runs.layout import RunLayout, existing_run
from lockstep.runs.read import open_run

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost", "::1")
"""What a Host header may name, at any port, for one may be forwarded. Any other name is somebody's DNS, which
could be made to point here."""
EVERY_S = 1.0
SHARE = 0.1
"""The share of the time, at most, that is spent rendering."""
REQUEST_S = 10.0
"""Most seconds for a request to arrive, and for its answer to be taken."""
METHODS = ("GET", "HEAD")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
"""The headers of every answer; what the page may do besides is said in the page."""
Content = dict[str, tuple[str, bytes]]
"""A name under the token → type and bytes."""


class Followed:
    """A run, rendered anew as its files change. ``shown`` is what is served: replaced, never changed."""

    def __init__(self, path: Path) -> None:
        """Render it once.

        Raises:
            UsageError: where there is neither a run nor a process that is about to write one.
            RunError: for a damaged run.
        """
        self.layout = RunLayout(path) if RunLayout(path).at_work() else existing_run(path)
        self.words = ""
        self.shown: Content = {}
        self._version = 0
        self._fault = ""
        self._stamp = self._files()
        self._rest_until = 0.0
        self._steps = self._planned = 0
        self._report = self._read()
        self._show()

    def look(self) -> None:
        """Render the run if its files changed, and say how it stands."""
        stamp = self._files()
        began = time.monotonic()
        if stamp != self._stamp and began >= self._rest_until:
            # The stamp from before the reading: what is written meanwhile is seen at the next look.
            self._stamp = stamp
            try:
                self._report = self._read()
                self._fault = ""
            except (RunError, OSError) as error:
                self._fault = f" Shown is what was there before: {str(error).partition(chr(10))[0]}."
            self._version += 1
            self._show()
            took = time.monotonic() - began
            self._rest_until = began + took / SHARE
        elif self._stands() != self.words:
            self._show()

    def follow(self, say: Callable[[str], None]) -> NoReturn:
        """Look every second, until the process is told to end; what is new of how the run stands is said."""
        said = None
        while True:
            if (ended := not self.layout.at_work()) != said:
                said = ended
                say(f"{self._stands()} Ctrl-C ends this.")
            time.sleep(EVERY_S)
            self.look()

    def _files(self) -> tuple[object, ...]:
        """What changes with the run; a directory does when a file in it is renamed."""
        run = self.layout
        jsonl = (run.metrics, run.verdicts, run.alarms, run.ledger)
        return tuple(map(_stat, (run.manifest, *jsonl, run.rollouts(0).parent)))

    def _read(self) -> Report:
        if not self.layout.manifest.is_file():
            words = ("It has begun: what it runs on is being started, and its manifest is not written yet.",)
            return Report(kind="run", title=self._title, status="NOT_RUN", words=words, sections=())
        run = open_run(self.layout.root)
        self._planned = run.manifest.recipe.training.steps
        self._steps = run.steps.records[-1].step + 1 if len(run.steps) else 0
        return of_run(run)

    @property
    def _title(self) -> str:
        return f"Run {self.layout.root.name}"

    def _stands(self) -> str:
        trained = f"{self._steps} of {self._planned} steps are trained"
        if self.layout.at_work():
            words = f"Live: {trained}." if self._planned else "Live."
        elif self._planned and self._steps >= self._planned:
            words = f"The run has ended: {trained}."
        else:
            words = f"Nothing is at this run any more: {trained}."
            if self._report.status != "FAIL":  # else a proof stopped it, and the page says what mends that
                words += f" lockstep train --resume {self.layout.root} goes on with it."
        return words + self._fault

    def _show(self) -> None:
        self.words = self._stands()
        live = Live(version=self._version, words=printable(self.words))
        self.shown = {
            "": ("text/html; charset=utf-8", page(self._report, live).encode()),
            "state.json": ("application/json", msgspec.json.encode(live)),
        }


def _stat(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    # The inode too: a file that is renamed into place may have the size and, on a coarse clock, the time.
    return found.st_mtime_ns, found.st_size, found.st_ino


class _Loopback(socketserver.ThreadingTCPServer):
    """Not ``http.server``'s own class, which asks the DNS for this machine's name."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, followed: Followed, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        super().__init__((LOOPBACK, port), partial(_Request, followed, self.token))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went is no error; what is one is shown as ever."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    """One request; whatever it lacks, the answer does not say."""

    timeout = REQUEST_S

    def __init__(self, followed: Followed, token: str, *of_server: Any) -> None:
        self._followed = followed
        self._token = token.encode()
        super().__init__(*of_server)

    def _answer(self) -> None:
        token, slash, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        known = hmac.compare_digest(token.encode(), self._token)
        found = self._followed.shown.get(name) if slash else None
        if not known or not self._host():
            self._send(HTTPStatus.FORBIDDEN)
        elif found is None:
            self._send(HTTPStatus.NOT_FOUND)
        elif self.command not in METHODS:
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": ", ".join(METHODS)})
        else:
            self._send(HTTPStatus.OK, {"Content-Type": found[0]}, found[1])

    def __getattr__(self, name: str) -> Callable[[], None]:
        """``do_GET`` and the like: what a method may is judged after the token."""
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self._answer

    def _host(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        with contextlib.suppress(ValueError):  # of what is no host at all
            return len(hosts) == 1 and urlsplit(f"//{hosts[0]}").hostname in HOSTS
        return False

    def _send(self, status: int, more: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response_only(status)
        for name, value in (HEADERS | (more or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As every answer: no body, and nothing of the request in it."""
        self._send(code)

    def log_message(self, format: str, *args: object) -> None:
        """A line would have the token in it."""


@contextlib.contextmanager
def serving(followed: Followed, port: int = 0) -> Iterator[str]:
    """The address under which a browser sees it, while the body runs.

    Args:
        port: 0 for one that is free.

    Raises:
        UsageError: for a port that cannot be had.
    """
    try:
        server = _Loopback(followed, port)
    except OSError as error:
        got = error.strerror or str(error)
        raise UsageError(f"flag --port {port}", got=got, expected="a free port", hint="--port 0") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}/{server.token}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
