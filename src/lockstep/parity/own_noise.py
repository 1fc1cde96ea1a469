"""How wide two sides' own rounding makes the gap between them, by each token's probability: measured on the
pair, and taken from no table.

    engine    A − B    the same tokens from decode and from prefill: two of its own roundings, so 1/√2 of it
              or what the trainer's own model brings in the engine's dtype, where that is more
    trainer   C − D    the trainer beside its own model in fp32

Rounding moves a token's log-odds, whatever they are, and its log p by (1 − p) of that. The widths are kept
of the log-odds, in bins of log p, and the gap is held against √(engine² + trainer²): a ratio, which is about
1 for two right implementations of any model, however large.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.parity.tolerances import (
    NEGLIGIBLE_NATS,
    OWN_NOISE_CERTAIN,
    OWN_NOISE_LARGEST,
    OWN_NOISE_RATIO,
    OWN_NOISE_SEQUENCES,
    OWN_NOISE_Z,
    SIGMA_OVER_MEDIAN,
)

BINS, FEWEST = 6, 64
"""Bins of log p at most, and tokens in each at least."""
GRID = np.geomspace(0.05, 100.0, 153)
"""Ratios between which the interval's ends are told, 5 % apart."""


@dataclass(frozen=True)
class Ratio:
    """How wide a gap is, in widths of both sides' own noise."""

    value: float
    low: float
    """Lower end of its interval, ``OWN_NOISE_Z`` standard errors over sequences."""
    high: float

    @property
    def exceeded(self) -> bool:
        """True where the two sides' own noise does not explain the width."""
        return self.low > OWN_NOISE_RATIO

    def told(self) -> str:
        """The ratio and its interval, in words."""
        return (
            f"{self.value:.2f} times as wide as both sides' own rounding ({self.low:.2f} to {self.high:.2f})"
        )


@dataclass(frozen=True)
class OwnNoise:
    """Widths (a normal error's standard deviation) of the log-odds at T = 1, nats, by bin of log p."""

    edges: tuple[float, ...]
    """log p between two bins, ascending."""
    engine: tuple[float, ...]
    trainer: tuple[float, ...]

    @classmethod
    def measured(cls, logprobs: np.ndarray, engine: list[np.ndarray], trainer: np.ndarray) -> "OwnNoise":
        """From what each side differs by from itself.

        Args:
            logprobs: of the tokens, float [T].
            engine: widths of whichever is the wider are taken, each float [T], nats.
            trainer: float [T], nats.
        """
        # A median of fewer tokens is noise about noise.
        n = max(1, min(BINS, logprobs.size // FEWEST))
        edges = np.quantile(logprobs, np.linspace(0.0, 1.0, n + 1)[1:-1])
        bins = np.searchsorted(edges, logprobs)
        odds = _unlikely(logprobs)

        def widths(error: np.ndarray) -> np.ndarray:
            # An error of the logits moves log p by (1 − p) of it: what is left is of the logits, and alike
            # over tokens.
            sizes = np.abs(error) / odds
            medians = [np.median(sizes[bins == b]) if (bins == b).any() else 0.0 for b in range(n)]
            return SIGMA_OVER_MEDIAN * np.array(medians)

        # There are several ways in which an engine differs from itself; the gap has whichever is the widest.
        of_engine = np.max([widths(error) for error in engine], axis=0)
        return cls(tuple(edges.tolist()), tuple(of_engine.tolist()), tuple(widths(trainer).tolist()))

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> "OwnNoise | None":
        """From the figures of layer 4's verdict; None where it was not measured there."""
        known = figures.get("own_noise")
        return cls(**{name: tuple(values) for name, values in known.items()}) if known else None

    def figures(self) -> dict[str, list[float]]:
        """What a verdict keeps of it, by name."""
        return {"edges": list(self.edges), "engine": list(self.engine), "trainer": list(self.trainer)}

    def widths(self, logprobs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """The width that both roundings explain of the gap at each token, nats, float64 [T]."""
        # Two computations that round independently. A temperature below 1 stretches logits, and their noise;
        # what one above 1 takes off is left in: wider refuses less.
        both = np.hypot(self.engine, self.trainer) / min(1.0, temperature)
        # By about what log p was at T = 1, where the bins were measured.
        bins = np.searchsorted(self.edges, np.asarray(logprobs, np.float64) * max(1e-9, temperature))
        return np.maximum(both[bins] * _unlikely(logprobs), np.finfo(np.float32).eps)

    def largest(self, logprobs: np.ndarray, temperature: float) -> np.ndarray:
        """The largest |gap| that this noise brings at each token, nats, float64 [T]."""
        return NEGLIGIBLE_NATS + OWN_NOISE_LARGEST * self.widths(logprobs, temperature)

    def ratio(
        self, gap: np.ndarray, logprobs: np.ndarray, owners: np.ndarray, temperature: float = 1.0
    ) -> Ratio:
        """How wide a gap is beside this noise, by the tokens in the middle.

        The median's interval is where the share of tokens beyond is one half within its error; tokens of one
        sequence share their noise, so the error is over sequences.

        Args:
            gap: nats, float [T].
            owners: the sequence of each token, int [T].
        """
        sizes = SIGMA_OVER_MEDIAN * np.abs(gap) / self.widths(logprobs, temperature)
        lengths = np.bincount(owners)
        if np.count_nonzero(lengths) < OWN_NOISE_SEQUENCES:
            return Ratio(float(np.median(sizes)), 0.0, float("inf"))
        beyond, error = np.empty(GRID.size), np.empty(GRID.size)
        for at, ratio in enumerate(GRID):
            by_sequence = np.bincount(owners, sizes > ratio, lengths.size)
            beyond[at] = by_sequence.sum() / sizes.size
            # Tokens of a sequence share noise through its hidden states: sequences are what is independent.
            error[at] = np.sqrt(np.square(by_sequence - beyond[at] * lengths).sum()) / sizes.size
        surely = beyond - OWN_NOISE_Z * error > 0.5
        never = beyond + OWN_NOISE_Z * error < 0.5
        low = float(GRID[surely].max(initial=0.0))
        high = float(GRID[never].min(initial=np.inf))
        return Ratio(float(np.median(sizes)), low, high)


def _unlikely(logprobs: np.ndarray) -> np.ndarray:
    """1 − p, float64 [T]."""
    return np.maximum(-np.expm1(np.minimum(np.asarray(logprobs, np.float64), 0.0)), OWN_NOISE_CERTAIN)
