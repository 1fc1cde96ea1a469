"""The recorder: what the loop says of a step or a verdict goes to every sink of the run.

loop ── step, verdict ──► Recorder ──┬──► sinks/jsonl.py   metrics.jsonl, verdicts.jsonl: always, and first
                                     └──► …                another is a file in sinks/ and a line in SINKS
"""

from collections.abc import Callable, Mapping, Sequence

from lockstep.errors import UsageError
from lockstep.metrics.catalog import BY_NAME
from lockstep.records.verdicts import Verdict, When
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import Sink, StepRecord, VerdictRecord
from lockstep.runs.sinks.jsonl import JsonlSink

SINKS: dict[str, Callable[[RunLayout], Sink]] = {"jsonl": JsonlSink}
"""Name → what opens it on a run's directory. What a sink needs beyond the standard library is imported when it is opened."""


class Recorder:
    """Writes each record to every sink, in their order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def step(self, step: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Record a step's figures. Every one must be in the catalog.

        Raises:
            KeyError: for a figure that is not; nothing is written.
            RunError: when a sink cannot write.
        """
        unknown = sorted(metrics.keys() - BY_NAME.keys())
        if unknown:
            raise KeyError(f"figures {unknown} are not in metrics/catalog.py")
        record = StepRecord(step=step, weight_version=weight_version, metrics=dict(metrics))
        for sink in self.sinks:
            sink.step(record)

    def verdict(self, when: When, verdict: Verdict) -> None:
        """Record a verdict.

        Raises:
            RunError: when a sink cannot write.
        """
        for sink in self.sinks:
            sink.verdict(VerdictRecord(when=when, verdict=verdict))


def open_recorder(layout: RunLayout, also: Sequence[str] = ()) -> Recorder:
    """A recorder into a run's own files, and into the sinks of these names after them.

    Raises:
        UsageError: for a name that no sink has.
    """
    for name in also:
        if name not in SINKS:
            raise UsageError(f"sink {name}", got="no such sink", expected=f"one of {', '.join(SINKS)}", hint="leave it out")
    return Recorder([SINKS[name](layout) for name in dict.fromkeys(["jsonl", *also])])
