"""Where Lockstep keeps what it builds once for all clones: engine environments, models, compiled kernels."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SAY_EVERY_S = 10


def cache_root() -> Path:
    """``$LOCKSTEP_CACHE``, else ``$XDG_CACHE_HOME/lockstep``, else ``~/.cache/lockstep``; private (0700)."""
    if own := os.environ.get("LOCKSTEP_CACHE"):
        root = Path(own).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root.resolve()


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold an exclusive lock on ``path``; a second process waits, and says so.

    Yields the lock's file descriptor. A child that inherits it holds the lock too, so that a child which
    outlives this process still keeps others out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = 0
    with path.open("a") as file:
        while not _try_lock(file.fileno()):
            if waited % SAY_EVERY_S == 0:
                say(
                    f"another process is building {path.name.removesuffix('.lock')}; "
                    f"waiting for it ({waited} s)"
                )
            time.sleep(1)
            waited += 1
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
