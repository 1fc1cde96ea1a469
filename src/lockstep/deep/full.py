"""What each layer's verdict gains at ``--depth full``."""

from collections.abc import Callable

from lockstep.deep import factors, in_flight
from lockstep.deep.factors import Opener
from lockstep.parity.layers import directions
from lockstep.parity.pair import Pair
from lockstep.records.verdicts import LayerName, Verdict


def deeper(pair: Pair, open_engine: Opener) -> dict[LayerName, Callable[[Verdict], Verdict]]:
    """For :func:`lockstep.parity.ladder.climb`: layer → what deepens its PASS.

    Args:
        open_engine: starts another engine, with settings of its own.
    """
    return {
        "path": lambda verdict: factors.deepen(pair, verdict, open_engine),
        "weights": lambda verdict: in_flight.deepen(pair, verdict),
        "numerics": lambda verdict: directions.deepen(pair, verdict),
    }
