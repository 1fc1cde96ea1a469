"""From per-token arrays to figures. Numpy only; a non-finite token is never dropped."""

import numpy as np


def quantiles_abs(gap: np.ndarray) -> dict[str, float]:
    """|gap| as p50, p90, p99, p999 and max, nats. Any non-finite token makes all of them NaN.

    Args:
        gap: float [T], nats.
    """
    names = ("p50", "p90", "p99", "p999", "max")
    if gap.size == 0 or not np.isfinite(gap).all():
        return dict.fromkeys(names, float("nan"))
    return dict(zip(names, np.quantile(np.abs(gap), (0.5, 0.9, 0.99, 0.999, 1.0)).tolist(), strict=True))


def mean_over_sequences(values: np.ndarray, owners: np.ndarray) -> tuple[float, float]:
    """The mean over tokens, and its standard error where whole sequences are what is drawn.

    Tokens of one go together.

    Args:
        values: float [T].
        owners: int [T], the sequence each token belongs to.

    Returns:
        Mean and standard error; the error of a single sequence is infinite, for it says nothing of another.
    """
    mean = float(values.mean())
    _, inverse = np.unique(owners, return_inverse=True)
    # Sequences differ in length, so the mean is a ratio of two sums: its error is that of each sequence's
    # distance from the common mean, and n / (n − 1) pays for a mean that is estimated from the same.
    residues = np.bincount(inverse, values.astype(np.float64) - mean)
    n = residues.size
    if n < 2:
        return mean, float("inf")
    return mean, float(np.sqrt(np.square(residues).sum() * n / (n - 1)) / values.size)


def kl_k3(log_ratio: np.ndarray) -> float:
    """mean(exp d − d − 1) ≥ 0, nats (Schulman, "Approximating KL divergence", 2020, estimator k3)."""
    d = log_ratio.astype(np.float64)
    # Of a small d only d² / 2 is left, which exp(d) − 1 would have rounded away.
    return float(np.mean(np.expm1(d) - d))


def effective_sample_size(log_ratio: np.ndarray) -> float:
    """(Σr)² / (n Σr²) with r = exp(log_ratio): 1 when all ratios are alike."""
    ratio = np.exp(log_ratio.astype(np.float64))
    return float(ratio.sum() ** 2 / (ratio.size * np.square(ratio).sum()))


def outside_clip(log_ratio: np.ndarray, clip_low: float, clip_high: float) -> np.ndarray:
    """Which ratios lie outside [1 − clip_low, 1 + clip_high]; a non-finite one does. bool [T]."""
    ratio = np.exp(log_ratio.astype(np.float64))
    # Negated, for a NaN compares false on either side and has to lie outside.
    return ~((ratio >= 1.0 - clip_low) & (ratio <= 1.0 + clip_high))


MISMATCH = (
    *("gap_abs_mean_nats", "gap_abs_p50_nats", "gap_abs_p999_nats", "gap_abs_max_nats"),
    *("mismatch_ratio_mean", "mismatch_kl_k3_nats", "mismatch_ess", "phantom_clip_fraction"),
)
"""What :func:`mismatch_figures` gives."""


def mismatch_figures(gap: np.ndarray, clip_low: float, clip_high: float) -> dict[str, float]:
    """Every figure of trainer against engine on version-exact tokens, by catalog name."""
    quantiles = quantiles_abs(gap)
    return {
        "gap_abs_mean_nats": float(np.abs(gap).mean()),
        "gap_abs_p50_nats": quantiles["p50"],
        "gap_abs_p999_nats": quantiles["p999"],
        "gap_abs_max_nats": quantiles["max"],
        "mismatch_ratio_mean": float(np.exp(gap.astype(np.float64)).mean()),
        "mismatch_kl_k3_nats": kl_k3(gap),
        "mismatch_ess": effective_sample_size(gap),
        "phantom_clip_fraction": float(outside_clip(gap, clip_low, clip_high).mean()),
    }


def policy_figures(log_ratio: np.ndarray, clip_low: float, clip_high: float) -> dict[str, float]:
    """Every figure of the policy now against the policy that sampled, by catalog name."""
    return {
        "policy_ratio_mean": float(np.exp(log_ratio.astype(np.float64)).mean()),
        "policy_kl_k3_nats": kl_k3(log_ratio),
        "policy_ess": effective_sample_size(log_ratio),
        "outside_clip_fraction": float(outside_clip(log_ratio, clip_low, clip_high).mean()),
    }


def bootstrap_mean_ci95(
    values: np.ndarray, groups: np.ndarray, seed: int = 0, draws: int = 500
) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` under resampling of groups (a completion's tokens go together).

    Args:
        values: float [T].
        groups: int [T], the completion each token belongs to.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    sums = np.bincount(inverse, values.astype(np.float64))
    counts = np.bincount(inverse)
    random = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):  # one at a time: a log has 10⁵ groups
        picks = random.integers(0, len(sums), len(sums))
        means[draw] = sums[picks].sum() / counts[picks].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
