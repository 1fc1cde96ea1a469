"""The table of what a run is doing at the moment: redrawn in place on a terminal, with lines above it."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Self, TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from lockstep.records.printable import printable

DRAWN_PER_S = 2


class NowTable:
    """Names and values, asked for at each drawing.

    Args:
        now: what stands in it; it must not wait for long.
        stream: a terminal.
    """

    def __init__(self, now: Callable[[], Mapping[str, str]], stream: TextIO) -> None:
        self._now = now
        self._rows: Mapping[str, str] = {}
        self._terminal = Terminal(file=stream, force_terminal=True)
        self._live = Live(
            get_renderable=self._grid,
            console=self._terminal,
            refresh_per_second=DRAWN_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )

    def __enter__(self) -> Self:
        """Draw it from now on."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away; the lines stay."""
        self._live.stop()

    def above(self, line: str) -> None:
        """A line that stays."""
        self._terminal.print(Text(line), soft_wrap=True)

    def _grid(self) -> Grid:
        # What is asked changes meanwhile, in other threads, and no lock of theirs waits for a terminal: where
        # that goes wrong, what stood there stands once more.
        with contextlib.suppress(RuntimeError, ValueError, KeyError):
            self._rows = self._now()
        grid = Grid.grid(padding=(0, 2))
        for name, value in self._rows.items():
            grid.add_row(Text(printable(name), "bold"), Text(printable(value)))
        return grid
