"""What is recorded of a run while it goes on, and what a sink is."""

from typing import Protocol

from msgspec import Struct

from lockstep.records.alarms import Alarm
from lockstep.records.verdicts import Verdict, When


class StepRecord(Struct, frozen=True, kw_only=True):
    """One training step.

    Example::

        StepRecord(step=0, weight_version=1, metrics={"loss": -0.0012, "grad_norm": 0.31})
    """

    step: int
    """The training step, from 0."""
    weight_version: int
    """The version that the step made: ``step + 1`` in the synchronous loop."""
    override: str = ""
    """What was overridden, in a run that trains although the ladder did not pass: each step says so."""
    metrics: dict[str, float]
    """By catalog name; a figure that the step did not measure is absent, a non-finite one is that float."""


class VerdictRecord(Struct, frozen=True, kw_only=True):
    """One verdict and what it is about."""

    when: When
    verdict: Verdict
    override: str = ""
    """What was overridden, where the run trains although the ladder did not pass: its verdicts say so too."""


class ShownCompletions(Struct, frozen=True, kw_only=True):
    """Some of a step's completions, for people."""

    step: int
    columns: tuple[str, ...] = ("prompt", "completion", "reward", "advantage", "finish_reason")
    """The advantage: its mean over the tokens that were sampled; NaN where nothing is learned of them."""
    rows: tuple[tuple[str, str, float, float, str], ...]


def table(completions: ShownCompletions) -> str:
    """The completions as Markdown."""
    lines = [completions.columns, tuple("---" for _ in completions.columns), *completions.rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: str | float) -> str:
    text = value if isinstance(value, str) else f"{value:g}"
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ⏎ ")


class Sink(Protocol):
    """Takes records as they come. It keeps nothing back: what a call returned from is where it belongs."""

    def step(self, record: StepRecord) -> None:
        """Take one step's figures."""

    def verdict(self, record: VerdictRecord) -> None:
        """Take one verdict."""

    def alarm(self, alarm: Alarm) -> None:
        """Take one alarm."""

    def completions(self, completions: ShownCompletions) -> None:
        """Take some of a step's completions; the run's own files have all of them elsewhere."""
