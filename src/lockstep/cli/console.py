"""Talk goes to stderr: a live line with the elapsed time on a terminal, one plain line a step otherwise. Data goes to stdout."""

import sys
import time
from typing import Any

import msgspec

from lockstep.errors import LockstepError


class Console:
    """What long work says while it runs."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def say(self, text: str) -> None:
        """One step, one line, with the seconds since the start."""
        print(f"[{time.perf_counter() - self._began:6.1f}s] {text}", file=sys.stderr, flush=True)


def emit(schema: str, content: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    from lockstep.runs.write import plain

    document = {"schema": f"lockstep.{schema}/1", **plain(content)}
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n")


def fail(error: LockstepError, *, as_json: bool) -> None:
    """Show an error: for people on stderr, for programs on stdout."""
    if as_json:
        fields = {name: getattr(error, name) for name in ("boundary", "got", "expected", "hint", "exit_code")}
        emit("error", {"error": {"type": type(error).__name__, **fields}})
    print(f"error: {error}", file=sys.stderr)
