"""Are two configurations' figures equivalent, different, or not to be told apart by so few seeds?

A seed counts once: the mean of its trajectory over the common steps is one number, for steps of one run go
together. With those numbers of two configurations A and B

    different     a t-test of the mean difference rejects 0 at ``LEVEL``, Holm's correction over the figures
    equivalent    two one-sided tests (TOST) reject both that the difference is a margin or more above 0 and
                  that it is a margin or more below; the margin is ``MARGIN_SPREADS`` times the spread of
                  seeds that share a configuration
    not separable neither; ``seeds_needed`` says how many would do, were all as it was seen

The margin is itself measured, over nA + nB − 2 degrees of freedom (n − 1 where seeds are paired), so its
error stands in the test of equivalence beside that of the difference (delta method, Satterthwaite's degrees
of freedom). Equivalence is looked at first: a difference that is sure and smaller than seeds differ by is no
difference of configuration.
What these choices are worth is measured: ``benchmarks/compare_calibration.py``, ``evidence/compare/``.
"""

from dataclasses import dataclass
from math import floor, inf, isfinite, nan, sqrt

import numpy as np

from lockstep.report import student

LEVEL = 0.05
"""The chance that a whole comparison calls identical configurations different in any figure."""
MARGIN_SPREADS = 1.0
"""Equivalent: closer than the spread, one standard deviation, by which seeds of one configuration differ."""
POWER = 0.8
"""The power with which ``seeds_needed`` would come to a verdict."""
PAIRED_FROM = 6
"""Pairs from which on a difference is tested by pair: of fewer, n − 1 degrees of freedom cost more than
pairing brings, and the spread is pooled over both configurations, which is safe where pairs go together."""
MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Judged:
    """One figure of two configurations. All in the figure's own unit."""

    verdict: str
    """``equivalent``, ``different`` or ``not separable``."""
    difference: float
    """Mean of B less mean of A."""
    ci90: tuple[float, float]
    """90 % interval of the difference, by the error that equivalence is judged by; NaN with one seed."""
    margin: float
    """Inside ± this, B counts as A; NaN where no spread is known."""
    p: float
    """The p-value of no difference, before Holm's correction; NaN where it cannot be tested."""
    seeds: int
    """Seeds of the configuration that has fewer."""
    paired: bool
    seeds_needed: int
    """In each configuration, for a verdict; 0 where there is one, or nothing to tell it from."""
    reason: str = ""
    """Why there is no verdict, or what else decided."""


@dataclass(frozen=True)
class SeedMeans:
    """A figure's means over the common steps: one number a seed, in the same order where ``paired``."""

    a: np.ndarray
    b: np.ndarray
    paired: bool
    identical: bool = False
    """Every value of every step is the same in both."""


def judge_all(samples: dict[str, SeedMeans]) -> dict[str, Judged]:
    """A verdict for each figure, the chance of error held over all of them together."""
    first = {name: _tested(sample) for name, sample in samples.items()}
    known = sorted((test.p, name) for name, test in first.items() if isfinite(test.p))
    limits: dict[str, float] = {}
    going_on = True
    for rank, (p, name) in enumerate(known):  # Holm, 1979: the first that is kept keeps all after it
        limits[name] = LEVEL / (len(known) - rank)
        going_on = going_on and p <= limits[name]
        if not going_on:
            limits[name] = -1.0
    strictest = LEVEL / max(len(known), 1)
    return {name: _judged(samples[name], first[name], limits.get(name, -1.0), strictest) for name in samples}


@dataclass(frozen=True)
class _Test:
    difference: float
    p: float
    error: float
    """Standard error of the difference, by pair where they are paired."""
    freedom: float
    spread: float
    """Standard deviation of seeds within a configuration, pooled."""
    spread_freedom: float


def _tested(sample: SeedMeans) -> _Test:
    a = sample.a
    b = sample.b
    difference = float(b.mean() - a.mean()) if a.size and b.size else nan
    spread_freedom = float(a.size + b.size - 2)
    if min(a.size, b.size) < 2 or not isfinite(difference):
        return _Test(difference, nan, nan, nan, _pooled(a, b, spread_freedom), spread_freedom)
    spread = _pooled(a, b, spread_freedom)
    if sample.paired:  # what pairs have in common is in both spreads: they may say the same thing twice
        spread_freedom = a.size - 1.0
    error = spread * sqrt(1.0 / a.size + 1.0 / b.size)
    freedom = float(a.size + b.size - 2)
    by_pair = error
    pairs_freedom = freedom
    if sample.paired:
        by_pair = float((b - a).std(ddof=1)) / sqrt(a.size)
        pairs_freedom = float(a.size - 1)
        if a.size >= PAIRED_FROM:
            error = by_pair
            freedom = pairs_freedom
    # Of seeds that are all alike any difference is beyond chance.
    t = difference / error if error else (inf if difference else 0.0)
    p = student.two_sided(t, freedom)
    return _Test(difference, p, by_pair, pairs_freedom, spread, spread_freedom)


def _pooled(a: np.ndarray, b: np.ndarray, freedom: float) -> float:
    squares = sum(float(np.square(side - side.mean()).sum()) for side in (a, b) if side.size)
    return sqrt(squares / freedom) if freedom > 0 and min(a.size, b.size) else nan


def _judged(sample: SeedMeans, test: _Test, limit: float, strictest: float) -> Judged:
    seeds = int(min(sample.a.size, sample.b.size))
    margin = MARGIN_SPREADS * test.spread
    common = {"difference": test.difference, "margin": margin, "p": test.p, "seeds": seeds}
    if sample.identical:
        reason = "every value of every step is the same"
        return Judged(
            "equivalent", ci90=(0.0, 0.0), paired=sample.paired, seeds_needed=0, reason=reason, **common
        )
    if not isfinite(test.difference):
        reason = "no finite value in one of them"
        return Judged(
            "not separable", ci90=(nan, nan), paired=sample.paired, seeds_needed=0, reason=reason, **common
        )
    if seeds < 2:
        reason = "one seed says nothing of another: its spread is not known"
        return Judged(
            "not separable", ci90=(nan, nan), paired=sample.paired, seeds_needed=2, reason=reason, **common
        )
    error, freedom = _with_margin(test)
    half = student.quantile(1.0 - LEVEL, freedom) * error
    low, high = test.difference - half, test.difference + half
    equivalent = margin > 0.0 and -margin < low and high < margin
    different = not equivalent and test.p <= limit
    verdict = "equivalent" if equivalent else "different" if different else "not separable"
    needed = 0 if verdict != "not separable" else seeds_needed(test, seeds, strictest, paired=sample.paired)
    return Judged(verdict, ci90=(low, high), paired=sample.paired, seeds_needed=needed, **common)


def _with_margin(test: _Test) -> tuple[float, float]:
    """Standard error of the distance from the margin, and its degrees of freedom."""
    own = test.error**2
    of_margin = (MARGIN_SPREADS * test.spread) ** 2 / (2.0 * test.spread_freedom)
    total = own + of_margin
    if not total > 0.0:
        return 0.0, test.freedom
    freedom = total**2 / (own**2 / test.freedom + of_margin**2 / test.spread_freedom)
    # Down, which widens the interval; to tenths, so that a quantile that was bisected for is found again.
    return sqrt(total), max(1.0, floor(10.0 * freedom) / 10.0)


def seeds_needed(test: _Test, seeds: int, level: float, *, paired: bool) -> int:
    """Seeds in each configuration with which one of the two verdicts is reached with a chance of ``POWER``.

    The difference and the spreads are taken as they were seen, the level as strict as Holm's first.
    """
    margin = MARGIN_SPREADS * test.spread
    distance = abs(test.difference)
    of_one = test.error * sqrt(seeds)  # of one pair, or of one seed in each
    if not (of_one > 0.0 and isfinite(of_one)):
        return seeds + 1

    def enough(n: int) -> bool:
        freedom = n - 1.0 if paired else 2.0 * n - 2.0
        error = of_one / sqrt(n)
        reach = student.quantile(1.0 - level / 2.0, freedom) + student.quantile(POWER, freedom)
        both = student.root_sum(error, margin / sqrt(2.0 * freedom))
        # Each of the two one-sided tests has to reject, so each may fail with half of the chance.
        near = student.quantile(1.0 - LEVEL, freedom) + student.quantile(0.5 + POWER / 2.0, freedom)
        return distance >= reach * error or margin - distance >= near * both

    low = high = seeds + 1
    while high < MAX_SEEDS and not enough(high):
        low = high
        high = 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return min(high, MAX_SEEDS)
