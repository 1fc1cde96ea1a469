"""Which engine environments there are, and how one is run.

An environment is a virtual environment under the cache. It exists only once ``lockstep-environment.json``
lies in it, which is written last and carries the recipe's digest: a half-built one, or one of an older
recipe, is never used.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from lockstep.config.cache import cache_root
from lockstep.engines.environments.recipes import (
    EnvironmentRecipe,
    all_recipes,
    environments,
    nearest,
    recipe_for,
    refuse_machine,
)
from lockstep.errors import NotInstalledError
from lockstep.records.capabilities import Capability
from lockstep.records.environment import without_secrets

MARKER = "lockstep-environment.json"
LEAKS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD", "PYTHONDONTWRITEBYTECODE")
"""What would change what a foreign environment imports, or keep it from being compiled once."""

InstallState = Literal["installed", "incomplete", "not installed"]


class Environment(Struct, frozen=True, kw_only=True):
    """A complete environment."""

    name: str
    version: str
    generation: str
    flavour: str
    digest: str
    """The digest of the recipe that it was built from."""
    smoke: str
    """What the smoke test found."""
    mends: dict[str, str] = {}
    """What each mend of the recipe found and did."""
    capabilities: dict[str, Capability] = {}
    """What the engine said of itself in the smoke test."""
    size_bytes: int
    built: str
    """UTC, ISO 8601."""
    path: str
    interpreter: str = ""
    """The interpreter of an environment that was there before (``in_place.py``); else empty."""

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return Path(self.interpreter) if self.interpreter else Path(self.path) / "bin" / "python"

    @property
    def recipe(self) -> EnvironmentRecipe:
        """That it was built from; of one that was there before, the nearest one's facts hold."""
        if self.interpreter:
            return nearest(self.name, self.version, self.flavour)
        return recipe_for(f"{self.name}=={self.version}")

    def launch_env(self) -> dict[str, str]:
        """The environment variables to run it with.

        This process's, less secrets and what would leak in, plus the recipe's.
        """
        recipe = self.recipe
        env = without_secrets(scrubbed_env())
        env |= {key: value.format(all_cores=_all_cores()) for key, value in recipe.env.items()}
        # What the first batch compiles, kept for the next start; nowhere in an environment of others.
        own = cache_root() / "kernels" / f"{self.name}-{self.version}-{self.flavour}"
        kernels = own if self.interpreter else Path(self.path) / "kernels"
        env |= {
            "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"),
            "VLLM_CACHE_ROOT": str(kernels / "vllm"),
        }
        preload = [str(file) for name in recipe.preload if (file := Path(self.path) / name).exists()]
        return env | ({"LD_PRELOAD": ":".join(preload)} if preload else {})


def scrubbed_env() -> dict[str, str]:
    """This process's environment variables without those that would leak into another environment."""
    return {key: value for key, value in os.environ.items() if key not in LEAKS}


def path_of(recipe: EnvironmentRecipe) -> Path:
    """Where its environment lies, built or not."""
    return environments() / f"{recipe.name}-{recipe.version}-{recipe.flavour}"


def complete(recipe: EnvironmentRecipe) -> Environment | None:
    """Its environment if it was finished, from this very recipe, in this very place."""
    try:
        environment = msgspec.json.decode((path_of(recipe) / MARKER).read_bytes(), type=Environment)
    except (OSError, msgspec.DecodeError):
        return None
    same = (environment.digest, environment.path) == (recipe.digest, str(path_of(recipe)))
    return environment if same and environment.python.exists() else None


def state(recipe: EnvironmentRecipe) -> InstallState:
    """What there is of a recipe's environment."""
    if complete(recipe) is not None:
        return "installed"
    return "incomplete" if path_of(recipe).exists() else "not installed"


def installed() -> list[Environment]:
    """Every complete environment, oldest version first."""
    return [environment for recipe in all_recipes() if (environment := complete(recipe)) is not None]


def find(name: str, version: str | None) -> Environment:
    """A complete environment, the newest if no version is given.

    Raises:
        NotInstalledError: with the line that installs it.
        MachineError: when it cannot be installed, for there is no build for this machine.
    """
    recipe = recipe_for(f"{name}=={version}" if version else name)
    candidates = [e for e in installed() if e.name == name and (not version or e.version == recipe.version)]
    if not candidates:
        refuse_machine(recipe)
        partial = state(recipe) == "incomplete"
        raise NotInstalledError(
            f"engine {recipe.spec}",
            got="an environment that is not finished, or of an older recipe"
            if partial
            else "no environment of it",
            expected="an installed engine",
            hint=f"lockstep engines install {recipe.spec}   (or --engine transformers, which needs none)",
        )
    return candidates[-1]


def _all_cores() -> str:
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return ",".join(map(str, cores))
