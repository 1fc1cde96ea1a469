"""Read a run directory. No torch."""

import os
from pathlib import Path
from typing import Any

import msgspec

from lockstep.errors import RunError
from lockstep.runs.durable import flush_file, writing
from lockstep.runs.rollouts import read_table


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file. A last line cut short by a kill is left out; one in the middle is an error.

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
            raise RunError(
                f"{path}, line {number}", got=str(error), expected="a JSON object", hint=f"sed -n {number}p {path}"
            ) from error
    return rows


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
        raise RunError(f"file {path}", got=str(error) or type(error).__name__, expected="a JSON object", hint=hint) from error


def number(value: Any) -> float:
    """A figure as written by :func:`lockstep.runs.write.strict`, non-finite ones included."""
    return float(value["nonfinite"]) if isinstance(value, dict) else float(value)


def exact(value: Any) -> Any:
    """What :func:`lockstep.runs.write.strict` was given: non-finite floats are floats again."""
    if isinstance(value, dict):
        if value.keys() == {"nonfinite"} and value["nonfinite"] in ("nan", "inf", "-inf"):
            return float(value["nonfinite"])
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list) else value


def drop_partial_line(path: Path) -> None:
    """Cut off a last line that a kill left incomplete, so that the next line starts on its own."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with writing(path):
                os.truncate(path, whole)
                flush_file(path)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The rows of one step's Parquet file.

    Raises:
        RunError: when it is not whole.
    """
    return read_table(path)[0].to_pylist()
