"""``metrics.jsonl``, ``verdicts.jsonl``, ``alarms.jsonl``: strict JSON, a line a record, flushed at once."""

from typing import Any

from lockstep.records.alarms import Alarm
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import ShownCompletions, StepRecord, VerdictRecord
from lockstep.runs.strict import append, plain, strict

SCHEMA_METRICS = "lockstep.metrics/1"
SCHEMA_ALARM = "lockstep.alarm/1"
SCHEMA_VERDICT = "lockstep.verdict/1"


class JsonlSink:
    """The files that a run is read back from."""

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout

    def step(self, record: StepRecord) -> None:
        """Add a line to ``metrics.jsonl``.

        Raises:
            RunError: when it cannot be written; the file is then as it was.
        """
        row: dict[str, Any] = {
            "schema": SCHEMA_METRICS,
            "step": record.step,
            "weight_version": record.weight_version,
        }
        if record.override:
            row["override"] = record.override
        append(self.layout.metrics, row | {"metrics": strict(record.metrics)})

    def verdict(self, record: VerdictRecord) -> None:
        """Add a line to ``verdicts.jsonl``.

        Raises:
            RunError: as :meth:`step`.
        """
        row = {"schema": SCHEMA_VERDICT, "when": str(record.when)}
        if record.override:
            row["override"] = record.override
        append(self.layout.verdicts, row | plain(record.verdict))

    def alarm(self, alarm: Alarm) -> None:
        """Add a line to ``alarms.jsonl``.

        Raises:
            RunError: as :meth:`step`.
        """
        append(self.layout.alarms, {"schema": SCHEMA_ALARM, **plain(alarm)})

    def completions(self, completions: ShownCompletions) -> None:
        """All of them lie in ``rollouts/``."""


def open_sink(layout: RunLayout) -> JsonlSink:
    """The run's own files."""
    return JsonlSink(layout)
