"""``report.json``: everything that a page shows, in the order in which it shows it. The page adds nothing.

A number that is not finite is a token of its own on disk (``runs/strict.py``), as everywhere.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

import lockstep
from lockstep.runs.durable import write_atomically
from lockstep.runs.strict import plain

SCHEMA = "lockstep.report/1"


class Table(Struct, frozen=True, kw_only=True):
    """Rows of text, as long as ``columns``."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False
    """Closed until it is asked for."""


class Line(Struct, frozen=True, kw_only=True):
    """One line of a plot over its ``xs``; NaN where there is no value."""

    name: str
    ys: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    """A band around it; empty where there is none."""


class Plot(Struct, frozen=True, kw_only=True):
    """Lines over a common axis."""

    title: str
    unit: str
    x_label: str
    xs: tuple[float, ...]
    lines: tuple[Line, ...]
    log_x: bool = False


class Token(Struct, frozen=True, kw_only=True):
    """One token of a completion."""

    text: str
    engine: float
    """Its log-probability as the engine reported it, nats; NaN where it is missing."""
    trainer: float
    """As the trainer scored it under the weights that drew it; NaN where it was not scored."""


class ShownRollout(Struct, frozen=True, kw_only=True):
    """One completion, its tokens to be tinted by |trainer − engine|."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tokens: tuple[Token, ...]
    left_out: int = 0
    """Tokens after those shown."""


class Section(Struct, frozen=True, kw_only=True):
    """What belongs together."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    rollouts: tuple[ShownRollout, ...] = ()


class Download(Struct, frozen=True, kw_only=True):
    """A file that the page carries."""

    name: str
    mime: str
    text: str


class Report(Struct, frozen=True, kw_only=True):
    """One page."""

    schema: str = SCHEMA
    lockstep_version: str = lockstep.__version__
    kind: str
    """``run``, ``check``, ``diagnose``, ``faults``, ``compare`` or ``upgrade``."""
    title: str
    status: str
    """PASS, FAIL or NOT_RUN."""
    words: tuple[str, ...]
    """What there is to know, in sentences, the first alone if one reads no more."""
    sections: tuple[Section, ...]
    downloads: tuple[Download, ...] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the report whole, or not at all."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(plain(report)), indent=1))
