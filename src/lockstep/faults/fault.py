"""What a planted fault consists of.

No torch: the catalogue is shown, and a name checked, before anything is started.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lockstep.parity.causes import CAUSES
from lockstep.records.verdicts import LayerName

if TYPE_CHECKING:
    from lockstep.parity.pair import Pair

V1 = ("V1",)
HELD = ("V1", "generate")
"""Generations that hold requests over a load."""
TrainerPlant = Callable[["Pair"], AbstractContextManager[None]]


def in_trainer(name: str) -> TrainerPlant:
    """One of ``trainer.py``, imported when it is planted."""
    return lambda pair: getattr(import_module("lockstep.faults.trainer"), name)(pair)


class Fault(Struct, frozen=True):
    """One way to break a backend. What it consists of may be combined."""

    name: str
    cause: str
    how: str
    sets: tuple[str, ...] = ()
    """Recipe overrides; those of ``engine.`` need an engine of their own."""
    worker: tuple[str, ...] = ()
    """What the engine's worker does wrong at every load."""
    proxy: Callable[["Pair"], Any] | None = None
    """Stands between the engine and the trainer."""
    trainer: TrainerPlant | None = None
    at_start: bool = False
    """The proxy's weights are loaded before the ladder begins."""
    lifted: bool = False
    """The proxy is taken away again before the ladder begins."""
    in_flight: bool = False
    """It shows where weights are loaded in flight: layer 3 does so besides, as at full depth."""
    must_say: str = ""
    """What the evidence must say, where one cause has several forms."""
    generations: tuple[str, ...] = ("V0", "V1", "generate")
    """Engine generations that it can be planted in."""

    @property
    def layer(self) -> LayerName:
        """The layer that must fail."""
        return CAUSES[self.cause].layer
