"""What some environments need beyond packages, done inside that one alone and told by ``engines describe``.

A mend is a function from the environment's directory to one sentence about what it found and did. It is safe
to run again.
"""

import ctypes
import ctypes.util
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lockstep.errors import InstallError

WANTED, GIVEN = "GLIBCXX_3.4.32", "GLIBCXX_3.4.29"
INITIALISER = "_ZSt21ios_base_library_initv"
SHT_GNU_VERNEED = 0x6FFFFFFE


def libstdcxx(environment: Path) -> str:
    """Let vLLM's compiled core load where libstdc++ is older than 3.4.32, as on Debian 12.

    The one symbol that it needs from that version is an empty initialiser of iostreams, which older libraries
    run from every object file instead. The version is lowered in the file, and a library that defines the
    symbol is preloaded.
    """
    if hasattr(ctypes.CDLL("libstdc++.so.6"), INITIALISER):
        return f"nothing: this system's libstdc++ has {WANTED}"
    cores = sorted(environment.glob("lib/python*/site-packages/vllm/_C*.so"))
    asking = [core for core in cores if WANTED.encode() in core.read_bytes()]
    stand_in = environment / "lib" / "liblockstep_libstdcxx.so"
    if not asking and not stand_in.exists():
        return f"nothing: no compiled core here asks for {WANTED}"
    for core in asking:
        _replace(core, lower_version(core.read_bytes(), WANTED, GIVEN))
    _compile(stand_in, f'extern "C" void {INITIALISER}() {{}}')
    return (
        f"this system's libstdc++ is older than {WANTED}, which vllm/_C asks for: it asks for {GIVEN} now, "
        f"and lib/liblockstep_libstdcxx.so gives it the one symbol that is missing ({INITIALISER}, empty)"
    )


def tcmalloc(environment: Path) -> str:
    """Give ``LD_PRELOAD`` the libtcmalloc vLLM 0.18 will not start without (``cpu_worker.init_device``).

    An allocator: without it the engine is slower at most. Where there is none, an empty library stands in.
    """
    target = environment / "lib" / "libtcmalloc.so"
    target.unlink(missing_ok=True)
    library = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    if library is None:
        _compile(target, "")
        return (
            "this system has no libtcmalloc, "
            "so an empty library stands in for it (apt-get install libtcmalloc-minimal4)"
        )
    target.symlink_to(_path_of_loaded(library))
    return f"nothing: this system has {library}"


MENDS: dict[str, Callable[[Path], str]] = {"libstdcxx": libstdcxx, "tcmalloc": tcmalloc}


def lower_version(elf: bytes, wanted: str, given: str) -> bytes:
    """An ELF file (64 bit, little-endian) that asks for symbol version ``given`` instead of ``wanted``.

    A requirement is a name in the string table and its hash in the version table; both names are of one
    length.

    Raises:
        ValueError: for another kind of file, or names of two lengths.
    """
    if elf[:6] != b"\x7fELF\x02\x01" or len(wanted) != len(given):
        raise ValueError("not a 64-bit little-endian ELF file, or version names of two lengths")
    out = bytearray(elf)
    for at, name_at in _needed_versions(elf):
        end = elf.index(b"\0", name_at)
        if elf[name_at:end] == wanted.encode():
            struct.pack_into("<I", out, at, _elf_hash(given))
            out[name_at:end] = given.encode()
    return bytes(out)


class _Needed(NamedTuple):
    """Where a symbol version that is asked for lies, in bytes."""

    entry: int
    """Whose first field is the name's hash."""
    name: int


def _needed_versions(elf: bytes) -> Iterator[_Needed]:
    # e_shoff, e_shentsize and e_shnum; of a section 1 is its type, 4 where it lies, 6 which strings it names.
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    for section in sections:
        if section[1] != SHT_GNU_VERNEED:
            continue
        strings = sections[section[6]][4]
        need = section[4]
        more = 1
        while more:
            # Elf64_Verneed, one for each library; below it an Elf64_Vernaux for each of its versions.
            _, entries, _, first, more = struct.unpack_from("<HHIII", elf, need)
            entry = need + first
            for _ in range(entries):
                _, _, _, name, step = struct.unpack_from("<IHHII", elf, entry)
                yield _Needed(entry, strings + name)
                entry += step
            need += more


def _elf_hash(name: str) -> int:
    """System V's hash of a symbol's name."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high
    return value


def _path_of_loaded(library: str) -> Path:
    ctypes.CDLL(library)
    maps = Path("/proc/self/maps").read_text().splitlines()
    return next(
        Path(line.split(maxsplit=5)[5])
        for line in maps
        if line.endswith(os.path.basename(library)) or f"/{library}" in line
    )


def _compile(target: Path, source: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch) / "shim.cpp"
        built = Path(scratch) / target.name
        file.write_text(source)
        done = subprocess.run(["g++", "-shared", "-fPIC", "-o", built, file], capture_output=True, text=True)
        if done.returncode:
            raise InstallError(
                f"g++, {target.name}",
                got=done.stderr[-500:],
                expected="a shared library",
                hint="apt-get install g++",
            )
        os.replace(built, target)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.chmod(path.stat().st_mode)
    os.replace(partial, path)
