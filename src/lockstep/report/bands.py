"""Over the steps: bands for the eye, and since which step two configurations part."""

from dataclasses import dataclass

import numpy as np

DRAWS = 400
BAND = (0.05, 0.95)
FALSE_ONSET = 0.01
"""Chance that noise alone looks like a parting anywhere in a run."""


@dataclass(frozen=True)
class Band:
    """A configuration over the common steps. N is how many these are."""

    mean: np.ndarray
    """float64 [N]."""
    low: np.ndarray
    high: np.ndarray
    """The 90 % band of the mean: seeds are drawn again, and blocks of steps within each; of one seed, blocks
    alone, which says nothing of other seeds."""


def block_length(n: int) -> int:
    """Steps that go together in a resampling: the cube root's rule for means, 5 at least, a third at most."""
    return max(1, min(max(5, round(n ** (1 / 3))), n // 3))


def band_of(runs: np.ndarray, seed: int = 0) -> Band:
    """The block-bootstrap band of the mean over runs.

    Args:
        runs: float64 [S, N], S seeds over N steps; NaN where nothing was logged.
    """
    n_runs, n = runs.shape
    mean = _nanmean(runs)
    smooth = np.stack([smoothed(run, block_length(n)) for run in runs])
    residue = np.nan_to_num(runs - smooth)
    random = np.random.default_rng(seed)
    length = block_length(n)
    draws = np.empty((DRAWS, n))
    blocks = -(-n // length)
    # What moves slowly stays where it is; what scatters about it is drawn again, in blocks of steps.
    for draw in range(DRAWS):
        picks = random.integers(0, n_runs, n_runs)
        starts = random.integers(0, n - length + 1, (n_runs, blocks))
        at = (starts[:, :, None] + np.arange(length)).reshape(n_runs, -1)[:, :n]
        draws[draw] = _nanmean(smooth[picks] + np.take_along_axis(residue[picks], at, 1))
    low, high = np.quantile(draws, BAND, axis=0)
    return Band(mean, low, high)


def smoothed(values: np.ndarray, length: int) -> np.ndarray:
    """The centred moving mean over ``length`` steps, shorter at the ends, of what is finite. float64 [N]."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(values.size)
    low = np.maximum(at - length // 2, 0)
    high = np.minimum(at + (length + 1) // 2, values.size)
    counted = counts[high] - counts[low]
    return np.where(counted > 0, (sums[high] - sums[low]) / np.maximum(counted, 1), np.nan)


def onset(difference: np.ndarray) -> int | None:
    """The first step from which the difference stays on one side, by more than noise brings; None for none.

    Noise is what differs from one step to the next (a median of second differences, so that neither a jump
    nor a slope counts); the difference is looked at in means of a block, with Bonferroni's correction over
    blocks.

    Args:
        difference: float64 [N], B less A, the mean over seeds.
    """
    from statistics import NormalDist

    values = difference[np.isfinite(difference)]
    n = values.size
    if n < 4:
        return None
    length = block_length(n)
    # A second difference of independent steps is √6 as wide as a step, and a normal's median |x| is .6745.
    noise = float(np.median(np.abs(np.diff(values, 2)))) / (0.6745 * np.sqrt(6.0))
    limit = NormalDist().inv_cdf(1.0 - FALSE_ONSET / 2.0 / max(1, n // length)) * noise / np.sqrt(length)
    ahead = np.array([values[at : at + length].mean() for at in range(n - length + 1)])
    outside = np.abs(ahead) > limit
    if not outside[-1]:
        return None
    same = outside & (np.sign(ahead) == np.sign(ahead[-1]))
    last_inside = np.flatnonzero(~same)
    at = int(last_inside[-1]) + 1 if last_inside.size else 0
    # The block that first leaves may do so by its end alone.
    while (
        at < n - 1
        and length > 1
        and not (abs(values[at]) > limit and np.sign(values[at]) == np.sign(ahead[-1]))
    ):
        at += 1
    return int(np.flatnonzero(np.isfinite(difference))[at])


def _nanmean(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    counts = finite.sum(0)
    return np.where(counts > 0, np.where(finite, values, 0.0).sum(0) / np.maximum(counts, 1), np.nan)
