"""Talk goes to stderr: one plain line a step, on a terminal with a running clock. Data goes to stdout.

Much of what is shown was written by others: a server's error, a file's column names, a completion, a user's
own reward. What a terminal would obey is shown as its escape: whatever is printed while a verb runs passes
:func:`guarded`, so that no message, no traceback and no code of the user's can leave it out. Only this module
draws.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, TextIO

import msgspec

from lockstep.errors import LockstepError, Stopped
from lockstep.records.printable import OBEYED, escaped, printable

if TYPE_CHECKING:
    from lockstep.cli.live import NowTable

TICK_S = 0.2
UNREAD = 128 + signal.SIGPIPE
"""Exit code where nobody reads any more: what a shell gives any command that a closed pipe ends."""


class _Guarded:
    """A text stream that shows everything as :func:`printable`; the rest is the stream's own.

    Raises:
        Stopped: by everything that writes, once nobody reads any more.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        with _while_read(self.stream):
            self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write the lines, escaped."""
        with _while_read(self.stream):
            self.stream.writelines(map(printable, lines))

    def flush(self) -> None:
        """Pass on what is buffered."""
        with _while_read(self.stream):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _while_read(stream: TextIO) -> Iterator[None]:
    """``| head`` goes once it has its lines: nobody wants more, so the process ends in order, without a word.

    Not by the signal itself, which would leave an engine running.
    """
    try:
        yield
    except BrokenPipeError:
        # What is still buffered is written when Python ends, and would break there once more.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise Stopped(UNREAD) from None


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While the body runs, nothing that is printed reaches the terminal as a command to it."""
    outer = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Guarded(stream) for stream in outer)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = outer


class Console:
    """What long work says while it runs.

    Used as a context (``with Console() as console``) on a terminal, the last line's clock runs, and a text
    that begins with the last step's text and ``": "`` replaces it in place. Otherwise each text is a line.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._step = self._text = ""
        self._mutex = threading.Lock()
        self._end = threading.Event()
        self._ticker: threading.Thread | None = None
        self._table: NowTable | None = None

    def say(self, text: str) -> None:
        """One step, one line, with the seconds since the start."""
        with self._mutex:
            if self._table is not None:
                self._table.above(self._line(text))
                return
            if self._ticker is None:
                print(self._line(text), file=sys.stderr, flush=True)
                return
            if not (self._step and text.startswith(f"{self._step}: ")):
                self._close_line()
                self._step = text
            self._text = text
            self._draw()

    @contextlib.contextmanager
    def live(self, now: Callable[[], Mapping[str, str]]) -> Iterator[None]:
        """On a terminal a table of what ``now`` gives stands under the lines while the body runs."""
        if self._ticker is None:
            yield
            return
        from lockstep.cli.live import NowTable

        with self._mutex:
            self._close_line()
            self._text = ""
        with NowTable(now, terminal()) as table:
            self._table = table
            try:
                yield
            finally:
                with self._mutex:
                    self._table = None

    def __enter__(self) -> Self:
        """Let the clock run, on a terminal."""
        if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the clock and leave the last line."""
        if self._ticker is not None:
            self._end.set()
            self._ticker.join()
            self._ticker = None
            self._close_line()

    def _tick(self) -> None:
        while not self._end.wait(TICK_S):
            with self._mutex:
                if self._text:
                    self._draw()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be drawn over
        self._over(self._line(self._text)[:width])

    def _close_line(self) -> None:
        if self._text:
            self._over(f"{self._line(self._text)}\n")

    def _over(self, line: str) -> None:
        stream = terminal()
        stream.write(f"\r\x1b[K{line}")
        stream.flush()

    def _line(self, text: str) -> str:
        return f"[{time.perf_counter() - self._began:6.1f}s] {printable(text)}"


def terminal() -> TextIO:
    """stderr under the guard: for codes that are our own."""
    return getattr(sys.stderr, "stream", sys.stderr)


def show(text: str) -> None:
    """One line, or several, for people on stdout."""
    print(printable(text))


def emit(schema: str, content: dict[str, Any] | msgspec.Struct) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(document(schema, content))


def document(schema: str, content: dict[str, Any] | msgspec.Struct) -> str:
    """A JSON document; what a terminal would obey is in it as JSON's own escape."""
    from lockstep.runs.strict import plain

    whole = {"schema": f"lockstep.{schema}/1", **plain(content)}
    text = msgspec.json.format(msgspec.json.encode(whole), indent=1).decode()
    return OBEYED.sub(lambda found: escaped(found[0], "\\u{:04x}"), text) + "\n"


def fail(error: LockstepError, *, as_json: bool) -> None:
    """Show an error: for people on stderr, for programs also on stdout."""
    if as_json:
        fields = {name: getattr(error, name) for name in ("boundary", "got", "expected", "hint")}
        # A path of the user's may hold bytes that are no text.
        fields = {name: text.encode(errors="backslashreplace").decode() for name, text in fields.items()}
        emit("error", {"error": {"type": type(error).__name__, **fields, "exit_code": error.exit_code}})
    print(printable("\n\n".join([f"error: {error}", *getattr(error, "__notes__", [])])), file=sys.stderr)
