"""A small file system of its own, and a file that fills it."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = 4096


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs."""

    path: Path

    def fill(self, left: int = 0) -> None:
        """Leave ``left`` bytes."""
        self.filler.unlink(missing_ok=True)
        with self.filler.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, max(os.statvfs(self.path).f_bavail * PAGE - left, 1))

    def make_room(self) -> None:
        """As it was before :meth:`fill`."""
        self.filler.unlink()

    @property
    def filler(self) -> Path:
        """What takes the room."""
        return self.path / "filler"


@contextlib.contextmanager
def mounted(where: Path, size_kb: int) -> Iterator[SmallDisk]:
    """A disk of that size at ``where``; a skip with its reason where this process may not mount one."""
    if shutil.which("mount") is None:
        pytest.skip("NOT_RUN: there is no mount(8)")
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", where], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"NOT_RUN: a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(where)
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)
