"""A recipe as TOML, for ``load_recipe`` to read again: what is required, and what differs from defaults."""

import json
from typing import Any

import msgspec
from msgspec import Struct

from lockstep.config.recipe import Recipe


def toml_of(recipe: Recipe, remarks: dict[str, str] | None = None) -> str:
    """The recipe's file.

    Args:
        remarks: key (``engine.version``) → what stands behind its line as a comment.
    """
    parts = []
    for section in msgspec.structs.fields(Recipe):
        values = _told(getattr(recipe, section.name))
        if values:
            lines = [_line(section.name, name, value, remarks or {}) for name, value in values.items()]
            parts.append("\n".join([f"[{section.name}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _told(section: Struct) -> dict[str, Any]:
    """What a reader could not know: fields that are required or not at their default."""
    told = {}
    for field in msgspec.structs.fields(type(section)):
        value = getattr(section, field.name)
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if value != default and value is not None:  # TOML has no null
            told[field.encode_name] = msgspec.to_builtins(value)
    return told


def _line(section: str, name: str, value: Any, remarks: dict[str, str]) -> str:
    line = f"{name} = {_value(value)}"
    if isinstance(value, dict) and len(value) > 1:  # an option a line, so that each has its remark
        keys = [f"{_key(str(key))} = {_value(item)}" for key, item in value.items()]
        noted = [(f"{name}.{key}", remarks.get(f"{section}.{name}.{key}", "")) for key in value]
        return "\n".join(
            f"{name}.{text}{f'  # {remark}' if remark else ''}"
            for text, (_, remark) in zip(keys, noted, strict=True)
        )
    remark = remarks.get(f"{section}.{name}", "")
    return f"{line}  # {remark}" if remark else line


def _key(key: str) -> str:
    # A bare key is of ASCII letters and digits, _ and -.
    bare = key.replace("_", "a").replace("-", "a")
    return key if bare.isascii() and bare.isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's text is TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{_key(str(k))} = {_value(v)}" for k, v in value.items() if v is not None)
            + " }"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
