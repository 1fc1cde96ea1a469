"""Where published weights lie. Apart from the publisher, so that an engine can be started before torch is imported."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "lockstep-weights-"
SETTLED_S = 60.0
"""A directory younger than this may belong to a process that has not locked it yet."""

_held: list[int] = []
"""Descriptors that lock this process's directories until it ends, however it ends."""


def weights_directory() -> Path:
    """A new private (0700) directory for published weights, in shared memory where the system has it.

    Those that killed trainers left there are removed: they would hold as much memory as their models.
    """
    shared = Path("/dev/shm")
    root = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    for left in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_if_abandoned(left)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    _held.append(os.open(directory, os.O_RDONLY))
    fcntl.flock(_held[-1], fcntl.LOCK_EX)
    return directory


def _remove_if_abandoned(directory: Path) -> None:
    """Raises OSError while it is another process's, or another user's."""
    if time.time() - directory.stat().st_mtime < SETTLED_S:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)
    finally:
        os.close(descriptor)
