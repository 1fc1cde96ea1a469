"""Strict JSON, both ways: a non-finite float is an explicit token on disk and a float again when it is read.

Lines of JSONL are appended whole (``durable.py``); a last line that a kill cut short is no line.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lockstep.errors import RunError
from lockstep.runs.durable import append_line, flush_file, writing


def strict(value: Any) -> Any:
    """JSON has no NaN: a non-finite float becomes ``{"nonfinite": "nan"}``, never null, 0 or absence."""
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if np.isfinite(number) else {"nonfinite": str(number)}
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def exact(value: Any) -> Any:
    """What :func:`strict` was given: non-finite floats are floats again."""
    if isinstance(value, dict):
        if value.keys() == {"nonfinite"} and value["nonfinite"] in ("nan", "inf", "-inf"):
            return float(value["nonfinite"])
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list) else value


def plain(record: Any) -> Any:
    """A record as strict JSON types; numpy scalars become numbers, paths text."""
    return strict(
        msgspec.to_builtins(
            record, enc_hook=lambda value: value.item() if isinstance(value, np.generic) else str(value)
        )
    )


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of strict JSON.

    Raises:
        RunError: when it cannot be written; the file is then as it was.
    """
    append_line(path, msgspec.json.encode(row) + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file, as they stand; a last line that a kill cut short is left out.

    Raises:
        RunError: for a line that is no JSON.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise bad_line(path, number, str(error), "a JSON object") from error
    return rows


def bad_line(path: Path, number: int, got: str, expected: str) -> RunError:
    """The error for a line that is not what it should be; lines are counted from 1."""
    return RunError(f"{path}, line {number}", got=got, expected=expected, hint=f"sed -n {number}p {path}")


def read_document(path: Path, hint: str) -> dict[str, Any]:
    """A file that holds one JSON object: a manifest, say.

    Args:
        hint: what to do when it does not.

    Raises:
        RunError: when it is missing, cut, empty, or no JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunError(
            f"file {path}", got=str(error) or type(error).__name__, expected="a JSON object", hint=hint
        ) from error


def drop_partial_line(path: Path) -> None:
    """Cut off a last line that a kill left incomplete, so that the next line starts on its own."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with writing(path):
                os.truncate(path, whole)
                flush_file(path)
