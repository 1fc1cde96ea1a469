"""Read a run directory. No torch."""

from pathlib import Path
from typing import Any

import msgspec

from lockstep.errors import RunError


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
            rows.append(msgspec.json.decode(line))
        except msgspec.DecodeError as error:
            raise RunError(f"{path}, line {number}", got=str(error), expected="JSON", hint=f"sed -n {number}p {path}") from error
    return rows


def number(value: Any) -> float:
    """A figure as written by :func:`lockstep.runs.write.strict`, non-finite ones included."""
    return float(value["nonfinite"]) if isinstance(value, dict) else float(value)


def drop_partial_line(path: Path) -> None:
    """Cut off a last line that a kill left incomplete, so that the next line starts on its own."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("rb+") as file:
                file.truncate(whole)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The rows of one step's Parquet file."""
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()
