"""Find the value of a setting under which two sides agree best, and say how well they do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lockstep.parity.search import keep_looking
from lockstep.parity.search_tolerances import IMPROVES, TAIL, TAIL_OVER_MEDIAN

GOLDEN = (5**0.5 - 1) / 2
"""The share of a bracket at which golden sections probe it."""
ROUNDED_TO = (3, 2, 1)
"""Significant digits to which a fitted value is rounded too: people set 0.7 and not 0.69998."""


@dataclass(frozen=True, order=True)
class Fitted:
    """A value of a setting."""

    miss: float
    """What it leaves, by the measure that it was fitted with."""
    value: float


def miss_of(gap: Tensor | np.ndarray) -> float:
    """How badly a hypothesis explains numbers, nats: the median |gap|, or a tenth of its p99 where that is
    more.

    Where the model is sure of most tokens, any hypothesis explains the median one; the tail tells them apart.
    """
    size = np.abs(gap if isinstance(gap, np.ndarray) else gap.numpy(force=True))
    return float(max(np.median(size), np.quantile(size, TAIL, method="lower") / TAIL_OVER_MEDIAN))


def fitted(grid: Sequence[float], miss: Callable[[float], float], now: float, tries: int = 24) -> Fitted:
    """The best of a grid, refined between its neighbours where it beats what is missed without it.

    Args:
        grid: positive values in order, about even on a logarithmic scale.
        miss: what a value leaves.
        now: what is missed without the setting.
        tries: evaluations of ``miss`` for the refinement.
    """
    misses = []
    for value in grid:
        keep_looking()
        misses.append(miss(value))
    # Misses over a wide range have more than one dip, which golden sections alone would not see: the grid
    # finds the right one.
    at = int(np.argmin(misses))
    if not misses[at] < IMPROVES * now:
        return Fitted(misses[at], grid[at])
    low = grid[max(at - 1, 0)]
    high = grid[min(at + 1, len(grid) - 1)]
    exact = _golden(low, high, miss, tries)
    # A round value wins only where it misses less: noise moves the exact one off what was set.
    rounded = [float(f"{exact:.{digits}g}") for digits in ROUNDED_TO]
    known = Fitted(misses[at], grid[at])
    return min(known, *(Fitted(miss(value), value) for value in {exact, *rounded} - {grid[at]}))


def _golden(low: float, high: float, miss: Callable[[float], float], tries: int) -> float:
    """The value of the least miss between two, by golden sections of the logarithm.

    A bracket of width w is one of w · .618ⁿ after n tries. The two probes divide it alike from either end, so
    that after each step one of them is a probe of the narrower bracket already, and ``miss`` is evaluated
    once.
    """
    start, stop = float(np.log(low)), float(np.log(high))
    left = stop - GOLDEN * (stop - start)
    right = start + GOLDEN * (stop - start)
    miss_left = miss(float(np.exp(left)))
    miss_right = miss(float(np.exp(right)))
    for _ in range(tries - 2):
        keep_looking()
        if miss_left < miss_right:
            stop = right
            right = left
            miss_right = miss_left
            left = stop - GOLDEN * (stop - start)
            miss_left = miss(float(np.exp(left)))
        else:
            start = left
            left = right
            miss_left = miss_right
            right = start + GOLDEN * (stop - start)
            miss_right = miss(float(np.exp(right)))
    return float(np.exp((start + stop) / 2))
