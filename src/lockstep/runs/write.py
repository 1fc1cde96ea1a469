"""Write into a run directory: strict JSON, whole lines, whole files; how they are kept is ``durable.py``'s."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lockstep.metrics.catalog import BY_NAME
from lockstep.records.verdicts import Verdict
from lockstep.runs.durable import PARTIAL, append_line, flush_directory, writing
from lockstep.runs.durable import write_atomically as write_atomically
from lockstep.runs.layout import RunLayout

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


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of strict JSON.

    Raises:
        RunError: when it cannot be written; the file is then as it was.
    """
    append_line(path, msgspec.json.encode(row) + b"\n")


def forget_partials(layout: RunLayout) -> None:
    """At the start of a run that goes on: remove what a killed process left half-written, and flush what it renamed last.

    Raises:
        RunError: when it cannot be removed.
    """
    with writing(layout.root):
        for left in list(layout.root.rglob(f"{PARTIAL}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        for directory in (layout.root, *(path for path in layout.root.rglob("*") if path.is_dir())):
            flush_directory(directory)
