"""The gate: every token of a step is judged under the weights that drew it, before the step's first update.

The ladder proves the pair on probes; the gate holds every rollout to that proof. Each of these refuses on its
own: the gap is as wide as both sides' own rounding, which the ladder measured (``own_noise.py``); its median
and its mean are as the ladder measured them on this pair (a bias); the tail and the largest are what
arithmetic can bring at each token's own probability (a few wrong numbers); the objective clips no more for
the mismatch alone than layer 4 allows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.config.recipe import Objective
from lockstep.metrics.reduce import mean_over_sequences, outside_clip, quantiles_abs
from lockstep.parity.own_noise import OwnNoise
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import (
    BIAS_Z,
    GATE_MEDIAN_MULTIPLE,
    NEGLIGIBLE_NATS,
    OWN_NOISE_RATIO,
    OWN_NOISE_Z,
    P999_TOKENS,
    PHANTOM_CLIP_FRACTION,
    Tolerance,
    largest_gap,
)
from lockstep.training.step import AtSampling


@dataclass(frozen=True)
class Measured:
    """The gap that the ladder measured on this pair, nats."""

    p50: float
    mean: float
    mean_se: float

    @classmethod
    def of(cls, figures: Mapping[str, float]) -> "Measured":
        """From the figures of layer 4's verdict. Raises KeyError where one is missing."""
        return cls(figures["gap_abs_p50_nats"], figures["gap_mean_nats"], figures["gap_mean_se_nats"])


def unscored(tokens: AtSampling) -> list[str]:
    """What no override lets through: tokens that have no numbers."""
    gap = tokens.sampling_logprobs.astype(np.float64) - tokens.engine_logprobs
    if not gap.size:
        return ["no token was scored"]
    missing = int((~np.isfinite(gap)).sum())
    return [f"{missing} of {gap.size} tokens without a finite log-probability on both sides"] * bool(missing)


@dataclass(frozen=True)
class Gate:
    """What a step's tokens are held to."""

    noise: Tolerance
    """What arithmetic may bring between the two sides' dtypes."""
    temperature: float
    clip: Objective
    measured: Measured
    own: OwnNoise | None = None
    """What both sides' own rounding brings; None where it was not measured, and the table decides alone."""

    @classmethod
    def of(cls, pair: Pair, numerics: Mapping[str, Any]) -> "Gate":
        """The gate of a pair whose ladder passed, with the figures of its layer 4."""
        recipe = pair.recipe
        measured, own = Measured.of(numerics), OwnNoise.of(numerics)
        return cls(pair.noise, recipe.sampling.temperature, recipe.objective, measured, own)

    def refusals(self, tokens: AtSampling) -> list[str]:
        """Why ``tokens`` must not be trained on, a sentence each; empty when they may be."""
        if reasons := unscored(tokens):
            return reasons
        gap = tokens.sampling_logprobs.astype(np.float64) - tokens.engine_logprobs
        # All are asked: a refusal that names every sign of one fault says more of its cause than the first.
        found = (
            self._width(gap, tokens),
            self._bulk(gap),
            self._bias(gap, tokens.owners),
            self._tail(gap, tokens),
            self._clips(gap, tokens.owners),
        )
        return [reason for reason in found if reason]

    @property
    def unfelt(self) -> float:
        """A median that is never refused, nats.

        What the ladder measured may be 0 where both sides run the same kernels.
        """
        return max(NEGLIGIBLE_NATS, self.noise.p50 / GATE_MEDIAN_MULTIPLE)

    def _width(self, gap: np.ndarray, tokens: AtSampling) -> str:
        # Of a gap that is next to nothing the ratio is one rounding over another, and may be anything.
        if self.own is None or float(np.median(np.abs(gap))) <= NEGLIGIBLE_NATS:
            return ""
        ratio = self.own.ratio(gap, tokens.sampling_logprobs, tokens.owners, self.temperature)
        return f"the gap is {ratio.told()}, at most {OWN_NOISE_RATIO:g} times" if ratio.exceeded else ""

    def _bulk(self, gap: np.ndarray) -> str:
        own = self.measured.p50
        # A pair that the ladder found close is held close; one that it found wide gets no more than
        # arithmetic brings.
        limit = min(self.noise.p50, max(self.unfelt, GATE_MEDIAN_MULTIPLE * own))
        median = float(np.median(np.abs(gap)))
        return (
            ""
            if median <= limit
            else f"median |gap| {median:.2e} nats, at most {limit:.2e} (the ladder measured {own:.2e})"
        )

    def _bias(self, gap: np.ndarray, owners: np.ndarray) -> str:
        mean, error = mean_over_sequences(gap, owners)
        slack = abs(self.measured.mean) + max(self.unfelt, self.measured.p50)
        # Both means are estimates, the ladder's and this step's, and their errors are independent.
        limit = slack + BIAS_Z * float(np.hypot(error, self.measured.mean_se))
        return (
            ""
            if abs(mean) <= limit
            else f"mean gap {mean:+.2e} nats (± {error:.1e} over sequences), at most {limit:.2e}"
        )

    def _tail(self, gap: np.ndarray, tokens: AtSampling) -> str:
        # By the likelier of the two numbers: a wrong one that is too low would raise the limit that it is
        # held to.
        likelier = np.maximum(tokens.sampling_logprobs, tokens.engine_logprobs)
        limits = largest_gap(likelier, self.noise, self.temperature)
        if self.own is not None:
            # By the less likely one here: what was measured in bins of log-probability is wider there, and
            # this limit only ever tightens the other.
            least = np.minimum(tokens.sampling_logprobs, tokens.engine_logprobs)
            limits = np.minimum(limits, self.own.largest(least, self.temperature))
        beyond = np.flatnonzero(np.abs(gap) > limits)
        if beyond.size:
            worst = beyond[np.argmax(np.abs(gap[beyond]) - limits[beyond])]
            return (
                f"{beyond.size} of {gap.size} tokens beyond what arithmetic can bring at their probability: "
                f"token {worst}, of completion {tokens.owners[worst]}, is {gap[worst]:+.2e} nats off, "
                f"at most {limits[worst]:.2e}"
            )
        p999 = quantiles_abs(gap)["p999"]
        limit = self.noise.p999
        if p999 <= limit or (self.own is not None and gap.size < P999_TOKENS):
            return ""
        return f"|gap| p99.9 {p999:.2e} nats over {gap.size} tokens, at most {limit:g}"

    def _clips(self, gap: np.ndarray, owners: np.ndarray) -> str:
        low, high = self.clip.clip_low, self.clip.clip_high
        share, error = mean_over_sequences(outside_clip(gap, low, high), owners)
        # Where rounding clips some of all tokens, a step of a few hundred has more of them than another.
        slack = OWN_NOISE_Z * error if self.own is not None and np.isfinite(error) else 0.0
        if share <= PHANTOM_CLIP_FRACTION + slack:
            return ""
        outside = f"outside [{1 - low:g}, {1 + high:g}] for the mismatch alone"
        return f"{share:.2%} of the tokens lie {outside}, at most {PHANTOM_CLIP_FRACTION:.0%}"
