"""The manifest: everything that could move a log-probability, as it was resolved.

With the reason where there was a choice.
"""

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from msgspec import MsgspecError, Struct, ValidationError, convert, json, to_builtins
from msgspec.structs import replace

import lockstep
from lockstep.config.imported import source_digest
from lockstep.config.recipe import Recipe
from lockstep.errors import LockstepError, RunError
from lockstep.metrics.catalog import METRICS, Metric
from lockstep.records.alarms import Override
from lockstep.records.messages import Ready
from lockstep.runs.checkpoints import checked, keep_newest
from lockstep.runs.durable import write_atomically
from lockstep.runs.layout import RunLayout, forget_partials
from lockstep.runs.strict import exact, plain, read_document

SCHEMA = "lockstep.manifest/2"
SHOWN = 4
"""Differences told in one error."""
VOLATILE = re.compile(r"(?:^|[._])(?:pid|instance|port|ports|path|ip|rank)(?:$|[._])", re.IGNORECASE)
"""Words in resolved names that differ from start to start and cannot move a log-probability."""
FILES = ("jsonl:", "parquet:")
"""What begins the name of a task whose questions are a file of the user's."""
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "msgspec", "reasoning-gym")


class Manifest(Struct, frozen=True, kw_only=True):
    """One run, before its first step. Nothing of it changes later but :attr:`override`."""

    schema: str = SCHEMA
    started: str = ""
    """When, in UTC; ISO 8601, so that the later of two texts is the later start. Empty: one of before this
    was kept."""
    lockstep_version: str = lockstep.__version__
    recipe: Recipe
    """The recipe as it was asked for."""
    recipe_sha256: str
    """The digest of the recipe above; a recipe that was edited here is not the run's."""
    engine_name: str
    """What ``engine.name`` and ``engine.version`` came to; ``auto`` is resolved once, here."""
    engine_version: str
    """The version of the environment; empty for an engine that needs none."""
    engine: Ready
    choices: dict[str, tuple[str, str]]
    """What Lockstep resolved: name → (value, reason)."""
    model_path: str
    model: dict[str, str]
    """SHA-256 of the weights, the model's configuration and the tokenizer that the run started from."""
    code: dict[str, str] = {}
    """Key of the recipe → SHA-256 of the source file of the user's function that it names."""
    versions: dict[str, str]
    machine: dict[str, str]
    planted: tuple[str, ...] = ()
    """Faults that were planted on purpose (``--plant``)."""
    override: Override | None = None
    """Where ``parity.override`` was needed, once the ladder has said so; the latest start's that did."""
    metrics: tuple[Metric, ...] = METRICS


def build_manifest(
    recipe: Recipe,
    engine: Ready,
    choices: dict[str, tuple[str, str]],
    model_path: Path,
    *,
    resolved: tuple[str, str],
    model: dict[str, str],
    planted: tuple[str, ...] = (),
) -> Manifest:
    """Describe this process and its engine.

    Args:
        resolved: the engine's name and environment version.
        model: digests of what is trained.
    """
    return Manifest(
        started=datetime.now(UTC).isoformat(timespec="microseconds"),
        recipe=recipe,
        recipe_sha256=_digest(recipe),
        engine_name=resolved[0],
        engine_version=resolved[1],
        engine=engine,
        choices=choices,
        model_path=str(model_path),
        model=model,
        code=_code(recipe),
        planted=planted,
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        machine={
            "system": platform.platform(),
            "processor": processor(),
            "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        },
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it whole."""
    write_atomically(path, json.format(json.encode(plain(manifest)), indent=1))


def stamp_override(path: Path, override: Override) -> None:
    """Write into a run's manifest that it trains although the ladder did not pass.

    Raises:
        RunError: as :func:`read_manifest`; when it cannot be written, it is as it was.
    """
    write_manifest(path, replace(read_manifest(path), override=override))


def read_manifest(path: Path) -> Manifest:
    """The manifest of an existing run.

    Raises:
        RunError: when it is damaged, of another schema, or its recipe was edited.
    """
    hint = "start a new run: lockstep train RECIPE"
    table = read_document(path, hint)
    if table.get("schema") != SCHEMA:
        raise RunError(f"manifest {path}", got=f"schema {table.get('schema')!r}", expected=SCHEMA, hint=hint)
    try:
        # JSON's keys are text, and a logit bias has token ids.
        manifest = convert(exact(table), Manifest, str_keys=True)
    except ValidationError as error:
        raise RunError(f"manifest {path}", got=str(error), expected="a whole manifest", hint=hint) from error
    # The schema alone takes an edited number, and the run would go on as another. Of what is stored: there, a
    # key that is younger than the run is missing.
    if manifest.recipe_sha256 != _digest(table["recipe"]):
        raise RunError(
            f"manifest {path}", got="a recipe that was edited", expected="the recipe that was run", hint=hint
        )
    return manifest


def read_recipe(path: Path) -> Recipe:
    """The recipe of an existing run, on the engine that it came to.

    Raises:
        RunError: as :func:`read_manifest`.
    """
    manifest = read_manifest(path)
    engine = replace(manifest.recipe.engine, name=manifest.engine_name, version=manifest.engine_version)
    return replace(manifest.recipe, engine=engine)


def refuse_other_run(path: Path, now: Manifest) -> None:
    """Keep a run from going on with other parts than it began with.

    Raises:
        RunError: names what differs.
    """
    then = read_manifest(path)
    changed = [
        f"{name}: {before} → {after}" for name, before, after in _differences(_parts(then), _parts(now))
    ]
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise RunError(
            f"resume of {path.parent}",
            got="; ".join(changed[:SHOWN]) + more,
            expected="the engine, versions, model and code that the run began with",
            hint="bring them back, or start a new run: lockstep train RECIPE",
        )


def _parts(manifest: Manifest) -> dict[str, Any]:
    """What must stay over all starts of a run."""
    engine = manifest.engine
    return {
        "lockstep": manifest.lockstep_version,
        "engine": f"{engine.engine} {engine.version} ({engine.generation})",
        **{f"engine.{key}": value for key, value in steady(engine.resolved).items()},
        **{f"version of {name}": version for name, version in manifest.versions.items()},
        **{f"model.{name}": digest[:12] for name, digest in manifest.model.items()},
        **{f"source file of {key}": digest[:12] for key, digest in manifest.code.items()},
        "planted faults": ", ".join(manifest.planted) or "none",
    }


def _code(recipe: Recipe) -> dict[str, str]:
    task = recipe.task
    objective = recipe.objective
    named = {
        "task.name": task.name,
        "task.reward": task.reward,
        "task.environment": task.environment,
        "task.tool_calls": task.tool_calls,
        "objective.name": objective.name,
    } | {f"task.rewards.{at}": part.function for at, part in enumerate(task.rewards)}
    # A dataset of reasoning-gym's is told by that package's version.
    return {
        key: _file_digest(n) if n.startswith(FILES) else source_digest(n)
        for key, n in named.items()
        if ":" in n and not n.startswith("reasoning_gym:")
    }


def _file_digest(name: str) -> str:
    """SHA-256 of the file that a task's questions come from; ``none`` without one."""
    file = Path(name.partition(":")[2])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    plain_then, plain_now = to_builtins(then), to_builtins(now)
    names = sorted(plain_then.keys() | plain_now.keys())
    pairs = [(name, plain_then.get(name, "nothing"), plain_now.get(name, "nothing")) for name in names]
    return [(name, before, after) for name, before, after in pairs if before != after]


def steady(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine resolved to, less what differs between starts and cannot move a log-probability."""
    return {name: value for name, value in sorted(resolved.items()) if not VOLATILE.search(name)}


def unfinished_run(recipe: Recipe, runs: Path) -> RunLayout | None:
    """The newest run under ``runs``, if it can go on; else None.

    It can if it is of this very recipe, has steps or its last checkpoint left, and nobody is at it.
    """
    starts = {path: start for path in runs.glob("*/manifest.json") if (start := _start(path)) is not None}
    if not starts:
        return None
    # A copy or a restored backup has other file times than its run: they stand in where a run says nothing.
    newest = max(starts, key=lambda path: (starts[path], path.stat().st_mtime))
    layout = RunLayout(newest.parent)
    with contextlib.suppress(LockstepError), layout.held():
        return (
            layout
            if read_manifest(layout.manifest).recipe == recipe and not finished(layout, recipe)
            else None
        )
    return None


class _Started(Struct):
    started: str = ""


def _start(manifest: Path) -> str | None:
    """When a run began; None of a manifest that cannot be read, which is no run to go on with."""
    try:
        return json.decode(manifest.read_bytes(), type=_Started).started
    except (OSError, ValueError, MsgspecError):
        return None


def finished(layout: RunLayout, recipe: Recipe) -> bool:
    """True when the checkpoint of the last step is there, as it was written: it is what a run writes last."""
    try:
        return checked(layout.checkpoint(recipe.training.steps)).step == recipe.training.steps
    except RunError:
        return False


def tidy(layout: RunLayout) -> None:
    """What a kill after the last checkpoint left: older ones, and the parts of one that was being removed."""
    forget_partials(layout)
    keep_newest(layout.checkpoints)


def _digest(recipe: Recipe | dict[str, Any]) -> str:
    return hashlib.sha256(json.encode(plain(recipe), order="sorted")).hexdigest()


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
