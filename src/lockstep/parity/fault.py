"""What a planted fault consists of."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from msgspec import Struct

from lockstep.parity.causes import CAUSES
from lockstep.parity.pair import Pair
from lockstep.records.verdicts import LayerName

V1 = ("V1",)


class Fault(Struct, frozen=True):
    """One way to break a backend. What it consists of may be combined."""

    name: str
    cause: str
    how: str
    sets: tuple[str, ...] = ()
    """Recipe overrides; those of ``engine.`` need an engine of their own."""
    worker: tuple[str, ...] = ()
    """What the engine's worker does wrong at every load."""
    proxy: Callable[[Pair], Any] | None = None
    """Stands between the engine and the trainer."""
    trainer: Callable[[Pair], AbstractContextManager[None]] | None = None
    at_start: bool = False
    """The proxy's weights are loaded before the ladder begins."""
    lifted: bool = False
    """The proxy is taken away again before the ladder begins."""
    generations: tuple[str, ...] = ("V0", "V1", "generate")
    """Engine generations that it can be planted in."""

    @property
    def layer(self) -> LayerName:
        """The layer that must fail."""
        return CAUSES[self.cause].layer
