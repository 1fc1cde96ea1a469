"""Build, find and list engine environments.

An environment is a virtual environment under the cache. It exists only once ``lockstep-environment.json`` lies in it, which is
written last and carries the recipe's digest: a half-built one, or one of an older recipe, is never used. A build that was
interrupted goes on where it was, for pip keeps what is already installed.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from lockstep.config.cache import cache_root, locked
from lockstep.engines.environments.recipes import EnvironmentRecipe, all_recipes, recipe_for
from lockstep.errors import InstallError, NotInstalledError

MARKER = "lockstep-environment.json"
SAY_EVERY_S = 10.0
SMOKE = "import importlib.metadata as m, torch, vllm, vllm._C; print(vllm.__version__, torch.__version__)"
DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD")
Say = Callable[[str], None]


class Environment(Struct, frozen=True, kw_only=True):
    """A complete environment."""

    name: str
    version: str
    generation: str
    flavour: str
    digest: str
    smoke: str
    """What the smoke test printed."""
    size_bytes: int
    built: str
    path: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return Path(self.path) / "bin" / "python"

    def launch_env(self) -> dict[str, str]:
        """The environment variables to run it with: this process's, less what would leak in, plus the recipe's."""
        env = {key: value for key, value in os.environ.items() if key not in DROPPED}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        recipe = recipe_for(f"{self.name}=={self.version}")
        values = {key: value.format(all_cores=",".join(map(str, cores))) for key, value in recipe.env.items()}
        kernels = Path(self.path) / "kernels"  # what the first batch compiles, kept for the next start
        return env | values | {"TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"), "VLLM_CACHE_ROOT": str(kernels / "vllm")}


def installed() -> list[Environment]:
    """Every complete environment."""
    return [environment for recipe in all_recipes() if (environment := _complete(recipe)) is not None]


def find(name: str, version: str | None) -> Environment:
    """A complete environment, the newest if no version is given.

    Raises:
        NotInstalledError: with the line that installs it.
    """
    recipe = recipe_for(f"{name}=={version}" if version else name)
    candidates = [e for e in installed() if e.name == name and version in (None, e.version)]
    if not candidates:
        partial = _path(recipe).exists()
        raise NotInstalledError(
            f"engine {recipe.spec}",
            got="an environment that was not finished" if partial else "no environment of it",
            expected="an installed engine",
            hint=f"lockstep engines install {recipe.spec}   (or --engine transformers, which needs none)",
        )
    return candidates[-1]


def install(spec: str, say: Say) -> Environment:
    """Build an environment, or go on building it, or return it if it is complete.

    Args:
        spec: ``vllm==0.32.0``, or ``vllm`` for the newest recipe.
        say: told of each step, and every few seconds what pip is at.

    Raises:
        NotInstalledError: when no recipe covers it, or there is no build for this machine.
        InstallError: when a step fails; the end of its output is shown.
    """
    recipe = recipe_for(spec)
    _refuse_machine(recipe)
    path = _path(recipe)
    with locked(path.with_suffix(".lock"), say):
        complete = _complete(recipe)
        if complete is not None:
            say(f"{recipe.spec} is installed ({path})")
            return complete
        _refuse_system(recipe, path)
        began = time.perf_counter()
        (path / MARKER).unlink(missing_ok=True)
        log = path.with_suffix(".log")
        pip = [str(path / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--progress-bar", "off"]
        steps = [
            ("virtual environment", [sys.executable, "-m", "venv", str(path)]),
            (" ".join(recipe.first), [*pip, *recipe.first]),
            (f"{recipe.distribution} and its closure", [*pip, "--no-deps", "-r", str(recipe.lock_path)]),
            ("smoke test", [str(path / "bin" / "python"), "-c", SMOKE]),
        ]
        output = ""
        for number, (title, command) in enumerate(steps, 1):
            output = _run(f"{recipe.spec} {number}/{len(steps)} {title}", command, log, say)
        environment = Environment(
            name=recipe.name,
            version=recipe.version,
            generation=recipe.generation,
            flavour=recipe.flavour,
            digest=recipe.digest,
            smoke=output.strip().splitlines()[-1],
            size_bytes=sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()),
            built=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            path=str(path),
        )
        partial = path / f".{MARKER}"
        partial.write_bytes(msgspec.json.encode(environment))
        os.replace(partial, path / MARKER)
        say(f"{recipe.spec} is installed, {environment.size_bytes / 1e9:.1f} GB, {time.perf_counter() - began:.0f} s")
        return environment


def _path(recipe: EnvironmentRecipe) -> Path:
    return cache_root() / "engines" / f"{recipe.name}-{recipe.version}-{recipe.flavour}"


def _complete(recipe: EnvironmentRecipe) -> Environment | None:
    try:
        environment = msgspec.json.decode((_path(recipe) / MARKER).read_bytes(), type=Environment)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
    usable = environment.digest == recipe.digest and environment.path == str(_path(recipe)) and environment.python.exists()
    return environment if usable else None


def _refuse_machine(recipe: EnvironmentRecipe) -> None:
    system, machine = platform.system(), platform.machine()
    if system not in recipe.systems or machine not in recipe.machines:
        raise NotInstalledError(
            f"engine {recipe.spec}",
            got=f"{system} on {machine}",
            expected=f"{' or '.join(recipe.systems)} on {' or '.join(recipe.machines)}: there is no build for others",
            hint="lockstep train RECIPE --engine transformers",
        )
    if not recipe.python_min <= sys.version_info[:2] <= recipe.python_max:
        wanted = f"Python {'.'.join(map(str, recipe.python_min))} to {'.'.join(map(str, recipe.python_max))}"
        raise InstallError(f"engine {recipe.spec}", got=f"Python {platform.python_version()}", expected=wanted, hint="use such a Python")


def _refuse_system(recipe: EnvironmentRecipe, path: Path) -> None:
    for tool, package in recipe.system_needs.items():
        if shutil.which(tool) is None:
            raise InstallError(f"engine {recipe.spec}", got=f"no {tool} on this machine", expected=package, hint=f"apt-get install {tool}")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free / 1e9
    if free < recipe.disk_gb:
        raise InstallError(
            f"engine {recipe.spec}",
            got=f"{free:.1f} GB free under {path.parent}",
            expected=f"{recipe.disk_gb:g} GB",
            hint="make room, or set LOCKSTEP_CACHE to another disk",
        )


def _run(title: str, command: list[str], log: Path, say: Say) -> str:
    """Run one step; its output goes to the log, and its last line to ``say`` every few seconds."""
    say(title)
    began = last = time.perf_counter()
    lines: list[str] = []
    env = {key: value for key, value in os.environ.items() if key not in DROPPED}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            now = time.perf_counter()
            if now - last >= SAY_EVERY_S and line.split() and line.split()[0] in ("Collecting", "Downloading", "Installing", "Using"):
                say(f"{title}: {' '.join(line.split()[:2])[:60]} ({now - began:.0f} s)")
                last = now
    if process.wait() != 0:
        shown = "".join(line for line in lines[-25:] if not line.startswith("WARNING"))[-2000:]
        raise InstallError(title, got=f"exit status {process.returncode}", expected="0", hint=f"the log is {log}, and ends:\n\n{shown}")
    return "".join(lines)
