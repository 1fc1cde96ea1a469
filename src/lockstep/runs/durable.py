"""Files that outlive a kill and a power cut, or are not there at all.

Everything that a run writes goes through here.

  write_atomically   .partial-NAME ─ write ─ fsync ─► rename ─► fsync of the directory
  append_line        one write of a whole line ─► fsync, of the directory too; undone where it came out short
  rename             rename ─► fsync of both directories
  make_directory     mkdir ─► fsync of the parent, for each level that was missing

A directory is flushed too: a file system may keep a file's content and lose its name. What cannot be written
is an error that names the file and the command that goes on; a partial file is removed with it.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from lockstep.errors import RunError

PARTIAL = ".partial-"
PRIVATE_FILE, PRIVATE_DIRECTORY = 0o600, 0o700
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP)
"""What some network file systems say to the fsync of a directory: there is nothing to flush."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing ``path`` becomes an error that names it.

    Raises:
        RunError: for a full or broken disk, a missing permission and the like.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"writing {path}",
            got=error.strerror or str(error),
            expected="room for it" if error.errno in NO_ROOM else "a file system that takes it",
            hint=(
                f"{'free space' if error.errno in NO_ROOM else f'df -h {path.parent}'}, then: "
                f"{_next_command(path)}"
            ),
        ) from error


def _next_command(path: Path) -> str:
    run = next((parent for parent in path.parents if (parent / "manifest.json").is_file()), None)
    return f"lockstep train --resume {run}" if run is not None else "the same command again"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file whole or not at all.

    Raises:
        RunError: when it cannot be written; what was there before is still there.
    """
    partial = path.with_name(PARTIAL + path.name)
    with writing(path):
        try:
            _write_new(partial, memoryview(content))
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        flush_directory(path.parent)


def _write_new(path: Path, content: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        os.fchmod(descriptor, PRIVATE_FILE)  # whatever the umask took away
        while content:
            content = content[_some(os.write(descriptor, content)) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _some(written: int) -> int:
    if not written:  # nor would the next write take any, for ever
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return written


def append_line(path: Path, line: bytes) -> None:
    """Add one whole line, or leave the file as it was.

    Raises:
        RunError: when it cannot be written.
    """
    with writing(path):
        descriptor = open_for_append(path)
        try:
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
        flush_directory(path.parent)


def open_for_append(path: Path) -> int:
    """A descriptor that writes at the end; the file is private if it is made here. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
    except FileExistsError:
        return os.open(path, flags)
    os.fchmod(descriptor, PRIVATE_FILE)
    return descriptor


def rename(source: Path, target: Path) -> None:
    """Give a file or a directory another name, for good.

    Raises:
        RunError: when it cannot be done; the source is then still there.
    """
    with writing(target):
        os.replace(source, target)
        flush_directory(target.parent)
        if source.parent != target.parent:
            flush_directory(source.parent)


def make_directory(path: Path, mode: int = PRIVATE_DIRECTORY) -> None:
    """Make a directory, and those above it that are missing; one that is there is left as it is.

    Raises:
        RunError: when it cannot be made.
    """
    for directory in reversed([level for level in (path, *path.parents) if not level.exists()]):
        with writing(directory):
            os.mkdir(directory, mode)
            if mode == PRIVATE_DIRECTORY:
                os.chmod(directory, mode)  # whatever the umask took away
            flush_directory(directory.parent)


def flush_file(path: Path) -> None:
    """A file's content, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """The names in a directory, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(descriptor)
