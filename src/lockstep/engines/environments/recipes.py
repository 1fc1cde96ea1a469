"""Environment recipes: a data file for a version, and a lock file with the exact closure.

Those that come with Lockstep lie beside this file (TOML). Those of other versions are resolved on a machine
(``resolve.py``), and lie beside its environments (JSON); from then on they are alike.
"""

import contextlib
import hashlib
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from lockstep.config.cache import cache_root
from lockstep.errors import MachineError, NotInstalledError

RECIPES = Path(__file__).parent
DRIVER = Path("/proc/driver/nvidia/version")
RESOLVED = ".recipe.json"
Flavour = Literal["cpu", "cuda"]


class PipCall(Struct, frozen=True, forbid_unknown_fields=True):
    """One call of pip, from wheels alone and with the hash of each.

    A lock by itself is installed as it is. With requirements, pip resolves those, and may choose only files
    that the lock has.
    """

    title: str
    lock: str
    requirements: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the lock lies."""
        own = RECIPES / self.lock
        return own if own.exists() else environments() / self.lock

    @property
    def content(self) -> list[str]:
        """What it installs: the requirements, or the lock's versions.

        Neither comments nor hashes count: they say that files are those versions' own, and an environment
        that has them stays.
        """
        lines = [] if self.requirements else self.path.read_text(encoding="utf-8").splitlines()
        pins = [line.removesuffix("\\").strip() for line in lines if not line.startswith(("#", " "))]
        return [*self.requirements, *filter(None, pins)]


class EnvironmentRecipe(Struct, frozen=True, forbid_unknown_fields=True):
    """How the engine of one version range is brought up."""

    name: str
    series: str
    """The versions that the facts and the adapter hold for; ``vllm==<series>`` means ``version``."""
    version: str
    """The one that is installed."""
    generation: str
    flavour: Flavour
    python_min: tuple[int, int]
    python_max: tuple[int, int]
    systems: tuple[str, ...]
    machines: tuple[str, ...]
    disk_gb: float
    smoke: str
    """Python that imports the engine and prints its versions."""
    steps: tuple[PipCall, ...]
    left_out: dict[str, str]
    """Package → why it is not installed although the engine declares it."""
    system_needs: dict[str, str]
    """Program or shared library → the system package that brings it: ``the package NAME``, and why."""
    env: dict[str, str]
    """Variables to run with; ``{all_cores}`` becomes the cores of this process, comma-separated."""
    facts: dict[str, str]
    preload: tuple[str, ...] = ()
    """Libraries for ``LD_PRELOAD``, relative to the environment; those that are not there are left out."""
    mends: tuple[str, ...] = ()
    """What is done to the environment after its packages are in (``mends.py``)."""
    checkpoint_form: Literal["current", "transformers-4"] = "current"
    """``transformers-4``: its config reader knows only transformers 4's keys (``vllm/older_form.py``)."""

    @property
    def spec(self) -> str:
        """``vllm==0.32.0``."""
        return f"{self.name}=={self.version}"

    @property
    def digest(self) -> str:
        """Changes with what is installed; an environment of another digest is not this recipe's."""
        content = [self.spec, self.flavour, *(step.content for step in self.steps), *self.mends]
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def environments() -> Path:
    """Where this machine's environments lie, and what was resolved for them."""
    return cache_root() / "engines"


def keep_recipe(recipe: EnvironmentRecipe, lock: str) -> None:
    """Write what was resolved for a version: its lock, then its recipe."""
    folder = environments()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{recipe.name}-{recipe.version}-{recipe.flavour}"
    recipe_text = msgspec.json.format(msgspec.json.encode(recipe))
    for name, content in ((recipe.steps[0].lock, lock.encode()), (f"{stem}{RESOLVED}", recipe_text)):
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)


def forget_recipe(recipe: EnvironmentRecipe) -> None:
    """Remove what was resolved for a version; of one that comes with Lockstep, nothing."""
    stem = f"{recipe.name}-{recipe.version}-{recipe.flavour}"
    for name in (f"{stem}{RESOLVED}", *(step.lock for step in recipe.steps)):
        (environments() / name).unlink(missing_ok=True)


def read_recipe(path: Path) -> EnvironmentRecipe:
    """Read one data file, strictly."""
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), EnvironmentRecipe)


def machine_flavour() -> Flavour:
    """``cuda`` where there is an NVIDIA driver, else ``cpu``."""
    return "cuda" if DRIVER.exists() else "cpu"


def all_recipes() -> list[EnvironmentRecipe]:
    """Every recipe of this machine's flavour, oldest version first; those resolved here too."""
    every = (*map(read_recipe, RECIPES.glob("*.toml")), *_resolved())
    recipes = [recipe for recipe in every if recipe.flavour == machine_flavour()]
    return sorted(recipes, key=lambda recipe: (recipe.name, version_order(recipe.version)))


def _resolved() -> Iterator[EnvironmentRecipe]:
    for path in environments().glob(f"*{RESOLVED}"):
        # One of another release of Lockstep, with other fields, is resolved again when it is installed again.
        with contextlib.suppress(msgspec.MsgspecError):
            yield msgspec.json.decode(path.read_bytes(), type=EnvironmentRecipe)


def refuse_machine(recipe: EnvironmentRecipe) -> None:
    """Nothing where there is a build of the engine for this machine.

    Raises:
        MachineError: where there is none, which nothing that is installed can change.
    """
    system, machine = platform.system(), platform.machine()
    if system not in recipe.systems or machine not in recipe.machines:
        raise MachineError(
            f"engine {recipe.spec}",
            got=f"{system} on {machine}",
            expected=(
                f"{' or '.join(recipe.systems)} on {' or '.join(recipe.machines)}: "
                "there is no build for others"
            ),
            hint="lockstep train RECIPE --engine transformers",
        )


def version_order(version: str) -> tuple[int, ...]:
    """A key that sorts versions: the numbers in ``0.8.5.post2``."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def nearest(name: str, version: str, flavour: str) -> EnvironmentRecipe:
    """The recipe of the newest version that is no newer; of the oldest where all are newer."""
    own = [read_recipe(path) for path in RECIPES.glob("*.toml")]
    known = sorted(
        (recipe for recipe in own if (recipe.name, recipe.flavour) == (name, flavour)),
        key=lambda recipe: version_order(recipe.version),
    )
    older = [recipe for recipe in known if version_order(recipe.version) <= version_order(version)]
    return older[-1] if older else known[0]


def recipe_for(spec: str) -> EnvironmentRecipe:
    """The recipe of ``vllm==0.32.0`` or ``vllm==0.32``, or of the newest ``vllm``.

    Raises:
        NotInstalledError: when no recipe covers it; the known ones are named.
    """
    name, _, version = spec.partition("==")
    known = all_recipes()
    matching = [
        recipe for recipe in known if recipe.name == name and version in ("", recipe.version, recipe.series)
    ]
    if not matching:
        raise NotInstalledError(
            f"engine {spec}",
            got="no recipe for it",
            expected=" or ".join(recipe.spec for recipe in known) + ", or another that is installed first",
            hint=f"lockstep engines install {known[-1].spec}   (or --engine transformers, which needs none)",
        )
    return matching[-1]
