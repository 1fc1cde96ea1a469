"""One step's rollouts as Parquet: one row a sample, the same columns in every step, rewarded yet or not.

Besides the columns the file carries its schema's name and what belongs to the step as a whole (``ABOUT``), so
that it can be read alone. A page that was damaged is found by its checksum.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lockstep.errors import RunError
from lockstep.runs.durable import write_atomically

if TYPE_CHECKING:
    import pyarrow

SCHEMA_ROLLOUTS = "lockstep.rollouts/2"
SCHEMA_BEFORE = "lockstep.rollouts/1"
"""One advantage a completion, and no loss mask: all of its tokens were sampled. Read as what it says."""
NOT_YET = ("sampling_logprobs", "advantages")
"""Columns that are null before they are computed."""
ABOUT = b"lockstep"
"""The key of the file's own line of JSON in its Parquet metadata."""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs to the whole step."""

    schema: str = SCHEMA_ROLLOUTS
    step: int
    group_size: int
    sample_s: float = 0.0
    reward_s: float = 0.0
    left_out: int = 0
    figures: dict[str, float] = {}
    """What drawing and rewarding them says of them, by catalog name."""


def columns() -> "pyarrow.Schema":
    """Column names and types.

    A number that is missing is NaN, and counted; null is what has not been computed yet.
    """
    import pyarrow as pa

    types = {
        "step": pa.int64(),
        "item": pa.int64(),
        "group": pa.int64(),
        "sample": pa.int64(),
        "prompt_ids": _many(pa.int32()),
        "prompt_tokens": pa.int64(),
        "token_ids": _many(pa.int32()),
        "loss_mask": _many(pa.bool_()),
        "engine_logprobs": _many(pa.float32()),
        "missing_logprobs": pa.int64(),
        "sampling_logprobs": _many(pa.float32()),
        "weight_version": pa.int64(),  # of the first token, for readers; the spans are what is read back
        "version_spans": _many(_span()),
        "finish_reason": pa.string(),
        "text": pa.string(),
        "reward": pa.float64(),
        "advantages": _many(pa.float32()),
    }
    return pa.schema([pa.field(name, of, nullable=name in NOT_YET) for name, of in types.items()])


def _columns_before() -> "pyarrow.Schema":
    """The columns of :data:`SCHEMA_BEFORE`."""
    import pyarrow as pa

    types = {
        "step": pa.int64(),
        "item": pa.int64(),
        "sample": pa.int64(),
        "prompt_token_ids": _many(pa.int32()),
        "prompt_tokens": pa.int64(),
        "token_ids": _many(pa.int32()),
        "engine_logprobs": _many(pa.float32()),
        "missing_logprobs": pa.int64(),
        "weight_version": pa.int64(),
        "version_spans": _many(_span()),
        "finish_reason": pa.string(),
        "text": pa.string(),
        "reward": pa.float64(),
        "advantage": pa.float32(),
    }
    return pa.schema([pa.field(name, of, nullable=False) for name, of in types.items()])


def _many(of: "pyarrow.DataType") -> "pyarrow.DataType":
    import pyarrow as pa

    return pa.list_(pa.field("element", of, nullable=False))


def _span() -> "pyarrow.DataType":
    import pyarrow as pa

    return pa.struct([pa.field(name, pa.int64(), nullable=False) for name in ("start", "stop", "version")])


def write_rollouts(path: Path, values: Mapping[str, Any], about: About) -> None:
    """Write one step whole or not at all.

    Raises:
        RunError: when it cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schema = columns().with_metadata({ABOUT: msgspec.json.encode(about)})
    table = pa.table(
        {field.name: pa.array(values[field.name], field.type) for field in schema}, schema=schema
    )
    buffer = pa.BufferOutputStream()
    parquet.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomically(path, memoryview(buffer.getvalue()))


def read_table(path: Path) -> "tuple[pyarrow.Table, About]":
    """What :func:`write_rollouts` wrote.

    Raises:
        RunError: when the file is cut, empty, damaged, or another program's.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        content = pa.py_buffer(path.read_bytes())
        table = parquet.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()
        about = msgspec.json.decode((table.schema.metadata or {}).get(ABOUT, b""), type=About)
    except (OSError, pa.ArrowException, msgspec.MsgspecError) as error:
        raise damaged_rollouts(
            path, str(error).splitlines()[0] if str(error) else type(error).__name__
        ) from error
    if about.schema == SCHEMA_BEFORE and table.schema.equals(_columns_before()):
        return _brought_up(table, about.group_size), about
    if about.schema != SCHEMA_ROLLOUTS or not table.schema.equals(columns()):
        raise damaged_rollouts(path, f"schema {about.schema}, columns {', '.join(table.column_names[:4])} …")
    return table, about


def _brought_up(table: "pyarrow.Table", group_size: int) -> "pyarrow.Table":
    """A table of :data:`SCHEMA_BEFORE` with today's columns."""
    import pyarrow as pa

    lengths = [len(ids) for ids in table["token_ids"]]
    advantages = [
        None if math.isnan(a) else [a] * n
        for a, n in zip(table["advantage"].to_pylist(), lengths, strict=True)
    ]
    named = dict(zip(table.column_names, table.columns, strict=True))
    named |= {
        "group": [row // group_size for row in range(table.num_rows)],
        "prompt_ids": named["prompt_token_ids"],
        "loss_mask": [[True] * n for n in lengths],
        "sampling_logprobs": [None] * table.num_rows,
        "advantages": advantages,
    }
    chosen = {field.name: named[field.name] for field in columns()}
    made = {n: pa.array(v, columns().field(n).type) if isinstance(v, list) else v for n, v in chosen.items()}
    return pa.table(made, schema=columns())


def damaged_rollouts(path: Path, got: str) -> RunError:
    """The error of a file that does not hold what the run wrote there."""
    run = next((parent for parent in path.parents if (parent / "manifest.json").is_file()), path.parents[1])
    again = f"rm {path} && lockstep train --resume {run}   (they are drawn again)"
    gone = f"put a copy of it back, then: lockstep train --resume {run}; without one, start a new run"
    hint = again if path.parent.name == "drawn" else gone
    return RunError(f"rollouts {path}", got=got, expected=f"a whole file of {SCHEMA_ROLLOUTS}", hint=hint)
