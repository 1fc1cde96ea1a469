"""The recorder: what the loop says of a step, a verdict or an alarm goes to every sink of the run.

loop ── step, verdict, alarm ──► Recorder ──┬──► sinks/jsonl.py   the run's own files: always, and first
                                            └──► …                a file in sinks/, named in the recipe
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.errors import RecipeError
from lockstep.metrics.aliases import Alias, aliases_of, exported, left_out
from lockstep.metrics.catalog import metric_named
from lockstep.records.alarms import Alarm, Override
from lockstep.records.verdicts import Verdict, When
from lockstep.runs import sinks
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import ShownCompletions, Sink, StepRecord, VerdictRecord

KEY = "recipe, key recording.sinks"


class Recorder:
    """Writes each record to every sink, in their order."""

    def __init__(self, sinks: Sequence[Sink], aliases: Sequence[Alias] = ()) -> None:
        self.sinks = tuple(sinks)
        self._aliases = tuple(aliases)
        self.override: Override | None = None
        """Set where the run's ladder did not pass; stamped on each step, verdict and alarm."""

    @property
    def _stamp(self) -> str:
        return str(self.override) if self.override is not None else ""

    def step(self, step: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Record a step's figures. Every one must be in the catalog.

        Raises:
            KeyError: for a figure that is not; nothing is written.
            RunError: when a sink cannot write.
        """
        unknown = sorted(name for name in metrics if metric_named(name) is None)
        if unknown:
            raise KeyError(f"figures {unknown} are not in metrics/catalog.py")
        figures = dict(metrics)
        record = StepRecord(step=step, weight_version=weight_version, override=self._stamp, metrics=figures)
        also = exported(metrics, self._aliases)
        own, *others = self.sinks
        own.step(record)  # which a run is read back from: our names alone
        for sink in others:
            sink.step(replace(record, metrics=record.metrics | also))

    def verdict(self, when: When, verdict: Verdict) -> None:
        """Record a verdict.

        Raises:
            RunError: when a sink cannot write.
        """
        for sink in self.sinks:
            sink.verdict(VerdictRecord(when=when, verdict=verdict, override=self._stamp))

    @property
    def shows_completions(self) -> bool:
        """True where a sink was asked for beside the run's own files."""
        return len(self.sinks) > 1

    def completions(self, completions: ShownCompletions) -> None:
        """Record some of a step's completions.

        Raises:
            RunError: when a sink cannot write.
        """
        for sink in self.sinks:
            sink.completions(completions)

    def alarm(self, alarm: Alarm) -> None:
        """Record an alarm.

        Raises:
            RunError: when a sink cannot write.
        """
        for sink in self.sinks:
            sink.alarm(replace(alarm, override=self._stamp))


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


def open_recorder(layout: RunLayout, also: Sequence[str] = (), aliases: Sequence[Alias] = ()) -> Recorder:
    """A recorder into a run's own files, then into the sinks of these names. Nothing is written yet.

    Args:
        aliases: other systems' names that these sinks get too (``metrics/aliases.py``).

    Raises:
        RecipeError: for a name that no sink has, or a sink that needs what is not installed.
    """
    refuse_unknown_sinks(also)
    return Recorder([_opened(name, layout) for name in dict.fromkeys(["jsonl", *also])], aliases)


def recorder_of(recipe: Recipe, layout: RunLayout, say: Callable[[str], None]) -> Recorder:
    """The recorder that a recipe asks for; how many names of another system it leaves out is said once.

    Raises:
        RecipeError: as :func:`open_recorder`.
    """
    system = recipe.recording.aliases
    if system:
        say(left_out(system, recipe))
    return open_recorder(layout, recipe.recording.sinks, aliases_of(system, recipe) if system else ())


def _opened(name: str, layout: RunLayout) -> Sink:
    try:
        return importlib.import_module(f"{sinks.__name__}.{name}").open_sink(layout)
    except ImportError as error:
        got = f"{name!r}, and {error}"
        hint = f'pip install "lockstep-rl[{name}]", or take it out of recording.sinks'
        raise RecipeError(KEY, got=got, expected="a sink whose packages are installed", hint=hint) from error
