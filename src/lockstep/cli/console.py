"""Talk goes to stderr: one plain line a step, on a terminal with a running clock. Data goes to stdout."""

import os
import shutil
import sys
import threading
import time
from typing import Any, Self

import msgspec

from lockstep.errors import LockstepError

TICK_S = 0.2


class Console:
    """What long work says while it runs.

    Used as a context (``with Console() as console``) on a terminal, the last line's clock runs, and a text that begins
    with the last step's text and ``": "`` replaces it in place. Otherwise each text is a line.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._step = self._text = ""
        self._mutex, self._end = threading.Lock(), threading.Event()
        self._ticker: threading.Thread | None = None

    def say(self, text: str) -> None:
        """One step, one line, with the seconds since the start."""
        with self._mutex:
            if self._ticker is None:
                print(self._line(text), file=sys.stderr, flush=True)
                return
            if not (self._step and text.startswith(f"{self._step}: ")):
                self._close_line()
                self._step = text
            self._text = text
            self._draw()

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
        sys.stderr.write(f"\r\x1b[K{self._line(self._text)[:width]}")
        sys.stderr.flush()

    def _close_line(self) -> None:
        if self._text:
            sys.stderr.write(f"\r\x1b[K{self._line(self._text)}\n")
            sys.stderr.flush()

    def _line(self, text: str) -> str:
        return f"[{time.perf_counter() - self._began:6.1f}s] {text}"


def emit(schema: str, content: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    from lockstep.runs.write import plain

    document = {"schema": f"lockstep.{schema}/1", **plain(content)}
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n")


def fail(error: LockstepError, *, as_json: bool) -> None:
    """Show an error: for people on stderr, for programs also on stdout."""
    if as_json:
        fields = {name: getattr(error, name) for name in ("boundary", "got", "expected", "hint", "exit_code")}
        emit("error", {"error": {"type": type(error).__name__, **fields}})
    print("\n\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
