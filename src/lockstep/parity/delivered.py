"""Which weights drew these tokens? The update itself is the direction that their gaps are put to.

    d_i = trainer's new score of token i − its score under the version that was proven last
    gap_i = engine − trainer's new score = −θ · d_i + noise        θ: the share of the update that is missing

θ is 0 where the engine serves the new weights, 1 where it serves the old ones, and between them where part of
the update arrived. It is estimated from the tokens that are trained on anyway, so that a sync is proven under
noise in which the canary's few tokens cannot show it: in bf16 one update moves a token by a tenth of what
rounding does. The noise needs no model: weights and the error, by prompt, are those of ``score_test.py``.
"""

from dataclasses import dataclass

import numpy as np

from lockstep.parity.explain.score_test import slant, token_weights
from lockstep.parity.tolerances import (
    DELIVERED_LEAST_MOVE,
    DELIVERED_MISSING,
    DELIVERED_PROVEN,
    DELIVERED_SETTLED,
    DELIVERED_STEPS,
    DELIVERED_Z,
)


@dataclass(frozen=True, eq=False)
class Moves:
    """Tokens, and how far the update moved each of them. [T] each; of several steps, where one is too few."""

    gap: np.ndarray
    """engine − trainer under the weights that are to be proven, nats."""
    moved: np.ndarray
    """The trainer's scores under those weights less its scores under the last proven ones, nats."""
    logprobs: np.ndarray
    """The trainer's, under those weights."""
    owners: np.ndarray
    """The prompt each token belongs to: what rounding does to it is shared by all that come after it."""

    def with_more(self, more: "Moves") -> "Moves":
        """These and those of other prompts."""
        after = int(self.owners.max(initial=-1)) + 1
        return Moves(
            np.r_[self.gap, more.gap],
            np.r_[self.moved, more.moved],
            np.r_[self.logprobs, more.logprobs],
            np.r_[self.owners, more.owners + after],
        )


@dataclass(frozen=True)
class Missing:
    """The share of an update that the engine lacks, as tokens tell it."""

    share: float
    """θ: 0 where all of it arrived, 1 where nothing did."""
    error: float
    """How far chance may have moved it (``DELIVERED_Z``); infinite where the tokens say nothing."""
    n_tokens: int

    @property
    def proven(self) -> bool:
        """True where a part of the update (``DELIVERED_PROVEN``) would have shown, had it been missing."""
        return not self.refuted and self.share + self.error < DELIVERED_PROVEN

    @property
    def refuted(self) -> bool:
        """True where part of the update is missing beyond chance."""
        return self.share > DELIVERED_MISSING and self.share > self.error

    @property
    def more_needed(self) -> int:
        """How many more tokens like these a proof needs where all of the update arrived."""
        if not np.isfinite(self.error):
            return self.n_tokens
        # The error goes with the root of their number, and has to come down to that part.
        wanted = (self.error / DELIVERED_PROVEN) ** 2 * self.n_tokens
        return max(0, int(np.ceil(wanted)) - self.n_tokens)

    def told(self) -> str:
        """What is missing and how sure that is, in words."""
        return (
            f"{self.share:.0%} (± {self.error:.0%}) of the update are missing, over {self.n_tokens} tokens"
            if np.isfinite(self.error)
            else f"{self.n_tokens} tokens say nothing of the update"
        )


def missing(moves: Moves) -> Missing:
    """How much of an update is missing: an M-estimate of θ with its sandwich error, clustered by prompt.

    From "all arrived" and from "nothing did", whichever leaves the narrower gap: the tokens' widths are those
    of what is left.
    """
    # The trainer's own rounding is in the gap and, the other way round, in the move.
    if not np.sqrt(np.square(moves.moved).mean()) > DELIVERED_LEAST_MOVE:
        return Missing(0.0, float("inf"), moves.gap.size)
    ends = [_descended(moves, start) for start in (0.0, 1.0)]
    theta = min(ends, key=lambda at: float(np.abs(moves.gap + at * moves.moved).sum()))
    left = moves.gap + theta * moves.moved
    if not left.any():
        return Missing(theta, 0.0, moves.gap.size)  # both sides run the same kernels
    weights = token_weights(left, moves.logprobs)
    pulls = np.bincount(moves.owners, moves.moved * weights)
    bent = float((np.square(moves.moved) * slant(weights, left)).sum())
    squares = np.square(pulls)
    # As if so many prompts said all of it, each alike; the share itself was fitted to one of them.
    freedom = float(squares.sum() ** 2 / max(np.square(squares).sum(), np.finfo(float).tiny)) - 1.0
    if not bent > 0.0 or freedom < 1.0:
        return Missing(theta, float("inf"), moves.gap.size)
    return Missing(theta, float(np.sqrt(squares.sum())) / bent * _student(freedom), moves.gap.size)


def _student(freedom: float) -> float:
    """``DELIVERED_Z`` standard errors where the error itself is known from so few prompts.

    Student's t at the same chance, by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5).
    """
    z = DELIVERED_Z
    return z + (z**3 + z) / (4.0 * freedom) + (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * freedom**2)


def _descended(moves: Moves, theta: float) -> float:
    for _ in range(DELIVERED_STEPS):
        left = moves.gap + theta * moves.moved
        weights = token_weights(left, moves.logprobs)
        pull = float((moves.moved * weights).sum())
        bent = float((np.square(moves.moved) * slant(weights, left)).sum())
        if not bent > 0.0:
            return theta  # nothing is left to explain
        theta -= pull / bent
        if abs(pull / bent) < DELIVERED_SETTLED:
            break
    return theta
