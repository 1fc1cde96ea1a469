"""Build an engine environment: once, from its recipe, going on where an interrupted build stopped.

    lock ─► virtual environment ─► pip, step by step ─► smoke test ─► marker (atomic rename)
              └── finished steps are noted in lockstep-build.json, under the recipe's digest ──┘

pip inherits the lock: when only this process is killed, pip ends its step and the next installer waits for
it. When pip is killed too, the step is run again, and what pip had not finished unpacking is installed anew.
"""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from lockstep.config.cache import locked
from lockstep.engines.environments.hashes import constraints, exactly
from lockstep.engines.environments.locate import MARKER, Environment, complete, path_of, scrubbed_env
from lockstep.engines.environments.mends import MENDS
from lockstep.engines.environments.recipes import (
    EnvironmentRecipe,
    PipCall,
    forget_recipe,
    recipe_for,
    refuse_machine,
)
from lockstep.engines.environments.resolve import is_of_a_series, resolve
from lockstep.engines.environments.smoke import drives, smoke_test
from lockstep.errors import InstallError, NotInstalledError

BUILD_NOTES = "lockstep-build.json"
SAY_EVERY_S = 8.0
POLL_S = 0.25
TAIL_LINES = 15
PIP_VERBS = re.compile(r"^\s*(Collecting|Downloading|Processing|Installing collected packages)\W+(\S+)", re.M)
# Not compiled: the environment has ten times the modules that an engine imports, which are compiled on use.
PIP = (
    "-m",
    "pip",
    "--disable-pip-version-check",
    "--no-input",
    "install",
    "--no-compile",
    "--progress-bar",
    "off",
)
# A source distribution runs code of its own while it is built, so nothing is built.
WHEELS = ("--only-binary", ":all:")
LOCKED = (*WHEELS, "--no-deps", "--require-hashes", "-r")
Say = Callable[[str], None]


def install(spec: str, say: Say, lock_file: Path | None = None) -> Environment:
    """Build an environment, or go on building it, or return it if it is complete.

    Args:
        spec: ``vllm==0.32.0``, or ``vllm`` for the newest recipe; a version without one is resolved first.
        say: told of each step, and every few seconds what pip is at.
        lock_file: the closure of a version that comes without a lock, in place of one resolved here.

    Raises:
        NotInstalledError: for what is no version of an engine that is known.
        MachineError: when there is no build for this machine.
        InstallError: when the machine lacks something, or a step fails; the end of its output is shown.
    """
    recipe = _recipe_of(spec, say, lock_file)
    refuse_machine(recipe)
    _refuse_python(recipe)
    path = path_of(recipe)
    with locked(path.with_name(f"{path.name}.lock"), say) as lock:
        environment = complete(recipe)
        if environment is not None:
            say(f"{recipe.spec} is installed: {path}")
            return environment
        _refuse_system(recipe, path)
        began = time.perf_counter()
        environment = _Build(recipe, lock, say).run()
        say(
            f"{recipe.spec} is installed: "
            f"{environment.size_bytes / 1e9:.1f} GB in {time.perf_counter() - began:.0f} s"
        )
        return environment


def _recipe_of(spec: str, say: Say, lock_file: Path | None) -> EnvironmentRecipe:
    if lock_file is not None:
        return resolve(spec, say, lock_file)
    try:
        return recipe_for(spec)
    except NotInstalledError:
        if not is_of_a_series(spec):
            raise
        return resolve(spec, say)


def remove(spec: str, say: Say) -> None:
    """Delete an environment, complete or not, and what was resolved for it."""
    recipe = recipe_for(spec)
    path = path_of(recipe)
    with locked(path.with_name(f"{path.name}.lock"), say):
        # First, so that a deletion that is interrupted leaves nothing usable.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        forget_recipe(recipe)
        say(f"{recipe.spec} is removed")


class _Build:
    """One build of one environment. The lock is held."""

    def __init__(self, recipe: EnvironmentRecipe, lock: int, say: Say) -> None:
        self.recipe = recipe
        self.lock = lock
        self.say = say
        self.path = path_of(recipe)
        self.log = self.path.with_name(f"{self.path.name}.log")
        self.python = self.path / "bin" / "python"
        self.n_steps = len(recipe.steps) + 2

    def run(self) -> Environment:
        """Every step that is not done yet, then the smoke test, then the marker."""
        (self.path / MARKER).unlink(missing_ok=True)
        done = self._done()
        if not done:  # nothing, or another recipe's, which ``--clear`` takes away
            self.log.unlink(missing_ok=True)
            self._step(1, "virtual environment", [sys.executable, "-m", "venv", "--clear", str(self.path)])
            self._note(done := ["venv"])
        _forget_unfinished(self.path)
        for number, step in enumerate(self.recipe.steps, 2):
            if step.title in done:
                self.say(f"{self._title(number, step.title)}: done before")
                continue
            self._pip(number, step)
            self._note(done := [*done, step.title])
        mends = {name: MENDS[name](self.path) for name in self.recipe.mends}
        imported = self._step(self.n_steps, "smoke test", [str(self.python), "-c", self.recipe.smoke])
        # The last line is the test's own: what it imports may print before.
        environment = self._environment(imported.strip().splitlines()[-1], mends)
        if drives(environment):
            self.say(f"{self._title(self.n_steps, 'smoke test')}: a tiny model, sampled and scored")
            said, capabilities = smoke_test(environment, self.log)
            environment = replace(
                environment, smoke=f"{environment.smoke}, {said}", capabilities=capabilities
            )
        _write_whole(self.path / MARKER, environment)
        return environment

    def _pip(self, number: int, step: PipCall) -> None:
        command = [str(self.python), *PIP]
        lock = step.path
        if step.requirements:
            bounds, report, lock = (
                self.path / f"lockstep-{name}" for name in ("bounds.txt", "report.json", "chosen.txt")
            )
            bounds.write_text(constraints(step.path))
            chosen = ("--dry-run", "--ignore-installed", "--report", str(report), "-c", str(bounds))
            self._step(
                number, f"{step.title}: choosing the files", [*command, *WHEELS, *chosen, *step.requirements]
            )
            lock.write_text(exactly(report, step.path))
        self._step(number, step.title, [*command, *LOCKED, str(lock)])

    def _environment(self, smoke: str, mends: dict[str, str]) -> Environment:
        return Environment(
            name=self.recipe.name,
            version=self.recipe.version,
            generation=self.recipe.generation,
            flavour=self.recipe.flavour,
            digest=self.recipe.digest,
            smoke=smoke,
            mends=mends,
            size_bytes=_size_bytes(self.path),
            built=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            path=str(self.path),
        )

    def _done(self) -> list[str]:
        try:
            notes = msgspec.json.decode((self.path / BUILD_NOTES).read_bytes(), type=dict[str, list[str]])
        except (OSError, msgspec.DecodeError):
            return []
        return notes.get(self.recipe.digest, [])

    def _note(self, done: list[str]) -> None:
        _write_whole(self.path / BUILD_NOTES, {self.recipe.digest: done})

    def _title(self, number: int, title: str) -> str:
        return f"{self.recipe.spec} step {number} of {self.n_steps}, {title}"

    def _step(self, number: int, title: str, command: list[str]) -> str:
        """Run one command, its output into the log, telling what it is at; returns the output."""
        title = self._title(number, title)
        self.say(title)
        began = said = time.perf_counter()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            start = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=scrubbed_env(),
                pass_fds=(self.lock,),
            )
            try:
                while process.poll() is None:
                    time.sleep(POLL_S)
                    if time.perf_counter() - said >= SAY_EVERY_S:
                        said = time.perf_counter()
                        self.say(
                            f"{title}: "
                            f"{_activity(_read_from(self.log, start), self.path)} ({said - began:.0f} s)"
                        )
            except BaseException:
                process.terminate()
                process.wait()
                raise
        output = _read_from(self.log, start)
        if process.returncode != 0:
            shown = [line for line in output.splitlines() if not line.startswith("WARNING")][-TAIL_LINES:]
            raise InstallError(
                title,
                got=f"exit status {process.returncode}",
                expected="0",
                hint=f"run it again, it goes on from here; the log is {self.log}, and ends:\n\n"
                + "\n".join(shown),
            )
        return output


def _activity(output: str, path: Path) -> str:
    """What pip is at, in a few words, from what it wrote and what it unpacked."""
    verbs = PIP_VERBS.findall(output)
    if not verbs:
        return "working"
    verb, what = verbs[-1]
    if verb != "Installing collected packages":
        return f"{verb.lower()} {_package(Path(what).name)}"
    unpacked = sorted(
        path.glob("lib/python*/site-packages/*.dist-info"), key=lambda entry: entry.stat().st_mtime
    )
    last = f", last {_package(unpacked[-1].name)}" if unpacked else ""
    return f"unpacking, {len(unpacked)} packages so far{last}"


def _package(file_name: str) -> str:
    return re.split("[-=<>]", file_name)[0]


def _forget_unfinished(path: Path) -> None:
    """Make pip install again what it was killed in the middle of.

    It writes INSTALLER after a package's own files.
    """
    for entry in path.glob("lib/python*/site-packages/*.dist-info"):
        if not (entry / "INSTALLER").exists():
            shutil.rmtree(entry)


def _read_from(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _write_whole(path: Path, content: object) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(msgspec.json.encode(content))
    os.replace(partial, path)


def _size_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _refuse_python(recipe: EnvironmentRecipe) -> None:
    if not recipe.python_min <= sys.version_info[:2] <= recipe.python_max:
        raise InstallError(
            f"engine {recipe.spec}",
            got=f"Python {platform.python_version()}",
            expected=(
                f"Python {'.'.join(map(str, recipe.python_min))} to {'.'.join(map(str, recipe.python_max))}"
            ),
            hint=(
                "install lockstep into such a Python, or use --engine transformers, "
                "which needs no environment"
            ),
        )


def _has(need: str) -> bool:
    """A program on the path, or a library that the loader finds."""
    if ".so" not in need:
        return shutil.which(need) is not None
    try:
        ctypes.CDLL(need)
    except OSError:
        return False
    return True


def _refuse_system(recipe: EnvironmentRecipe, path: Path) -> None:
    boundary = f"engine {recipe.spec}"
    for need, package in recipe.system_needs.items():
        if not _has(need):
            raise InstallError(
                boundary,
                got=f"no {need} here",
                expected=package,
                hint=f"apt-get install {package.split()[2]}",
            )
    if importlib.util.find_spec("ensurepip") is None:
        wanted = "a Python that can make virtual environments (the package python3-venv)"
        raise InstallError(
            boundary, got="no ensurepip here", expected=wanted, hint="apt-get install python3-venv"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free / 1e9
    needed = recipe.disk_gb - _size_bytes(path) / 1e9  # a build that goes on has part of it already
    if free < needed:
        hint = "make room, or set LOCKSTEP_CACHE to another disk"
        got = f"{free:.1f} GB free under {path.parent}"
        raise InstallError(boundary, got=got, expected=f"{needed:.1f} GB", hint=hint)
