"""What pip chose, held against a lock: every file must be one that the lock knows.

A lock with one build of each package goes to pip as it is (``--require-hashes``). Of torch an index may offer
one build or another, each with packages of its own. There pip chooses, the choice is checked here, and pip
installs exactly that.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lockstep.errors import InstallError

PIN = re.compile(r"(?P<line>(?P<name>[\w.-]+)==(?P<version>[^\s;]+)[^\\\n]*)")
HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


class Pin(NamedTuple):
    """One version of one package, perhaps for some machines alone."""

    name: str
    version: str
    line: str
    """The requirement with its marker and without its hashes."""
    hashes: frozenset[str]
    """``sha256:<hex>`` of each file that may be taken."""


def read_lock(lock: Path) -> list[Pin]:
    """What a lock pins."""
    entries = re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8"))
    pins = [(pin, entry) for entry in entries if (pin := PIN.match(entry))]
    return [
        Pin(plain_name(p["name"]), p["version"], p["line"].strip(), frozenset(HASH.findall(entry)))
        for p, entry in pins
    ]


def constraints(lock: Path) -> str:
    """The versions alone, as pip's ``-c`` reads them."""
    return "".join(f"{pin.line}\n" for pin in read_lock(lock))


def exactly(report: Path, lock: Path) -> str:
    """Requirements with the one hash of each file that pip chose (``pip install --dry-run --report``).

    Raises:
        InstallError: for a file that the lock does not know.
    """
    known = {(pin.name, pin.version): pin.hashes for pin in read_lock(lock)}
    lines = []
    for item in msgspec.json.decode(report.read_bytes())["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        file = item["download_info"]["url"].rpartition("/")[2]
        digest = _digest(item)
        # A build's own mark (+cpu) is in no lock.
        hashes = known.get((plain_name(name), version.partition("+")[0]), frozenset())
        if digest not in hashes:
            raise InstallError(
                f"package {name} {version}",
                got=f"{file} ({digest})",
                expected=f"one of the {len(hashes)} files of {lock.name}",
                hint="does another package index stand before the usual one (pip config list)?",
            )
        lines.append(pinned(item))
    return "".join(lines)


def pinned(item: dict[str, Any]) -> str:
    """The line of a lock for one file that pip chose (an entry of its report)."""
    return f"{item['metadata']['name']}=={item['metadata']['version']} --hash={_digest(item)}\n"


def _digest(item: dict[str, Any]) -> str:
    return f"sha256:{item['download_info']['archive_info']['hashes']['sha256']}"


def plain_name(name: str) -> str:
    """A distribution's name as all of its spellings come to."""
    return re.sub(r"[-_.]+", "-", name).lower()
