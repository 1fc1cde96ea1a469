"""Layer 1: a truncation together with a penalty or another temperature, where neither alone explains the
numbers.

What goes before the truncation is one number, which is fitted; for each of its values one sort gives the
numbers under every top-k at once, and under the top-p that the kept masses point to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.explain.fitting import fitted, miss_of
from lockstep.parity.explain.semantics.held import SCREENED_TOKENS, Held, spread
from lockstep.parity.explain.semantics.hypotheses import penalised
from lockstep.parity.explain.semantics.penalties import Seen
from lockstep.parity.explain.semantics.sampler import TEMPERATURES, Explained
from lockstep.parity.search_tolerances import EXPLAINS, LARGEST_TOP_K, LEAST_P, SCREEN_SLACK

REPETITION = tuple(float(1.0 + v) for v in np.geomspace(0.02, 1.0, 10))
ADDED = tuple(float(v) for v in np.geomspace(0.05, 2.0, 10))
RANKS = LARGEST_TOP_K // 4
"""How many of a token's candidates are sorted. Not all, as where one sort does: these are sorted again for
every value of every kind that is tried, some thirty of each."""


class Truncated(NamedTuple):
    """How well a truncation fits; the least is the best."""

    miss: float
    """``fitting.miss_of``, nats."""
    name: str
    """``top-k 20``."""


class Kind(NamedTuple):
    """One number that may go before a truncation."""

    cause: str
    name: str
    values: Sequence[float]
    """Tried first."""
    edit: Callable[[Tensor, float, np.ndarray], Tensor]
    """What a value does to the logits of tokens ``at``: of (logits, value, at)."""


class UnderTruncation:
    """Numbers under a truncation of processed logits.

    Args:
        z: float32 [N, V].
        ids: int64 [N], what was drawn.
        engine: float32 [N], what was reported for it.
    """

    def __init__(self, z: Tensor, ids: Tensor, engine: Tensor) -> None:
        self.engine = engine
        self.drawn = z.gather(1, ids[:, None])[:, 0]
        self.whole = z.logsumexp(-1)
        ordered = z.topk(min(RANKS, z.shape[1])).values
        self.kept = ordered.logcumsumexp(-1)  # [N, K]
        self.below = ordered > self.drawn[:, None]

    def best(self) -> Truncated:
        """The truncation under which they miss least."""
        return min(self._top_k(), self._top_p())

    def top_k(self, k: int) -> float:
        """The miss under one top-k."""
        numbers = self.drawn - self.kept[:, min(k, self.kept.shape[1]) - 1]
        return miss_of(self._held(numbers, self.below.sum(-1) >= k))

    def top_p(self, p: float) -> float:
        """The miss under one top-p."""
        mass = (self.kept - self.whole[:, None]).exp()
        short = mass < p  # where even the last does not reach p, that last is the best that is known
        at = short.sum(-1).clamp(max=mass.shape[1] - 1)
        numbers = self.drawn - self.kept.gather(1, at[:, None])[:, 0]
        return miss_of(self._held(numbers, self.below.sum(-1) > at))

    def _held(self, numbers: Tensor, impossible: Tensor) -> Tensor:
        return torch.where(impossible, torch.inf, numbers - self.engine)

    def _top_k(self) -> Truncated:
        gap = (self.drawn[:, None] - self.kept - self.engine[:, None]).abs()
        ranks = torch.arange(self.kept.shape[1], device=gap.device)
        gap = torch.where(self.below.sum(-1, keepdim=True) > ranks, torch.inf, gap)
        k = int(gap.median(0).values.argmin()) + 1
        return Truncated(self.top_k(k), f"top-k {k}")

    def _top_p(self) -> Truncated:
        mass = (self.drawn - self.whole - self.engine).double().exp()
        least = float(mass.clamp(max=1.0).quantile(LEAST_P))
        # The token that crosses p is kept, so that the mass may lie well above the p that was set.
        tried = {round(least, 2), round(least, 3), np.floor(least * 100) / 100}
        found = (Truncated(self.top_p(p), f"top-p {p:g}") for p in tried if 0.0 < p < 1.0)
        return min(found, default=Truncated(float("inf"), ""))


def hidden_cut(held: Held, seen: Seen, temperature: float, limit: float) -> Explained | None:
    """A truncation behind one fitted number that explains the tokens; None where none does.

    Args:
        held: the tokens.
        seen: what came before each of them.
        temperature: that was asked for.
        limit: a fit is an explanation when it misses by at most this, nats.
    """
    few = spread(len(held.ids), SCREENED_TOKENS)
    without = UnderTruncation(held.logits / temperature, held.ids, held.engine).best().miss
    for kind in _kinds(seen, temperature):

        def cut(value: float, at: np.ndarray, edit=kind.edit) -> UnderTruncation:
            return UnderTruncation(edit(held.logits[at], value, at), held.ids[at], held.engine[at])

        best = fitted(kind.values, lambda v, cut=cut: cut(v, few).best().miss, without, tries=30)
        if not best.miss <= SCREEN_SLACK * limit:
            continue
        miss, truncation = cut(best.value, np.arange(len(held.ids))).best()
        if miss <= min(limit, EXPLAINS * without):
            return Explained(kind.cause, f"{kind.name} {best.value:.3g} with {truncation}", miss)
    return None


def _kinds(seen: Seen, asked: float) -> list[Kind]:
    def edit(kind: str) -> Callable[[Tensor, float, np.ndarray], Tensor]:
        def under(logits: Tensor, value: float, at: np.ndarray) -> Tensor:
            out = logits.clone()
            for row, token in enumerate(at.tolist()):
                ids = seen.ids[token].to(out.device)
                counts = seen.counts[token].to(out.device)
                out[row, ids] = penalised(out[row, ids], counts, **{kind: value})
            return out / asked

        return under

    return [
        Kind("hidden_penalties", "repetition penalty", REPETITION, edit("repetition_penalty")),
        Kind("hidden_truncation", "temperature", TEMPERATURES, lambda logits, value, at: logits / value),
        Kind("hidden_penalties", "presence penalty", ADDED, edit("presence_penalty")),
        Kind("hidden_penalties", "frequency penalty", ADDED, edit("frequency_penalty")),
    ]
