"""Keys of nested tables by their full names, ``section.key``: set, looked up, and refused where unknown."""

import difflib
import tomllib
from typing import Any

import msgspec
from msgspec import Struct

from lockstep.errors import RecipeError


def set_key(table: dict[str, Any], override: str) -> None:
    """Carry out one ``--set section.key=value``; the value is read as TOML, else as a plain string.

    Raises:
        RecipeError: for what is no such text, or goes through a key that is no section.
    """
    if override != override.encode(errors="replace").decode():  # bytes of an argument that are no UTF-8
        raise RecipeError("flag --set", got=ascii(override), expected="UTF-8", hint="--set optimizer.lr=1e-5")
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise RecipeError(
            "flag --set", got=repr(override), expected="section.key=value", hint="--set optimizer.lr=1e-5"
        )
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        read = {}
    # More than one: lines after the first, which were not asked for.
    value = read["value"] if len(read) == 1 else text
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            where = ".".join(keys[: depth + 1])
            raise RecipeError(
                "flag --set", got=repr(override), expected=f"{where} to be a section", hint=f"--set {where}=…"
            )
    table[keys[-1]] = value


def refuse_unknown_keys(table: dict[str, Any], kind: type[Struct], source: str) -> None:
    """Hold every key to the fields of ``kind`` and of its sections.

    Raises:
        RecipeError: for another; the nearest is named, of whatever section.
    """
    _refuse_unknown(table, kind, source, (), kind)


def _refuse_unknown(
    table: dict[str, Any], kind: type[Struct], source: str, path: tuple[str, ...], root: type[Struct]
) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        where = ".".join((*path, key))
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            guesses = [".".join((*path, near[0]))] if near else _homes_of(key, root)
            raise RecipeError(
                f"recipe {source}, key {where}",
                got="an unknown key",
                expected=f"{' or '.join(map(repr, guesses))} perhaps"
                if guesses
                else f"one of {', '.join(sorted(fields))}",
                hint=f"the keys of [{'.'.join(path) or 'the recipe'}] are {', '.join(sorted(fields))}",
            )
        if isinstance(value, dict) and isinstance(fields[key], type) and issubclass(fields[key], Struct):
            _refuse_unknown(value, fields[key], source, (*path, key), root)


def _homes_of(key: str, root: type[Struct]) -> list[str]:
    """Full names of the key most like ``key`` in any section, one for each section that has it."""
    homes: dict[str, list[str]] = {}
    for section in msgspec.structs.fields(root):
        for field in msgspec.structs.fields(section.type):
            homes.setdefault(field.name, []).append(f"{section.name}.{field.name}")
    return [home for match in difflib.get_close_matches(key, homes, n=1, cutoff=0.7) for home in homes[match]]


def value_at(table: dict[str, Any], key: str) -> str:
    """What stands at a full name, as text for an error."""
    value: Any = table
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return "nothing"
        value = value[part]
    return repr(value)
