"""The recorder: what the loop says of a step, a verdict or an alarm goes to every sink of the run.

loop ── step, verdict, alarm ──► Recorder ──┬──► sinks/jsonl.py   the run's own files: always, and first
                                            └──► …                a file in sinks/, named in the recipe
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from lockstep.errors import RecipeError
from lockstep.metrics.catalog import BY_NAME
from lockstep.records.alarms import Alarm, Override
from lockstep.records.verdicts import Verdict, When
from lockstep.runs import sinks
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import Sink, StepRecord, VerdictRecord

KEY = "recipe, key recording.sinks"


class Recorder:
    """Writes each record to every sink, in their order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self.override: Override | None = None
        """Of a run whose ladder did not pass; stamped on each step."""

    def step(self, step: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Record a step's figures. Every one must be in the catalog.

        Raises:
            KeyError: for a figure that is not; nothing is written.
            RunError: when a sink cannot write.
        """
        unknown = sorted(metrics.keys() - BY_NAME.keys())
        if unknown:
            raise KeyError(f"figures {unknown} are not in metrics/catalog.py")
        stamp = str(self.override) if self.override is not None else ""
        record = StepRecord(step=step, weight_version=weight_version, override=stamp, metrics=dict(metrics))
        for sink in self.sinks:
            sink.step(record)

    def verdict(self, when: When, verdict: Verdict) -> None:
        """Record a verdict.

        Raises:
            RunError: when a sink cannot write.
        """
        for sink in self.sinks:
            sink.verdict(VerdictRecord(when=when, verdict=verdict))

    def alarm(self, alarm: Alarm) -> None:
        """Record an alarm.

        Raises:
            RunError: when a sink cannot write.
        """
        for sink in self.sinks:
            sink.alarm(alarm)


def sink_names() -> list[str]:
    """Every sink that there is."""
    return sorted(module.name for module in pkgutil.iter_modules(sinks.__path__) if module.name != "base")


def refuse_unknown_sinks(names: Sequence[str]) -> None:
    """What can be wrong with a recipe's sinks before a run has a directory.

    Raises:
        RecipeError: for a name that no sink has.
    """
    known = sink_names()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or ["csv"]
            hint = f"--set 'recording.sinks=[\"{near[0]}\"]'"
            raise RecipeError(KEY, got=repr(name), expected=f"sinks out of {', '.join(known)}", hint=hint)


def open_recorder(layout: RunLayout, also: Sequence[str] = ()) -> Recorder:
    """A recorder into a run's own files, then into the sinks of these names. Nothing is written yet.

    Raises:
        RecipeError: for a name that no sink has, or a sink that needs what is not installed.
    """
    refuse_unknown_sinks(also)
    return Recorder([_opened(name, layout) for name in dict.fromkeys(["jsonl", *also])])


def _opened(name: str, layout: RunLayout) -> Sink:
    try:
        return importlib.import_module(f"{sinks.__name__}.{name}").open_sink(layout)
    except ImportError as error:
        got, hint = f"{name!r}, and {error}", "install what it needs, or take it out of recording.sinks"
        raise RecipeError(KEY, got=got, expected="a sink whose packages are installed", hint=hint) from error
