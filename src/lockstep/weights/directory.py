"""Where published weights lie, with room for them.

Apart from the publisher: an engine is started before torch is imported.

    /dev/shm/lockstep-weights-x/weights.safetensors          where shared memory has the room
        ─► <cache>/weights/lockstep-weights-y/weights.safetensors    a link, where not

A tmpfs promises more than it has: a file that is only made longer takes its memory when it is written to, and
SIGBUS, without a word, is how the kernel says that there is none. So the room is reserved before anything is
mapped.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lockstep.config.cache import cache_root
from lockstep.errors import NoRoomError

SHARED = Path("/dev/shm")
PREFIX = "lockstep-weights-"
FILE_NAME = "weights.safetensors"
SETTLED_S = 60.0
"""A directory younger than this may belong to a process that has not locked it yet."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}

_held: dict[Path, int] = {}
"""Descriptors that lock this process's directories until it ends, however it ends."""


def weights_directory() -> Path:
    """A new private (0700) directory for published weights: in shared memory if there is any, or the cache.

    Those that killed trainers left in either are removed: they would hold as much memory as their models.
    """
    # Called inside the suppression: the cache may not be writable, and that is no reason to start without
    # weights.
    for root in (lambda: SHARED, _cache):
        with contextlib.suppress(OSError):
            for left in root().glob(f"{PREFIX}*"):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(left)
    with contextlib.suppress(OSError):
        return _new(SHARED)
    try:
        return _new(_cache())
    except OSError as error:
        raise _no_room(0, f"neither {SHARED} nor the cache can be written ({error})") from error


def remove_weights(directory: Path) -> None:
    """Give back a directory of :func:`weights_directory`, and the other one that its files lie in, if any."""
    beside = {file.resolve().parent for file in directory.glob(f"*{FILE_NAME}")}
    for own in ({directory} | beside) & _held.keys():
        shutil.rmtree(own, ignore_errors=True)
        os.close(_held.pop(own))


def reserve(directory: Path, size: int, say: Callable[[str], None], name: str = FILE_NAME) -> BinaryIO:
    """The file of published weights, open, with every byte of it there to be written.

    Args:
        directory: :func:`weights_directory`'s. What does not fit there lies in the cache, and a link in its
            place.
        say: told where the file lies if not in ``directory``, why, and what that costs.

    Raises:
        NoRoomError: when neither has the room.
    """
    path = directory / name
    try:
        return _reserved(path, size)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        full = _room(directory)
    # It lay in the cache already: there is nowhere else to go.
    if directory.parent != SHARED:
        raise _no_room(size, full)
    try:
        beside = _new(_cache())
    except OSError as error:
        raise _no_room(size, f"{full}, and the cache cannot be written ({error})") from error
    try:
        file = _reserved(beside / name, size)
        path.symlink_to(beside / name)
    except OSError as error:
        also = f"{_room(beside)} ({error.strerror})"
        remove_weights(beside)
        raise _no_room(size, f"{full}, {also}") from error
    say(
        f"weights: {full}, {size / 1e6:.0f} MB are needed, so they lie in {beside}: a file on disk, "
        f"to which every step's update is written; {_mend(size)} avoids that"
    )
    return file


def _reserved(path: Path, size: int) -> BinaryIO:
    file = path.open("xb+")
    try:
        os.fchmod(file.fileno(), 0o600)
        if hasattr(os, "posix_fallocate"):
            # Every page is taken now: ENOSPC here, an error with a hint, in the place of SIGBUS later,
            # without a word.
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except BaseException:
        file.close()
        path.unlink()
        raise
    return file


def _new(root: Path) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    # The kernel lets go of a lock when its process ends, be it killed: no number in a file has to be
    # believed.
    _held[directory] = os.open(directory, os.O_RDONLY)
    fcntl.flock(_held[directory], fcntl.LOCK_EX)
    return directory


def _cache() -> Path:
    root = cache_root() / "weights"
    root.mkdir(mode=0o700, exist_ok=True)
    return root


def _room(directory: Path) -> str:
    stats = os.statvfs(directory)
    free, size = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
    return f"{directory.parent} has {free / 1e6:.0f} MB free of {size / 1e6:.0f}"


def _mend(size: int) -> str:
    needed = f"{-(-2 * size // 10**9)}g"
    return f"mount -o remount,size={needed} {SHARED}, or docker run --shm-size={needed},"


def _no_room(size: int, rooms: str) -> NoRoomError:
    return NoRoomError(
        "weights, the file that engines load from",
        got=rooms,
        expected=f"{size} bytes ({size / 1e6:.0f} MB) in one of them",
        hint=f"{_mend(size)} or LOCKSTEP_CACHE=… on a disk with room",
    )


def _remove_if_abandoned(directory: Path) -> None:
    """Raises OSError while it is another process's, or another user's."""
    if abs(time.time() - directory.stat().st_mtime) < SETTLED_S:  # a clock may have been set back
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)
    finally:
        os.close(descriptor)
