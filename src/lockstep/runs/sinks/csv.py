"""``metrics.csv``: a row a step and a column a figure of the catalog, for spreadsheets and pandas.

An empty cell was not measured; one that came out non-finite says ``nan`` or ``inf``. Numbers are written so
that they are read back exactly. Verdicts are not in it.
"""

import csv
import io
from collections.abc import Iterable, Sequence

from lockstep.metrics.catalog import METRICS
from lockstep.records.alarms import Alarm
from lockstep.runs.durable import append_line, write_atomically
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_steps
from lockstep.runs.sinks.base import ShownCompletions, StepRecord, VerdictRecord

COLUMNS = ("step", "weight_version", *(m.name for m in METRICS if "NAME" not in m.name), "override")
"""And behind these the figures that the run's own names make of a family."""


class CsvSink:
    """``metrics.jsonl`` as a table."""

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self.path = layout.root / "metrics.csv"
        self._columns: tuple[str, ...] = ()

    def step(self, record: StepRecord) -> None:
        """Add a row.

        Raises:
            RunError: when it cannot be written; the file is then as it was.
        """
        if self._columns:
            append_line(self.path, _lines([record], self._columns))
            return
        # A kill may have come between the run's own file and this one, or within a row: the first record of
        # each start writes the table anew, from what is recorded.
        steps = {recorded.step: recorded for recorded in (*read_steps(self.layout.metrics), record)}
        own = {name for recorded in steps.values() for name in recorded.metrics} - set(COLUMNS)
        columns = (*COLUMNS, *sorted(own))
        write_atomically(self.path, (",".join(columns) + "\n").encode() + _lines(steps.values(), columns))
        self._columns = columns

    def verdict(self, record: VerdictRecord) -> None:
        """A table of figures has no place for one."""

    def alarm(self, alarm: Alarm) -> None:
        """Writes nothing: the table has no place for an alarm."""

    def completions(self, completions: ShownCompletions) -> None:
        """Writes nothing: the table has no place for completions."""


def _lines(records: Iterable[StepRecord], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    rows = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    for record in records:
        own = {"step": record.step, "weight_version": record.weight_version, "override": record.override}
        rows.writerow(own | record.metrics)
    return text.getvalue().encode()


def open_sink(layout: RunLayout) -> CsvSink:
    """The table of a run."""
    return CsvSink(layout)
