"""Planted faults: ways to break a real backend on purpose, each with the layer and the cause that must be named for it.

A check that cannot fail is no check; ``tests/e2e/test_ladder.py`` plants every one of these in a real engine.
"""

from msgspec import Struct

from lockstep.errors import UsageError
from lockstep.records.verdicts import LayerName


class Fault(Struct, frozen=True):
    """One way to break a backend."""

    name: str
    layer: LayerName
    cause: str
    how: str


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault(
            "stale_head",
            "weights",
            "stale_head",
            "vLLM's worker does not rebuild the head's packed copy after a load (CPU, body and head of one dtype)",
        ),
        Fault("not_delivered", "weights", "not_delivered", "vLLM's worker reads the weights file and loads nothing"),
    )
}


def planted(names: list[str]) -> tuple[str, ...]:
    """Check the names of faults to plant.

    Raises:
        UsageError: for one that is not known.
    """
    for name in names:
        if name not in FAULTS:
            raise UsageError("flag --plant", got=repr(name), expected=f"one of {', '.join(FAULTS)}", hint="--plant stale_head")
    return tuple(names)
