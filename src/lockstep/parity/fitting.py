"""Find the value of a setting under which two sides agree best, and say how well they do."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

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


def fitted(grid: Sequence[float], miss: Callable[[float], float], now: float, thirds: int = 12) -> tuple[float, float]:
    """The best of a grid and its miss, refined between its neighbours on a logarithmic scale where it beats the miss ``now``.

    ``thirds``: how often the bracket is cut to two thirds.
    """
    misses = [miss(value) for value in grid]
    at = int(np.argmin(misses))
    if not misses[at] < IMPROVES * now:
        return grid[at], misses[at]
    low, high = np.log(grid[max(at - 1, 0)]), np.log(grid[min(at + 1, len(grid) - 1)])
    for _ in range(thirds):
        third = (high - low) / 3
        a, b = low + third, high - third
        low, high = (low, b) if miss(float(np.exp(a))) < miss(float(np.exp(b))) else (a, high)
    exact = float(np.exp((low + high) / 2))
    left, best = min((miss(value), value) for value in (grid[at], exact, float(f"{exact:.2g}"), float(f"{exact:.1g}")))
    return best, left
