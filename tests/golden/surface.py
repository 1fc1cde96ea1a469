"""What others build on, as sorted lines.

``python -m tests.golden.surface`` writes them to the files beside this one.

Each file is a promise. A line that goes, or that changes, breaks somebody's recipe, script or reader; a line
that comes is a new promise. ``test_golden.py`` compares; to change a promise, run the command and have the
difference reviewed.
"""

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).parent


def recipe_keys() -> list[str]:
    """``section.key: type = default``: a recipe says all of a run, so a changed default is another run."""
    from lockstep.config.recipe import Recipe

    return sorted(_keys(Recipe))


def _keys(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        section = next((part for part in _parts(field.type) if _is_struct(part)), None)
        if section is not None:
            yield from _keys(section, f"{prefix}{field.encode_name}.")
            continue
        if field.default_factory is not msgspec.NODEFAULT:
            default = repr(field.default_factory())
        else:
            default = "required" if field.default is msgspec.NODEFAULT else repr(field.default)
        yield f"{prefix}{field.encode_name}: {_named(field.type)} = {default}"


def metric_names() -> list[str]:
    """``name [unit]  system:alias`` of aliases that are exported; in brackets: under some recipes alone."""
    from lockstep.metrics.aliases import ALIASES
    from lockstep.metrics.catalog import METRICS

    also = {
        m.name: sorted(
            f"({a.system}:{a.name})" if a.only else f"{a.system}:{a.name}"
            for a in ALIASES
            if a.ours == m.name and not a.differs
        )
        for m in METRICS
    }
    return sorted(
        f"{m.name} [{m.unit}]" + (f"  also {', '.join(also[m.name])}" if also[m.name] else "")
        for m in METRICS
    )


def cli() -> list[str]:
    """``verb --option``; what takes no value, may come several times, must be given or is hidden says so."""
    import typer

    from lockstep.cli.main import app

    return sorted(_options(typer.main.get_command(app), "lockstep"))


def _options(command: Any, name: str) -> Iterator[str]:
    for verb, below in getattr(command, "commands", {}).items():
        yield from _options(below, f"{name} {verb}")
    yield name
    for parameter in command.params:
        argument = type(parameter).__name__ == "TyperArgument"
        said = (
            parameter.opts[0].upper() if argument else "/".join([*parameter.opts, *parameter.secondary_opts])
        )
        notes = {
            "flag": getattr(parameter, "is_flag", False),
            "several": parameter.multiple,
            "required": parameter.required,
            "hidden": parameter.hidden,
        }
        yield " ".join([name, said, *(f"({note})" for note, holds in notes.items() if holds)])


def record_schemas() -> list[str]:
    """``schema  path: type`` of every file that is read back; a file without a schema by its name.

    Of a run, and of upgrade and atlas, whose verbs print what they write: an atlas's file is one of
    ``columns``, with the schema.
    """
    from lockstep.diagnose import atlas, upgrade
    from lockstep.loop import flights, in_flight
    from lockstep.records import alarms
    from lockstep.records.verdicts import Verdict
    from lockstep.rollout import ledger
    from lockstep.runs import certificate, checkpoints, manifest, rollouts
    from lockstep.runs.sinks import base, jsonl

    files: dict[str, type[msgspec.Struct]] = {
        manifest.SCHEMA: manifest.Manifest,
        certificate.SCHEMA: certificate.Certificate,
        jsonl.SCHEMA_METRICS: base.StepRecord,
        jsonl.SCHEMA_VERDICT: Verdict,
        jsonl.SCHEMA_ALARM: alarms.Alarm,
        in_flight.SCHEMA_LEDGER: ledger.Ledger,
        rollouts.SCHEMA_ROLLOUTS: rollouts.About,
        flights.SCHEDULE: ledger.State,
        checkpoints.STATE: checkpoints.CheckpointState,
    }
    lines = [f"{schema}  {line}" for schema, struct in files.items() for line in _fields(struct)]
    of_lines = (jsonl.SCHEMA_METRICS, jsonl.SCHEMA_VERDICT, jsonl.SCHEMA_ALARM, in_flight.SCHEMA_LEDGER)
    lines += [f"{schema}  schema: str" for schema in of_lines]
    lines += [f"{jsonl.SCHEMA_VERDICT}  {name}: str" for name in ("when", "override")]
    lines += [f"{in_flight.SCHEMA_LEDGER}  {name}: int" for name in ("step", "open_groups")]
    documents = (
        (atlas.SCHEMA, "columns[].", atlas.Column),
        ("lockstep.upgrade/1", "upgrade.", upgrade.Upgrade),
    )
    lines += [f"{schema}  {line}" for schema, prefix, struct in documents for line in _fields(struct, prefix)]
    lines += [
        f"{rollouts.SCHEMA_ROLLOUTS}  column {field.name}: {field.type}" for field in rollouts.columns()
    ]
    return sorted(lines)


def _fields(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        name = f"{prefix}{field.encode_name}"
        yield f"{name}: {_named(field.type)}"
        for part in _parts(field.type):
            if _is_struct(part) and part.__name__ != "Recipe":  # its keys are in a file of their own
                yield from _fields(part, f"{name}.")


def _parts(kind: Any) -> Iterator[Any]:
    """The type and all types within it."""
    yield kind
    for part in typing.get_args(kind):
        yield from _parts(part)


def _is_struct(kind: Any) -> bool:
    return (
        isinstance(kind, type)
        and not isinstance(kind, types.GenericAlias)
        and issubclass(kind, msgspec.Struct)
    )


def _named(kind: Any) -> str:
    """A type by its short names; bounds on a number are the reader's, not the file's."""
    if typing.get_origin(kind) is typing.Annotated:
        return _named(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(_named(part) for part in typing.get_args(kind))
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(repr, arguments))
    name = "None" if kind is types.NoneType else "…" if kind is ... else getattr(kind, "__name__", str(kind))
    return f"{name}[{', '.join(_named(part) for part in arguments)}]" if arguments else name


def exit_codes() -> list[str]:
    """``code  what``: every error class and every verdict."""
    from lockstep import errors
    from lockstep.cli.flags import EXIT_CODES

    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LockstepError)
    ]
    lines = [f"{c.exit_code}  {c.__name__}" for c in classes]
    return sorted([*lines, *(f"{code}  verdict {status}" for status, code in EXIT_CODES.items())])


def public_names() -> list[str]:
    """What ``import lockstep`` offers: a function with its signature, a class with its public methods."""
    import lockstep

    return sorted(line for name in lockstep.PUBLIC for line in _public(name, getattr(lockstep, name)))


def _public(name: str, of: Any) -> Iterator[str]:
    if not isinstance(of, type):
        for parameter in inspect.signature(of).parameters.values():
            default = getattr(parameter.default, "__name__", repr(parameter.default))
            said = "" if parameter.default is parameter.empty else f" = {default}"
            yield f"{name}({'*, ' * (parameter.kind is parameter.KEYWORD_ONLY)}{parameter.name}{said})"
        return
    yield name
    members = [member for member in dir(of) if not member.startswith("_")]
    yield from (
        f"{name}.{member}" for member in {*members, *typing.get_type_hints(of)} if not member.startswith("_")
    )


FILES: dict[str, Callable[[], list[str]]] = {
    "recipe_keys": recipe_keys,
    "metric_names": metric_names,
    "cli": cli,
    "record_schemas": record_schemas,
    "exit_codes": exit_codes,
    "public_names": public_names,
}


def golden(name: str) -> list[str]:
    """The lines that are promised."""
    return (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def write(name: str, lines: list[str]) -> None:
    """Promise these lines."""
    (HERE / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    for file, lines_of in FILES.items():
        write(file, lines_of())
