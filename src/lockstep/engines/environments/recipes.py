"""Environment recipes: one TOML file per version range, one lock file beside it."""

import hashlib
import tomllib
from pathlib import Path

import msgspec
from msgspec import Struct

from lockstep.errors import NotInstalledError

_HERE = Path(__file__).parent


class EnvironmentRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """How one engine version is brought up."""

    name: str
    version: str
    distribution: str
    generation: str
    flavour: str
    lock: str
    python_min: tuple[int, int]
    python_max: tuple[int, int]
    systems: tuple[str, ...]
    machines: tuple[str, ...]
    disk_gb: float
    first: tuple[str, ...]
    left_out: dict[str, str]
    system_needs: dict[str, str]
    env: dict[str, str]
    facts: dict[str, str]

    @property
    def spec(self) -> str:
        """``vllm==0.32.0``."""
        return f"{self.name}=={self.version}"

    @property
    def lock_path(self) -> Path:
        """The exact closure, in pip's requirements format."""
        return _HERE / self.lock

    @property
    def digest(self) -> str:
        """Changes with what is installed; an environment of another digest is not this recipe's."""
        parts = (self.spec, self.flavour, *self.first, self.lock_path.read_text(encoding="utf-8"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_recipe(path: Path) -> EnvironmentRecipe:
    """Read one data file, strictly."""
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), EnvironmentRecipe)


def all_recipes(directory: Path = _HERE) -> list[EnvironmentRecipe]:
    """Every recipe, oldest version first."""
    recipes = [read_recipe(path) for path in directory.glob("*.toml")]
    return sorted(recipes, key=lambda recipe: (recipe.name, [int(part) for part in recipe.version.split(".")]))


def recipe_for(spec: str) -> EnvironmentRecipe:
    """The recipe of ``vllm==0.32.0``, or of the newest ``vllm``.

    Raises:
        NotInstalledError: when no recipe covers it; the known ones are named.
    """
    name, _, version = spec.partition("==")
    found = [r for r in all_recipes() if r.name == name and version in ("", r.version)]
    if not found:
        known = ", ".join(recipe.spec for recipe in all_recipes())
        raise NotInstalledError(f"engine {spec}", got="no recipe for it", expected=known, hint=f"lockstep engines install {all_recipes()[-1].spec}")
    return found[-1]
