"""Find the value of a setting under which two sides agree best."""

from collections.abc import Callable, Sequence

import numpy as np

IMPROVES = 0.9
"""A setting that leaves more of the miss than this is not looked at more closely."""


def fitted(grid: Sequence[float], miss: Callable[[float], float], now: float) -> tuple[float, float]:
    """The best of a grid and its miss, refined between its neighbours on a logarithmic scale where it beats the miss ``now``."""
    misses = [miss(value) for value in grid]
    at = int(np.argmin(misses))
    if not misses[at] < IMPROVES * now:
        return grid[at], misses[at]
    low, high = np.log(grid[max(at - 1, 0)]), np.log(grid[min(at + 1, len(grid) - 1)])
    for _ in range(12):
        third = (high - low) / 3
        a, b = low + third, high - third
        low, high = (low, b) if miss(float(np.exp(a))) < miss(float(np.exp(b))) else (a, high)
    exact = float(np.exp((low + high) / 2))
    left, best = min((miss(value), value) for value in (grid[at], exact, float(f"{exact:.2g}"), float(f"{exact:.1g}")))
    return best, left
