"""Who may use a model that draws and loads in one process: one request at a time, and loads in between.

    a request    drawing() ─► token, token, boundary() ─► token, … ─► done
                     ▲                    │ ▲
    a load           │ wait: none draws   ▼ │ in flight: between two tokens of whatever is drawn
                     └──────────────── loading() ───────────────────┘

A load that waits goes before every request that has not begun.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Whose turn it is with one model: one request draws, or one load replaces its weights."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._one_load = threading.Lock()
        self._drawing = False
        self._at_boundary = False
        self._loads = 0
        self._in_flight = 0

    @property
    def busy(self) -> bool:
        """True while a request is being drawn."""
        return self._drawing

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """One request's whole time with the model; waits for its turn."""
        with self._changed:
            self._changed.wait_for(lambda: not self._drawing and not self._loads)
            self._drawing = True
        try:
            yield
        finally:
            with self._changed:
                self._drawing = False
                self._changed.notify_all()

    def boundary(self) -> None:
        """Between two tokens, by the thread that draws: loads in flight happen now."""
        # Without the lock, at every token: a load that comes just now waits for the next boundary.
        if not self._in_flight:
            return
        with self._changed:
            self._at_boundary = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._in_flight)
            self._at_boundary = False

    @contextmanager
    def loading(self, *, in_flight: bool) -> Iterator[None]:
        """The model's weights may be exchanged while the body runs.

        Args:
            in_flight: a request may be half drawn; else the one that is being drawn ends first.
        """
        with self._changed:
            self._loads += 1
            self._in_flight += in_flight
        try:
            with self._one_load:
                with self._changed:
                    self._changed.wait_for(lambda: not self._drawing or (in_flight and self._at_boundary))
                yield
        finally:
            with self._changed:
                self._loads -= 1
                self._in_flight -= in_flight
                self._changed.notify_all()
