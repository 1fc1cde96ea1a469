"""Layer 1: the top-k, top-p or min-p under which an engine's numbers are renormalised, fitted from the
numbers themselves.

Where tokens are cut, each number exceeds the whole distribution's by −log(kept mass). The mass says how many
tokens were kept at each place; a constant count is top-k, a constant mass top-p, a constant ratio to the
likeliest min-p. Each fit proposes settings; the one under which the numbers agree best is the answer.
"""

from dataclasses import dataclass

from msgspec.structs import replace
from torch import Tensor

from lockstep.parity.explain.semantics.held import Held
from lockstep.parity.search_tolerances import EXPLAINS
from lockstep.parity.tolerances import KEPT_MASS_SLACK, RARELY_ABOVE
from lockstep.policy.truncation import kept
from lockstep.records.tokens import SamplingParams

USUAL_TOP_K = (10, 20, 40, 50, 64, 100)
"""Tried beside the largest count of tokens kept, which is k only where no top-p cut further."""
WHOLE = SamplingParams(max_tokens=1)
"""No truncation at all."""


@dataclass(frozen=True)
class Truncation:
    """A truncation that explains the numbers."""

    name: str
    """With its value, for people: ``top-k 50``."""
    miss: float
    """What it leaves, nats (``fitting.miss_of``)."""


@dataclass(frozen=True, eq=False)
class Cut:
    """The places at which tokens were cut: M of the N that are held."""

    ordered: Tensor
    """Probabilities, the likeliest first: float64 [M, V]."""
    cumulative: Tensor
    """Their running sums: float64 [M, V]."""
    mass: Tensor
    """What the numbers say was kept: float64 [M]."""
    count: Tensor
    """How many tokens that mass is of, fewer than V: int64 [M]."""
    median_count: int
    """The median over all N places, those where nothing was cut too."""

    @property
    def last(self) -> Tensor:
        """Probability of the least likely token that was kept, float64 [M]."""
        return self.ordered.gather(1, self.count[:, None] - 1)[:, 0]

    @property
    def following(self) -> Tensor:
        """Probability of the likeliest token that was not, float64 [M]."""
        return self.ordered.gather(1, self.count[:, None])[:, 0]

    @property
    def held(self) -> Tensor:
        """Mass of the tokens that were kept, float64 [M]."""
        return self.cumulative.gather(1, self.count[:, None] - 1)[:, 0]


def fitted_truncation(held: Held, limit: float) -> Truncation | None:
    """The truncation under which the numbers are renormalised; None where none fits.

    Args:
        held: the tokens; their logits are tempered already.
        limit: a fit is an explanation when it misses by at most this, nats.
    """
    whole = held.logits.log_softmax(-1)
    cut = _cut(whole, held, limit)
    if cut is None:
        return None
    misses = {}
    for name, setting in {**_top_k(cut), **_top_p(cut), **_min_p(cut), **_both(cut)}.items():
        misses[name] = held.left(whole.masked_fill(~kept(whole, setting), float("-inf")))
    best = min(misses, key=lambda name: misses[name])
    # A few numbers that are off for another reason propose settings too, which then cut next to nothing.
    explains = misses[best] <= min(limit, EXPLAINS * held.left(whole))
    return Truncation(best, misses[best]) if explains else None


def _cut(whole: Tensor, held: Held, limit: float) -> Cut | None:
    """Where tokens were cut, by the numbers; None where nowhere, or where they cannot be of a truncation."""
    slack = KEPT_MASS_SLACK * limit
    mass = (whole.gather(1, held.ids[:, None])[:, 0] - held.engine).double().exp()  # [N]
    if (mass > 1.0 + slack).double().mean() > RARELY_ABOVE or (mass > 1.0 - slack).all():
        return None
    ordered = whole.sort(-1, descending=True).values.double().exp()
    cumulative = ordered.cumsum(-1)
    count = (cumulative < mass[:, None] - slack).sum(-1) + 1  # [N] tokens kept
    cut = count < whole.shape[1]
    if not cut.any():
        return None
    return Cut(ordered[cut], cumulative[cut], mass[cut], count[cut], int(count.median()))


def _top_k(cut: Cut) -> dict[str, SamplingParams]:
    """Every place keeps k tokens."""
    # Where the next token's probability is below the noise the count falls short, so the largest is the best
    # guess too.
    ks = {cut.median_count, int(cut.count.max())}
    return {f"top-k {k}": replace(WHOLE, top_k=k) for k in ks}


def _top_p(cut: Cut) -> dict[str, SamplingParams]:
    """Before its last token each place holds less than p, with it p or more: p lies in between."""
    crossing = float((cut.held - cut.last).max() + cut.held.min()) / 2
    least = float(cut.mass.min())
    ps = {crossing, round(crossing, 2), least, round(least, 2)}
    return {f"top-p {value:.3g}": replace(WHOLE, top_p=value) for value in ps if 0.0 < value < 1.0}


def _min_p(cut: Cut) -> dict[str, SamplingParams]:
    """The last token that was kept is at least m times as likely as the first, the one after it less."""
    likeliest = cut.ordered[:, 0]
    least = float((cut.last / likeliest).min())
    between = float((cut.last / likeliest).min() + (cut.following / likeliest).max()) / 2
    ms = {between, least, round(least, 2)}
    return {f"min-p {value:.3g}": replace(WHOLE, min_p=value) for value in ms if 0.0 < value < 1.0}


def _both(cut: Cut) -> dict[str, SamplingParams]:
    """Top-k and top-p together.

    Where fewer than k tokens are kept, top-p cut what top-k had left, and its mass is a share of those k.
    """
    largest = int(cut.count.max())
    tried = {}
    for top_k in sorted({largest, *(k for k in USUAL_TOP_K if k > largest)}):
        fewer = cut.count < top_k
        if not fewer.any() or top_k > cut.cumulative.shape[1]:
            continue
        of_k = cut.cumulative[fewer] / cut.cumulative[fewer, top_k - 1][:, None]
        last = cut.count[fewer, None] - 1
        held = of_k.gather(1, last)[:, 0]
        before = of_k.gather(1, (last - 1).clamp(min=0))[:, 0] * (last[:, 0] > 0)
        middle = float(held.min() + before.max()) / 2
        for top_p in (middle, round(middle, 2)):
            if 0.0 < top_p < 1.0:
                tried[f"top-k {top_k} and top-p {top_p:.3g}"] = replace(WHOLE, top_k=top_k, top_p=top_p)
    return tried
