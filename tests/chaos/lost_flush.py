"""What a power cut leaves: only what was flushed, file by file and name by name.

    recorded(root) ── each fsync: the file's content, or the directory's names, is on the disk from here on
                   └─ before and after each operation: a cut point, with the tree as a power cut leaves it

Two disks are played. ``strict`` keeps nothing that was not flushed: names of a directory are those of its
last fsync, a file's content that of its last. ``eager`` has written every name at once, renames and removals
too, and of contents only what was flushed: what ext4 and XFS do with a file that is renamed before it is
flushed.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Disk = Literal["strict", "eager"]
OPERATIONS = ("write", "ftruncate", "truncate", "replace", "rename", "unlink", "mkdir", "rmdir", "fsync")


@dataclass(frozen=True)
class Tree:
    """Directories, and files with their content, by path below the root; after one operation."""

    after: str
    directories: tuple[str, ...]
    files: dict[str, bytes]

    def build(self, root: Path) -> Path:
        """The tree as files."""
        root.mkdir()
        for name in self.directories:
            (root / name).mkdir()
        for name, content in self.files.items():
            (root / name).write_bytes(content)
        return root


@dataclass
class Recorder:
    """What is on the disk of everything below ``root``, which is there when the recording begins."""

    root: Path
    contents: dict[int, bytes] = field(default_factory=dict)
    """Inode of a file → content when it was last flushed."""
    names: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)
    """Inode of a directory → name → (inode, whether it is a directory) when it was last flushed."""
    cuts: dict[Disk, list[Tree]] = field(default_factory=lambda: {"strict": [], "eager": []})
    _held: list[int] = field(default_factory=list)
    """Descriptors of all that was flushed: its inode is not given to another file meanwhile."""

    def flushed(self, descriptor: int) -> None:
        """An fsync came back."""
        found = os.fstat(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.root):
            return
        if found.st_ino not in self.contents and found.st_ino not in self.names:
            self._held.append(os.open(path, os.O_RDONLY))
        if stat.S_ISDIR(found.st_mode):
            self.names[found.st_ino] = _names(path)
        else:
            self.contents[found.st_ino] = path.read_bytes()

    def cut(self, after: str) -> None:
        """The power goes here."""
        inode = self.root.stat().st_ino
        for disk, cuts in self.cuts.items():
            directories = []
            files = {}
            self._walk(disk, inode, self.root, "", directories, files)
            tree = Tree(after, tuple(directories), files)
            if not cuts or (cuts[-1].directories, cuts[-1].files) != (tree.directories, tree.files):
                cuts.append(tree)

    def _walk(
        self, disk: Disk, inode: int, path: Path, prefix: str, directories: list[str], files: dict[str, bytes]
    ) -> None:
        names = _names(path) if disk == "eager" else self.names.get(inode, {})
        for name, (child, is_directory) in names.items():
            if is_directory:
                directories.append(f"{prefix}{name}")
                self._walk(disk, child, path / name, f"{prefix}{name}/", directories, files)
            else:
                files[f"{prefix}{name}"] = self.contents.get(child, b"")

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._held:
            os.close(descriptor)


def _names(path: Path) -> dict[str, tuple[int, bool]]:
    with os.scandir(path) as entries:
        return {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}


@contextlib.contextmanager
def recorded(root: Path, patch: Callable[[object, str, object], None]) -> Iterator[Recorder]:
    """Watch what this process does to files, through the functions of :mod:`os` that change or flush them."""
    recorder = Recorder(root)
    busy = False

    def watch(name: str, real: Callable):
        def watched(*args, **kwargs):
            nonlocal busy
            if busy:
                return real(*args, **kwargs)
            busy = True
            try:
                found = real(*args, **kwargs)
                if name == "fsync":
                    recorder.flushed(args[0])
                recorder.cut(f"{name} {args[-1] if name != 'write' else ''}")
                return found
            finally:
                busy = False

        return watched

    for name in OPERATIONS:
        patch(os, name, watch(name, getattr(os, name)))
    try:
        yield recorder
    finally:
        recorder.close()
