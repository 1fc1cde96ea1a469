"""Read rollouts that another framework logged: token ids, log-probabilities, masks, sampling settings.

The file may be any: it is read a row (JSONL) or a few hundred rows (Parquet) at a time, into typed arrays,
and whatever it holds that cannot be used is one error that names file, row, column, what stands there and
what should.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lockstep.errors import UsageError
from lockstep.logged.columns import (
    ATTENTION,
    COLUMNS,
    MASKS,
    SETTINGS,
    SHOWN,
    LogRow,
    UnusableError,
    ends_with,
    ids_of,
    logprobs_of,
    mask_of,
    prompt_alone,
    sampling_of,
    told_of,
    unpadded_of,
)
from lockstep.logged.rows import Collected, Logged
from lockstep.records.tokens import SamplingParams

LONGEST_LINE = 32 << 20
"""Bytes of one JSON row: a million tokens. Its values are Python objects until they are packed."""
ROWS_AT_ONCE, VALUES_AT_ONCE = 256, 1 << 22
LONGEST_ROW = 1 << 20
"""Values of one row of a Parquet column, on average: a few bytes there may stand for billions."""
PACKED = {
    "gzip": (b"\x1f\x8b", "gunzip -k"),
    "zstd": (b"\x28\xb5\x2f\xfd", "zstd -d"),
    "bzip2": (b"BZh", "bunzip2 -k"),
    "xz": (b"\xfd7zX", "unxz -k"),
}
"""By its program: how a packed file begins, and what unpacks it."""
WHOLE_SEQUENCE = 4
"""Tokens of a completion that must end ``input_ids`` for these to be read as prompt and completion."""
HINT = "token ids and log-probabilities of each completion"


def read_logged(path: Path, default: SamplingParams) -> Logged:
    """Read a Parquet or JSONL file.

    Args:
        default: for settings that a row does not have.

    Raises:
        UsageError: for a file that is not there or cannot be used.
    """
    log = _opened(path)
    names = log.names
    collected = Collected([name for name in MASKS if name in names])
    settings: dict[tuple, int] = {}
    samplings: list[SamplingParams] = []
    whole = names["prompt"] == "input_ids"
    for number, row in log.rows:
        try:
            told = told_of(row)
            if (setting := settings.get(told, -1)) < 0:
                samplings.append(sampling_of(default, told))
                setting = settings[told] = len(samplings) - 1
            whole = _take(collected, names, number, row, setting, whole)
        except UnusableError as error:
            raise _unusable(
                path, error.got, error.expected, f", row {number}, column {error.column}"
            ) from None
    if not collected.settings and not collected.empty:
        raise _unusable(path, "no row", "at least one completion")
    if not collected.token_ids:
        raise _unusable(path, "no token", "at least one completion that is not empty")
    logged = collected.done(path, samplings, padded=any(name in names for name in ATTENTION))
    logged.notes += [f"{collected.empty} rows without a completion left out"] if collected.empty else []
    logged.notes += ["input_ids read as prompt and completion together"] if whole else []
    return logged


def _take(
    collected: Collected, names: dict[str, str], number: int, row: LogRow, setting: int, whole: bool
) -> bool:
    """Take a row in.

    Returns whether ``input_ids`` holds prompt and completion together, which the first row says.
    """
    prompt, tokens = (ids_of(names[role], row) for role in ("prompt", "tokens"))
    if whole:
        first = not collected.settings and not collected.empty
        whole = not first or (ends_with(prompt, tokens) and len(tokens) >= WHOLE_SEQUENCE)
        prompt = prompt_alone(prompt, tokens) if whole else prompt
    numbers = logprobs_of(names, row, len(tokens))
    if not len(prompt):
        raise UnusableError(names["prompt"], "no prompt", "at least one token")
    masks = {name: mask_of(name, row, len(prompt), len(tokens)) for name in collected.masks}
    unpadded = unpadded_of(names, row, len(prompt), len(tokens))
    if len(tokens):
        collected.add(number, prompt, tokens, numbers, masks, setting, unpadded)
    else:
        collected.empty += 1
    return whole


NumberedRows = Iterator[tuple[int, LogRow]]
"""Rows, each with its number as an error names it: of its line in JSONL, its place in Parquet."""


@dataclass(frozen=True)
class _Opened:
    """A log whose columns are known and whose rows have not been read."""

    names: dict[str, str]
    """Column by role, and by its own name where it has no role."""
    rows: NumberedRows


def _opened(path: Path) -> _Opened:
    wanted = "a .parquet or .jsonl file"
    try:
        if path.is_dir():
            raise _unusable(path, "a directory", wanted, hint=f"name a file in it: ls {path}")
        if not path.exists():
            raise _unusable(path, "no such file", wanted)
        if not path.is_file():
            raise _unusable(path, "no regular file", wanted)
        with path.open("rb") as file:
            head = file.read(4)
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a missing permission
        raise _unusable(path, _first_line(error), "a file that can be read") from error
    for form, (magic, unpack) in PACKED.items():
        if head.startswith(magic):
            raise _unusable(path, f"a file packed by {form}", wanted, hint=f"{unpack} {path}")
    # By its name too: one whose beginning is damaged is then told as Parquet, not as bad JSON.
    return _parquet(path) if head == b"PAR1" or path.suffix == ".parquet" else _jsonl(path)


def _named(path: Path, lists: dict[str, bool]) -> dict[str, str]:
    """Which column plays which role.

    Args:
        lists: by column that is there, whether it holds lists.
    """
    names = {}
    for role, known in COLUMNS.items():
        there = [name for name in known if name in lists]
        if not there:
            columns = ", ".join(ascii(name)[1 : SHOWN + 1].rstrip("'") for name in list(lists)[:SHOWN])
            raise _unusable(path, f"columns {columns}", f"one of {', '.join(known)}")
        names[role] = next((name for name in there if lists[name]), there[0])
    return names | {name: name for name in (*MASKS, *ATTENTION, *SETTINGS) if name in lists}


def _jsonl(path: Path) -> _Opened:
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise _unusable(path, "no row", "at least one completion")
    names = _named(path, {name: isinstance(value, list) for name, value in first[1].items()})

    return _Opened(names, chain([first], lines))


def _lines(path: Path) -> NumberedRows:
    """The objects of a JSONL file with the numbers of their lines."""
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise _unusable(
                        path,
                        f"more than {LONGEST_LINE >> 20} MiB",
                        "one completion a line",
                        f", row {number}",
                    )
                # A byte order mark, which some editors put first, is no JSON.
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if not line:
                    continue
                row = _decoded(line)
                if not isinstance(row, dict):
                    got = (
                        f"{type(row).__name__} {ascii(row)[:SHOWN]}"
                        if not isinstance(row, list)
                        else "an array"
                    )
                    raise _unusable(path, got, "a JSON object", f", row {number}")
                yield number, row
    except (OSError, ValueError, RecursionError) as error:
        got = (
            "values nested too deep"
            if isinstance(error, RecursionError)
            else str(error).splitlines()[0][:200]
        )
        raise _unusable(path, got, "Parquet, or one JSON object a line", f", row {number}") from None


def _decoded(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        return json.loads(line.decode())  # which takes NaN and the infinities: they are counted as missing


def _parquet(path: Path) -> _Opened:
    import pyarrow as pa
    from pyarrow import parquet

    expected = "a Parquet file"
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        kinds = {name: _holds_lists(pa, schema.field(at).type) for at, name in enumerate(schema.names)}
        names = _named(path, kinds)
        if len(set(schema.names)) < len(schema.names):
            raise _unusable(path, "two columns of one name", expected)
        columns = list(dict.fromkeys(names.values()))
        for name in columns:
            _refuse_type(pa, path, name, schema.field(name).type)
        # Before a column's metadata is asked for: where they are corrupt, pyarrow 26 ends the process there,
        # and raises here. It holds few values at a time, however long a row says it is.
        file.scan_contents(columns)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _unusable(path, _first_line(error), expected) from None
    at_once = _rows_at_once(path, file.metadata, set(columns))

    def rows() -> NumberedRows:
        number = 0
        try:
            for batch in file.iter_batches(at_once, columns=columns):
                parts = {name: _values(pa, batch.column(name)) for name in batch.schema.names}
                for at in range(batch.num_rows):
                    number += 1
                    yield number, {name: part[at] for name, part in parts.items()}
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise _unusable(path, _first_line(error), expected, f", after row {number}") from None

    return _Opened(names, rows())


def _rows_at_once(path: Path, about: Any, columns: set[str]) -> int:
    """How many rows are read together, by how long they are.

    Args:
        about: a Parquet file's metadata.
        columns: those that are read, and whose metadata have been found whole.
    """
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    read = [at for at in range(about.num_columns) if about.schema.column(at).path.split(".")[0] in columns]
    longest = max(
        (group.column(at).num_values / max(group.num_rows, 1) for group in groups for at in read),
        default=0,
    )
    if longest > LONGEST_ROW:
        raise _unusable(path, f"rows of {longest:,.0f} values", f"at most {LONGEST_ROW:,} a row")
    return max(1, min(ROWS_AT_ONCE, int(VALUES_AT_ONCE / max(longest, 1.0))))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _holds_lists(pa: Any, kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(pa: Any, kind: Any) -> bool:
    told = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(is_so(kind) for is_so in told)


def _refuse_type(pa: Any, path: Path, name: str, kind: Any) -> None:
    wanted = kind if name in SETTINGS else kind.value_type if _holds_lists(pa, kind) else None
    if wanted is None or not _is_number(pa, wanted):
        expected = "a number" if name in SETTINGS else "a list of numbers"
        raise _unusable(path, f"values of type {str(kind)[:SHOWN]}", expected, f", column {name}")


def _values(pa: Any, column: Any) -> list:
    """A column's values by row: numpy arrays of lists, Python's own of scalars."""
    if not _holds_lists(pa, column.type):
        return column.to_pylist()
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    ends = column.offsets.to_numpy()
    # Not ``flatten()``, which leaves out what lies under a null row: the offsets count that too.
    flat = column.values
    there = (
        np.ones(len(column), bool)
        if not column.null_count
        else column.is_valid().to_numpy(zero_copy_only=False)
    )
    holes = flat.is_null().to_numpy(zero_copy_only=False) if flat.null_count else None
    values = (
        flat.to_numpy(zero_copy_only=False) if not pa.types.is_null(flat.type) else np.full(len(flat), np.nan)
    )
    rows = [values[ends[row] : ends[row + 1]] if there[row] else None for row in range(len(column))]
    if holes is not None:  # a null in a list of ids makes it a list of floats, which ids are not: in its row
        whole = flat.fill_null(0).to_numpy(zero_copy_only=False)
        for row, (start, stop) in enumerate(pairwise(ends)):
            if there[row] and not holes[start:stop].any():
                rows[row] = whole[start:stop]
            elif there[row]:
                rows[row] = np.where(holes[start:stop], np.nan, whole[start:stop].astype(np.float64))
    return rows


def _unusable(path: Path, got: str, expected: str, where: str = "", hint: str = HINT) -> UsageError:
    return UsageError(f"rollouts {path}{where}", got=got, expected=expected, hint=hint)
