"""Is there a direction in a gap, and which? Rao's score test of many directions at once, under any noise.

Rounding makes the gap between two right implementations wide, and (nearly) symmetric and independent from
sequence to sequence. A fault is a direction: token i's gap moves by θ·∂ log p_i / ∂θ. The score of a
direction in sequence s is its pull N_s (``policy/pulls.py``), and

    t = Σ_s N_s / √(Σ_s N_s²)

needs no model of the noise: it is normalised by the sequences themselves (a sandwich variance, clustered by
sequence). How large the largest of all |t| gets where nothing is the matter is seen by flipping the signs of
whole sequences, the same for every direction (Westfall and Young's max-T): directions may overlap as they
like, and the chance that any of them is called by accident is the level that was asked for.

The gap of token i enters as

    a_i = exp(−gap_i / 2) · clip(gap_i / w_i, ±c) / w_i      w_i: the gap's width at that probability

Clipped, so that a few wild tokens say no more than others. The factor makes the mean of noise nothing: an
engine draws a token from its own numbers, rounding included, and so the more often the higher it rounded
them, by which log p_engine − log p_trainer has the mean σ²/2 > 0. Under √(p_engine · p_trainer) it has none,
up to third order: that is what is left of p_engine · exp(−gap/2).
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from lockstep.parity.search_tolerances import (
    NARROWEST,
    SCORE_ALIKE,
    SCORE_FLIPS,
    SCORE_LEVEL,
    SCORE_POWER,
    SCORE_WINSOR,
)
from lockstep.parity.tolerances import SIGMA_OVER_MEDIAN

BINS = 8
"""Bins of the tokens by log-probability, within each of which the gap's width is taken to be one number."""


@dataclass(frozen=True, eq=False)
class TestedDirections:
    """What a gap says of each direction."""

    t: np.ndarray
    """float64 [K]; 0 where no sequence feels the direction."""
    p: np.ndarray
    """The chance of so large a |t| for any of the K directions where nothing is the matter: float64 [K]."""
    critical: float
    """What the largest |t| stays below with a chance of 1 − SCORE_LEVEL."""

    @property
    def best(self) -> int:
        """The direction with the largest |t|."""
        return int(np.abs(self.t).argmax())

    @property
    def significant(self) -> bool:
        """True where chance does not explain the best one."""
        return bool(self.p[self.best] <= SCORE_LEVEL)


def score_test(pulls: np.ndarray, seed: int = 0) -> TestedDirections:
    """Test every direction against no direction at all.

    Args:
        pulls: N_s of each direction and sequence, float64 [K, S]. Sequences that share what is wrong with
            them by accident (completions of one prompt, if noise is the prompt's) are to be summed first.
    """
    t = statistic(pulls)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (pulls.shape[1], SCORE_FLIPS))
    size = np.sqrt(np.square(pulls).sum(1))
    null = np.zeros(SCORE_FLIPS)
    # In portions: every direction under every flip is a matrix that grows with the model.
    for first in range(0, len(pulls), 256):
        part = slice(first, first + 256)
        flipped = pulls[part] @ signs
        # In place: arrays of this size are given back to the system and zeroed anew each time.
        np.abs(flipped, out=flipped)
        flipped /= np.maximum(size[part, None], np.finfo(float).tiny)
        # The largest |t| of all directions under one and the same flip: they are correlated, and a bound that
        # took them for independent would see less.
        null = np.maximum(null, flipped.max(0, initial=0.0))
    # A flip that gives the very t again, the identity among few sequences, counts as no smaller for its
    # rounding.
    beaten = np.searchsorted(np.sort(null), np.abs(t) - 1e-9)
    # What was measured is one of the flips: no p is 0.
    p = (1.0 + SCORE_FLIPS - beaten) / (1.0 + SCORE_FLIPS)
    return TestedDirections(t, p, float(np.quantile(null, 1.0 - SCORE_LEVEL)))


def statistic(pulls: np.ndarray) -> np.ndarray:
    """t of each direction, float64 [K]."""
    size = np.sqrt(np.square(pulls).sum(1))
    return np.divide(pulls.sum(1), size, out=np.zeros(len(pulls)), where=size > 0.0)


def alike(pulls: np.ndarray, one: int) -> np.ndarray:
    """The directions that these sequences cannot tell from ``one``: int [M], itself first, likeliest next.

    Two directions are one function to first order (a matrix behind another, a norm and what it feeds) where
    the sequences feel them in proportion.
    """
    size = np.sqrt(np.square(pulls).sum(1))
    ties = np.abs(pulls @ pulls[one]) / np.maximum(size * size[one], np.finfo(float).tiny)
    # Itself first, whatever rounding makes of its own correlation.
    ties[one] = np.inf
    order = np.argsort(-ties, kind="stable")
    return order[ties[order] >= SCORE_ALIKE]


def token_weights(gap: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """a_i of each token, float64 [T].

    Args:
        gap: log p_engine − log p_trainer, nats.
        logprobs: of either side.
    """
    width = widths(gap, logprobs)
    return np.exp(-gap / 2.0) * np.clip(gap / width, -SCORE_WINSOR, SCORE_WINSOR) / width


def widths(gap: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """How wide the gap is at each token's probability, by the median |gap| of the tokens like it: float64
    [T].

    It is blind to signs, which is all that the flips need of it.
    """
    edges = np.quantile(logprobs, np.linspace(0.0, 1.0, BINS + 1)[1:-1])
    bins = np.searchsorted(edges, logprobs)
    found = np.empty(gap.size)
    least = max(
        SIGMA_OVER_MEDIAN * float(np.median(np.abs(gap))) * NARROWEST, float(np.finfo(np.float32).eps)
    )
    for number in np.unique(bins):
        found[bins == number] = SIGMA_OVER_MEDIAN * np.median(np.abs(gap[bins == number]))
    return np.maximum(found, least)


def detectable(pulls: np.ndarray, probed: np.ndarray, critical: float, seed: int = 0) -> np.ndarray:
    """|θ| of each direction that would be called with a chance of ``SCORE_POWER``: float64 [K].

    θ moves Σ_s N_s by θ · I, where I = Σ_i g_i² · a_i / gap_i is the information, and noise moves it by √V
    with V = Σ_s N_s², whatever ties a sequence's tokens together. So θ · I / √V is one number for every
    direction: the shift that takes simulated noise above ``critical``. Noise and information are spread over
    the sequences as they are here, on average over the directions.

    Args:
        pulls: N_s of what was found to be noise, float64 [K, S].
        probed: pulls of the same tokens with the weights ± √(a_i / gap_i), signs thrown by a coin
            (Hutchinson): their squares are a sequence's information on average.
        critical: of the test that was made. Fewer sequences than critical² see nothing: t is at most √S.
    """
    noisy, known = (_shares(np.square(each)) for each in (pulls, probed))
    noise = np.random.default_rng(seed).normal(size=(SCORE_FLIPS, pulls.shape[1])) * np.sqrt(noisy)

    def seen(shift: float) -> bool:
        return bool(np.quantile(statistic(noise + shift * known), 1.0 - SCORE_POWER) > critical)

    # The chance grows with the shift, so a search by halves finds the least that is enough.
    shifts = np.geomspace(1.0, 100.0, 200)
    first = bisect_left(range(len(shifts)), True, key=lambda n: seen(float(shifts[n])))
    if first == len(shifts):
        return np.full(len(pulls), np.inf)
    spread = shifts[first] * np.sqrt(np.square(pulls).sum(1))
    information = np.square(probed).sum(1)
    return np.divide(spread, information, out=np.full(len(pulls), np.inf), where=information > 0.0)


def _shares(squares: np.ndarray) -> np.ndarray:
    """Each sequence's part of the whole, on average over the directions that are felt: float64 [S]."""
    whole = squares.sum(1)
    return (squares[whole > 0.0] / whole[whole > 0.0, None]).mean(0)


def curvature(gap: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """a_i / gap_i, what a gap one nat larger adds to a_i on average: float64 [T]."""
    return slant(token_weights(gap, logprobs), gap)


def slant(weights: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """:func:`curvature`, where the a_i are at hand: their widths are most of the work."""
    return np.divide(weights, gap, out=np.zeros_like(weights), where=gap != 0.0)
