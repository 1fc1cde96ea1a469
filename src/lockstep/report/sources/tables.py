"""CSV, JSON lines, and the ``log_history`` of a ``trainer_state.json``."""

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lockstep.errors import RunError, UsageError
from lockstep.report.trajectories import STEP_NAMES
from lockstep.runs.strict import exact

Rows = list[tuple[float, dict[str, float]]]
SPELLED = {"nan": math.nan, "inf": math.inf, "infinity": math.inf, "-inf": -math.inf, "-infinity": -math.inf}
"""Numbers that loggers write as text, in JSON too."""


def rows_by_seed(path: Path, mapping: Mapping[str, str]) -> dict[str, Rows]:
    """Steps and figures, under the seed that ``mapping["seed"]`` names a column for, else under ``""``.

    Raises:
        RunError: for a line that is no JSON object, or a table whose rows differ in length.
        UsageError: for a step that is no number.
    """
    seeds: dict[str, Rows] = {}
    for number, row in enumerate(_records(path), 1):
        flat = dict(_flat(row))
        seed = str(flat.pop(mapping["seed"], "")) if "seed" in mapping else ""
        name = mapping.get("step") or next((name for name in STEP_NAMES if name in flat), None)
        if name is None or name not in flat:
            continue  # a line of configuration, or of an evaluation: no step, no point
        step = _number(flat.pop(name))
        if step is None or not math.isfinite(step):
            where = f"file {path}, row {number}, column {name}"
            raise UsageError(where, got="no number", expected="a step", hint="--map step=COLUMN")
        figures = {key: number for key, text in flat.items() if (number := _number(text)) is not None}
        seeds.setdefault(seed, []).append((step, figures))
    return seeds or {"": []}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                for number, row in enumerate(csv.DictReader(file, strict=True), 2):
                    if None in row:
                        raise ValueError(f"line {number}: more values than columns")
                    yield {name: text for name, text in row.items() if text}
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                if line.strip():
                    yield _object(line, f"line {number}")
        else:
            history = _object(path.read_bytes(), "the file").get("log_history")
            if not isinstance(history, list):
                raise ValueError("no log_history")
            yield from history
    except (ValueError, csv.Error, OSError) as error:
        expected = "a table, one JSON object a line, or a trainer_state.json"
        raise RunError(f"file {path}", got=str(error), expected=expected, hint=f"head {path}") from error


def _object(text: bytes, where: str) -> dict[str, Any]:
    # Python's own json writes NaN and Infinity bare, which is no JSON; transformers' state has them.
    try:
        return exact(msgspec.json.decode(text, type=dict[str, Any]))
    except msgspec.MsgspecError:
        import json

        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"{where}: no JSON object") from None
        return value


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by ``/``; the wrappers ``data`` (verl) and ``metrics`` (Lockstep) are left out."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if name in ("data", "metrics") else f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if text in SPELLED:
            return SPELLED[text]
        try:
            return float(text)
        except ValueError:
            return None
    return None
