"""Write into a run directory: strict JSON, whole lines, whole files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lockstep.metrics.catalog import BY_NAME
from lockstep.records.verdicts import Verdict

SCHEMA_METRICS = "lockstep.metrics/1"
SCHEMA_VERDICT = "lockstep.verdict/1"


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


def plain(record: Any) -> Any:
    """A record as strict JSON types; numpy scalars become numbers, paths text."""
    return strict(
        msgspec.to_builtins(record, enc_hook=lambda value: value.item() if isinstance(value, np.generic) else str(value))
    )


def append_metrics(path: Path, step: int, version: int, figures: Mapping[str, float]) -> None:
    """Add one line. Every figure must be in the catalog.

    Raises:
        KeyError: for a figure that is not.
    """
    unknown = sorted(figures.keys() - BY_NAME.keys())
    if unknown:
        raise KeyError(f"figures {unknown} are not in metrics/catalog.py")
    append(path, {"schema": SCHEMA_METRICS, "step": step, "weight_version": version, "metrics": strict(figures)})


def append_verdict(path: Path, verdict: Verdict, when: str) -> None:
    """Add one verdict; ``when`` says what it is about (``before step 0``, ``after sync 12``)."""
    append(path, {"schema": SCHEMA_VERDICT, "when": when, **plain(verdict)})


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_rollouts(path: Path, columns: Mapping[str, Any]) -> None:
    """One row a completion, as Parquet. Token ids are int32 lists, log-probabilities float32 lists (NaN where missing)."""
    import pyarrow
    from pyarrow import parquet

    types = {
        "prompt_token_ids": pyarrow.list_(pyarrow.int32()),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "engine_logprobs": pyarrow.list_(pyarrow.float32()),
    }
    table = pyarrow.table({name: pyarrow.array(values, types.get(name)) for name, values in columns.items()})
    partial = path.with_name(f".partial-{path.name}")
    parquet.write_table(table, partial, compression="zstd")
    os.replace(partial, path)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of strict JSON."""
    line = msgspec.json.encode(row) + b"\n"
    with path.open("ab") as file:
        file.write(line)
