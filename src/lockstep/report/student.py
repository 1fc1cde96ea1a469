"""Student's t: distribution and quantile, to what a double holds. The standard library only."""

from functools import lru_cache
from math import exp, inf, isinf, lgamma, log, log1p, sqrt


def cdf(t: float, freedom: float) -> float:
    """P(T ≤ t) with ``freedom`` > 0 degrees of freedom; 0 and 1 at −inf and inf."""
    if isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * _beta(freedom / (freedom + t * t), freedom / 2.0, 0.5)
    return 1.0 - tail if t > 0 else tail


@lru_cache(maxsize=4096)
def quantile(chance: float, freedom: float) -> float:
    """The t with ``cdf(t, freedom) == chance``, by bisection; ±inf at 1 and 0."""
    if chance in (0.0, 1.0):
        return inf if chance else -inf
    if chance < 0.5:
        return -quantile(1.0 - chance, freedom)
    low, high = 0.0, 1.0
    while cdf(high, freedom) < chance:
        low = high
        high = 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if cdf(middle, freedom) < chance else (low, middle)
    return high


def two_sided(t: float, freedom: float) -> float:
    """P(|T| ≥ |t|)."""
    return 0.0 if isinf(t) else _beta(freedom / (freedom + t * t), freedom / 2.0, 0.5)


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function (Numerical Recipes, 6.4), for 0 ≤ x ≤ 1."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x))
    # The fraction converges fast on this side of the mean; the other side is reached by symmetry.
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _fraction(x, a, b) / a
    return 1.0 - front * _fraction(1.0 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """Its continued fraction, by Lentz's method."""
    # A term of Lentz's may be 0, and the next is divided by it.
    tiny = 1e-300
    c = 1.0
    d = 1.0 / _away(1.0 - (a + b) * x / (a + 1.0), tiny)
    result = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away(1.0 + term * d, tiny)
            c = _away(1.0 + term / c, tiny)
            result *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return result


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def root_sum(*parts: float) -> float:
    """The square root of the sum of squares."""
    return sqrt(sum(part * part for part in parts))
