"""Read a run directory into records. No torch.

    open_run(path) ─► RunRecord: manifest, steps (figures as columns), verdicts, certificate

A line that is whole JSON and no record of ours is an error that names the file and the line.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from msgspec import convert

from lockstep.metrics.catalog import BY_NAME
from lockstep.records.alarms import Alarm
from lockstep.records.verdicts import Verdict, when_of
from lockstep.runs.certificate import Certificate, whole_certificate
from lockstep.runs.layout import RunLayout, existing_run
from lockstep.runs.manifest import Manifest, read_manifest
from lockstep.runs.sinks.base import StepRecord, VerdictRecord
from lockstep.runs.sinks.jsonl import SCHEMA_ALARM, SCHEMA_METRICS, SCHEMA_VERDICT
from lockstep.runs.strict import bad_line, exact, read_lines

Record = TypeVar("Record")


@dataclass(frozen=True)
class Steps:
    """The training steps of a run, in the order in which they were recorded. N is how many there are."""

    records: tuple[StepRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.records)

    def column(self, name: str) -> np.ndarray:
        """One figure over all steps, float64 [N]; NaN where it was NaN and where it was not :meth:`measured`.

        Raises:
            KeyError: for a name that is neither in the catalog nor in the run.
        """
        if name not in BY_NAME and not self.measured(name).any():
            raise KeyError(f"no figure {name!r} in metrics/catalog.py or in the run")
        return np.array([record.metrics.get(name, np.nan) for record in self.records], np.float64)

    def measured(self, name: str) -> np.ndarray:
        """Which steps have the figure at all, bool [N]: one that was replayed has no time of its own."""
        return np.array([name in record.metrics for record in self.records], np.bool_)


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory holds it; each part is read when it is first asked for."""

    layout: RunLayout
    manifest: Manifest

    @cached_property
    def steps(self) -> Steps:
        """What ``metrics.jsonl`` holds."""
        return read_steps(self.layout.metrics)

    @cached_property
    def verdicts(self) -> tuple[VerdictRecord, ...]:
        """What ``verdicts.jsonl`` holds, over all starts of the run."""
        return read_verdicts(self.layout.verdicts)

    @cached_property
    def alarms(self) -> tuple[Alarm, ...]:
        """What ``alarms.jsonl`` holds; a run without alarms has no such file."""
        return tuple(_of_lines(self.layout.alarms, SCHEMA_ALARM, lambda row: convert(row, Alarm)))

    @property
    def override(self) -> str:
        """Layer, cause and the recipe's reason, where the run trained although the ladder did not pass.

        Else empty.
        """
        stamps = (record.override for record in reversed(self.steps.records) if record.override)
        return next(stamps, str(self.manifest.override or ""))

    @cached_property
    def certificate(self) -> Certificate | None:
        """The certificate as it stands, a void one too; None where none was issued."""
        return whole_certificate(self.layout.certificate) if self.layout.certificate.is_file() else None


def open_run(path: Path) -> RunRecord:
    """The run in a directory.

    Raises:
        UsageError: when there is none.
        RunError: when its manifest is damaged or of another schema; other files' errors come when read.
    """
    layout = existing_run(path)
    return RunRecord(layout, read_manifest(layout.manifest))


def read_steps(path: Path) -> Steps:
    """The whole lines of a ``metrics.jsonl``; a file that is not there has none.

    Raises:
        RunError: for a line that is no step's record; names it.
    """
    return Steps(tuple(_of_lines(path, SCHEMA_METRICS, lambda row: convert(row, StepRecord))))


def read_verdicts(path: Path) -> tuple[VerdictRecord, ...]:
    """The whole lines of a ``verdicts.jsonl``; a file that is not there has none.

    Raises:
        RunError: for a line that is no verdict's record; names it.
    """
    return tuple(_of_lines(path, SCHEMA_VERDICT, _verdict))


def _verdict(row: dict[str, Any]) -> VerdictRecord:
    when = when_of(str(row.pop("when", "")))
    override = str(row.pop("override", ""))
    return VerdictRecord(when=when, verdict=convert(row, Verdict), override=override)


def _of_lines(path: Path, schema: str, read: Callable[[dict[str, Any]], Record]) -> Iterator[Record]:
    for number, row in enumerate(read_lines(path), 1):
        if (got := row.pop("schema", None)) != schema:
            raise bad_line(path, number, f"schema {got!r}", schema)
        try:
            record = read(exact(row))
        except ValueError as error:  # msgspec's own errors are ValueErrors
            raise bad_line(path, number, str(error), f"a record of {schema}") from error
        yield record
