"""Find the value of a setting under which two sides agree best, and say how well they do."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from lockstep.parity.search import keep_looking

GOLDEN = (5**0.5 - 1) / 2
IMPROVES = 0.9
"""A setting that leaves more of the miss than this is not looked at more closely."""


TAIL, TAIL_OVER_MEDIAN = 0.99, 10.0
"""What arithmetic brings has a tail ten times its median at most (``tolerances.NOISE``)."""


def miss_of(gap: Tensor | np.ndarray) -> float:
    """How badly a hypothesis explains numbers, nats: the median |gap|, or a tenth of its p99 where that is more.

    Where the model is sure of most tokens, any hypothesis explains the median one; the tail tells them apart.
    """
    size = np.abs(gap if isinstance(gap, np.ndarray) else gap.numpy(force=True))
    return float(max(np.median(size), np.quantile(size, TAIL, method="lower") / TAIL_OVER_MEDIAN))


def fitted(grid: Sequence[float], miss: Callable[[float], float], now: float, tries: int = 24) -> tuple[float, float]:
    """The best of a grid and its miss, refined between its neighbours on a logarithmic scale where it beats the miss ``now``.

    By golden sections: a bracket of width w is one of w · .618ⁿ after n tries.
    """
    misses = []
    for value in grid:
        keep_looking()
        misses.append(miss(value))
    at = int(np.argmin(misses))
    if not misses[at] < IMPROVES * now:
        return grid[at], misses[at]
    low, high = (float(np.log(grid[min(max(to, 0), len(grid) - 1)])) for to in (at - 1, at + 1))
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    left, right = miss(float(np.exp(a))), miss(float(np.exp(b)))
    for _ in range(tries - 2):
        keep_looking()
        if left < right:
            high, b, right = b, a, left
            a = high - GOLDEN * (high - low)
            left = miss(float(np.exp(a)))
        else:
            low, a, left = a, b, right
            b = low + GOLDEN * (high - low)
            right = miss(float(np.exp(b)))
    exact = float(np.exp((low + high) / 2))
    least, best = min((miss(value), value) for value in (grid[at], exact, *(float(f"{exact:.{n}g}") for n in (3, 2, 1))))
    return best, least
