"""The atlas: one battery on each of many engine versions, a file a version.

version ─► installed where it is not ─► battery ─► DIR/VERSION.json ─► removed where it was not there before
                                                     └── a version whose file is there is not run again ──┘
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.diagnose.battery import QUESTIONS, Cell, as_it_is, as_it_is_set
from lockstep.diagnose.sides import as_it_comes
from lockstep.engines.environments.install import install, remove
from lockstep.engines.environments.locate import complete
from lockstep.engines.environments.recipes import recipe_for, version_order
from lockstep.errors import LockstepError, NotInstalledError
from lockstep.faults.at_load import plants
from lockstep.loop.open import Say, open_session
from lockstep.records.verdicts import Status
from lockstep.runs.durable import make_directory, write_atomically
from lockstep.runs.strict import exact, plain

SCHEMA = "lockstep.atlas/1"


class Column(Struct, frozen=True, kw_only=True):
    """One version's answers."""

    schema: str = SCHEMA
    version: str
    """``vllm==0.18.1``, as it was asked for."""
    engine: str
    """``vllm 0.18.1 (V1)``; empty where it did not run."""
    packages: str
    """What its environment's smoke test said."""
    measured: str
    """UTC, ISO 8601."""
    tokens_per_s: float
    load_s: float
    cells: tuple[Cell, ...]
    stopped: str = ""
    """Why the battery could not be run to its end."""


def atlas(recipe: Recipe, versions: Sequence[str], out: Path, say: Say, *, keep: bool) -> Iterator[Column]:
    """Run the battery on each version that has no file yet; yields every column, in the order of versions.

    Args:
        keep: environments that were made for it stay.
    """
    make_directory(out)
    for version in sorted(versions, key=version_order):
        file = out / f"vllm-{version}.json"
        if file.exists():
            yield read_column(file)
            continue
        there = _is_installed(f"vllm=={version}")
        column = _column(recipe, version, out / f"vllm-{version}.log", say)
        write_atomically(file, msgspec.json.format(msgspec.json.encode(plain(column))) + b"\n")
        if not (there or keep):
            remove(f"vllm=={version}", say)
        yield column


def _is_installed(spec: str) -> bool:
    try:
        return complete(recipe_for(spec)) is not None
    except NotInstalledError:
        return False


def read_column(file: Path) -> Column:
    """A column as it was written."""
    return msgspec.convert(exact(msgspec.json.decode(file.read_bytes())), Column)


def _column(recipe: Recipe, version: str, log: Path, say: Say) -> Column:
    """The battery on one version; what stops it is told in the column."""
    column = Column(
        version=f"vllm=={version}",
        engine="",
        packages="",
        measured=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        tokens_per_s=float("nan"),
        load_s=float("nan"),
        cells=(),
    )
    try:
        environment = install(f"vllm=={version}", say)
        column = replace(column, packages=environment.smoke)
        say(f"atlas: {version} as it comes")
        with open_session(as_it_comes(recipe, version), log, say, plants()) as session:
            cells, side = as_it_is(session.pair)
        column = replace(
            column,
            engine=side.engine,
            tokens_per_s=side.tokens_per_s,
            load_s=side.load_s,
            cells=tuple(cells),
        )
        say(f"atlas: {version} with Lockstep's defaults")
        engine = replace(recipe.engine, name="vllm", version=version, python="", options={})
        with open_session(replace(recipe, engine=engine), log, say) as session:
            cells = [*cells, as_it_is_set(session.pair)]
    except LockstepError as error:
        say(f"atlas: {version}: {error.boundary}: {error.got}")
        return _stopped(column, f"{error.boundary}: {error.got}")
    return replace(column, cells=_in_order(cells))


def _stopped(column: Column, why: str) -> Column:
    """What was not answered is NOT_RUN, and says why."""
    answered = {cell.question for cell in column.cells}
    status: Status = "NOT_RUN"
    rest = [Cell(question=name, status=status, says=why[:400]) for name in QUESTIONS if name not in answered]
    return replace(column, cells=_in_order([*column.cells, *rest]), stopped=why[:2000])


def _in_order(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    places = list(QUESTIONS)
    return tuple(sorted(cells, key=lambda cell: places.index(cell.question)))
