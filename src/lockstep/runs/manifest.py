"""The manifest: everything that could move a log-probability, as it was resolved, with the reason where there was a choice."""

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from msgspec import Struct, json

import lockstep
from lockstep.config.recipe import Recipe
from lockstep.errors import LockstepError, RunError
from lockstep.metrics.catalog import METRICS, Metric
from lockstep.records.messages import Ready
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_lines
from lockstep.runs.write import write_atomically

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "msgspec", "reasoning-gym")


class Manifest(Struct, frozen=True, kw_only=True):
    """One run, before its first step."""

    schema: str = "lockstep.manifest/1"
    lockstep_version: str = lockstep.__version__
    recipe: Recipe
    engine: Ready
    choices: dict[str, tuple[str, str]]
    """What Lockstep resolved: name → (value, reason)."""
    model_path: str
    versions: dict[str, str]
    machine: dict[str, str]
    metrics: tuple[Metric, ...] = METRICS


def build_manifest(recipe: Recipe, engine: Ready, choices: dict[str, tuple[str, str]], model_path: Path) -> Manifest:
    """Describe this process and its engine."""
    return Manifest(
        recipe=recipe,
        engine=engine,
        choices=choices,
        model_path=str(model_path),
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        machine={
            "system": platform.platform(),
            "processor": processor(),
            "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        },
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it whole."""
    write_atomically(path, json.format(json.encode(manifest), indent=1))


def read_recipe(path: Path) -> Recipe:
    """The recipe of an existing run, as it was run.

    Raises:
        RunError: when the manifest is of another schema.
    """
    table: dict[str, Any] = json.decode(path.read_bytes())
    if table.get("schema") != "lockstep.manifest/1":
        raise RunError(
            f"manifest {path}", got=f"schema {table.get('schema')}", expected="lockstep.manifest/1", hint="upgrade lockstep"
        )
    return json.decode(json.encode(table["recipe"]), type=Recipe)


def unfinished_run(recipe: Recipe, runs: Path) -> RunLayout | None:
    """The newest run under ``runs``, if it is of this very recipe, has steps left, and nobody is at it."""
    manifests = sorted(runs.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        return None
    layout = RunLayout(manifests[-1].parent)
    steps = len(read_lines(layout.metrics))
    with contextlib.suppress(LockstepError), layout.held():
        return layout if read_recipe(layout.manifest) == recipe and steps < recipe.training.steps else None
    return None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
