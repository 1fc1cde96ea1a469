"""trackio: a run in its local store (``TRACKIO_DIR``), by W&B's own words for it.

``pip install "lockstep-rl[trackio]"``; ``trackio show --project lockstep``. Nothing is sent.
"""

from typing import Any

from lockstep.records.alarms import Alarm
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import ShownCompletions, StepRecord, VerdictRecord


class TrackioSink:
    """One run of trackio's, by the name of the run directory."""

    def __init__(self, layout: RunLayout) -> None:
        import trackio

        self._trackio: Any = trackio
        self._layout = layout
        self._run: Any = None

    def step(self, record: StepRecord) -> None:
        """The figures at their step."""
        stamp = {"override": record.override} if record.override else {}
        self._opened().log(record.metrics | stamp, step=record.step)

    def verdict(self, record: VerdictRecord) -> None:
        """trackio has no place for one; the step's figures have what they say."""

    def alarm(self, alarm: Alarm) -> None:
        """Send the alarm as an alert."""
        self._opened()
        self._trackio.alert(title=alarm.name, text=str(alarm))

    def completions(self, completions: ShownCompletions) -> None:
        """Log the completions as a table."""
        import pandas

        frame = pandas.DataFrame(completions.rows, columns=list(completions.columns))
        self._opened().log({"completions": self._trackio.Table(dataframe=frame)}, step=completions.step)

    def _opened(self) -> Any:
        if self._run is None:
            self._run = self._trackio.init(
                project="lockstep", name=self._layout.root.name, resume="allow", embed=False
            )
        return self._run


def open_sink(layout: RunLayout) -> TrackioSink:
    """A run of trackio's."""
    return TrackioSink(layout)
