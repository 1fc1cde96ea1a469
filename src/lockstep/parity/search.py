"""The search for a cause: hypotheses in order, cheap and likely ones first, within one shared bound of time.

A hypothesis is a name and a function that returns what it found, or None. What the time did not suffice for
is kept by name, so that "nothing explains it" always says of what.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

SAID_EVERY_S = 5.0
SHOWN = 6
"""Names of hypotheses that are told."""
_RUNNING: ContextVar["Search | None"] = ContextVar("search", default=None)

T = TypeVar("T")
Looks = tuple[str, Callable[[], T | None]]
"""A hypothesis: its name, and what tries it."""


class OutOfTimeError(Exception):
    """The bound was reached in the middle of a hypothesis. Never leaves :meth:`Search.first`."""


class Search:
    """One for each check.

    Args:
        limit_s: over all that is tried, in seconds of this process's clock.
        say: told what is being tried.
    """

    def __init__(self, limit_s: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.limit_s = limit_s
        self.say = say
        self.spent_s = 0.0
        self.tried: list[str] = []
        self.not_tried: list[str] = []
        self._began = self._said = 0.0
        self._trying = ""

    def first(self, hypotheses: Iterable[Looks[T]]) -> T | None:
        """What the first of them finds that finds anything; None where none does, or the time is over."""
        with self._counting():
            for name, look in hypotheses:
                if self.over:
                    self._note(self.not_tried, name)
                    continue
                self._trying = name
                self.tell()
                try:
                    answer = look()
                except OutOfTimeError:
                    self._note(self.not_tried, name)
                    continue
                self._note(self.tried, name)
                if answer is not None:
                    return answer
        return None

    @property
    def over(self) -> bool:
        """True when no time is left."""
        return self._now() >= self.limit_s

    def told(self) -> str:
        """What was not tried, as the end of a sentence; empty where all was."""
        if not self.not_tried:
            return ""
        rest = f" and {len(self.not_tried) - SHOWN} more" if len(self.not_tried) > SHOWN else ""
        return (
            f"; not tried within {self.limit_s:g} s (--search-s): {', '.join(self.not_tried[:SHOWN])}{rest}"
        )

    def _now(self) -> float:
        return self.spent_s + (time.monotonic() - self._began if _RUNNING.get() is self else 0.0)

    def _note(self, names: list[str], name: str) -> None:
        if name not in names:
            names.append(name)

    def tell(self) -> None:
        """What is being tried, where that takes long; most of what a clean check tries is told at once."""
        now = self._now()
        if now - self._said >= SAID_EVERY_S:
            self.say(f"looking for the cause, {now:.0f} of at most {self.limit_s:g} s: {self._trying}")
            self._said = now

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """The clock runs while anything is tried; what is tried within a hypothesis is on the same clock."""
        if _RUNNING.get() is self:
            yield
            return
        self._began = time.monotonic()
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)
            self.spent_s += time.monotonic() - self._began


def keep_looking() -> None:
    """Called between the passes of a hypothesis.

    Raises:
        OutOfTimeError: when the search that is running has no time left.
    """
    search = _RUNNING.get()
    if search is None:
        return
    if search.over:
        raise OutOfTimeError
    search.tell()
