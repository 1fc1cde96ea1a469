"""Where Lockstep keeps what it builds once for all clones: engine environments, models, compiled kernels."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_root() -> Path:
    """``$LOCKSTEP_CACHE``, else ``$XDG_CACHE_HOME/lockstep``, else ``~/.cache/lockstep``; made private (0700) if it is new."""
    if "LOCKSTEP_CACHE" in os.environ:
        root = Path(os.environ["LOCKSTEP_CACHE"])
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root.resolve()


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; a second process waits, and says so. The lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is building {path.stem}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
