"""Which tensors explain a gap? Named by gradients, proven by a re-score.

To first order, the trainer's log-probability of a token moves by ⟨∇ log p, ΔW⟩ when tensor W moves by ΔW. For
the tokens with the largest gaps one backward pass each gives that product for *every* tensor at once; a set
of tensors is a hypothesis when its sum fits the gaps. The best few are then held by the trainer for real, and
only one whose re-score agrees with the engine is named.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lockstep.parity.canary import Canary
from lockstep.parity.pair import Pair
from lockstep.parity.search import keep_looking
from lockstep.parity.search_tolerances import ALIKE, LIMIT_OVER_ALIKE
from lockstep.policy.parameters import Snapshot, in_layer
from lockstep.policy.variants import Earlier, RoundedThrough, Scaled, Variant

TOKENS = 24
"""Backward passes: the tokens with the largest gaps."""
VERIFIED = 8
"""Hypotheses that are re-scored."""
REFINED = 4
"""Re-scores of a hypothesis whose factor is fitted: the first is a linear guess."""
GREEDY = 4
"""Tensors of the set that is put together one at a time, in case no natural set fits."""
MANY_KINDS = 4
"""Kinds of tensors beyond which a label names the layers alone."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Engines hold these as one tensor, so that they are old together."""


@dataclass(frozen=True)
class Named:
    """Tensors that explain a gap."""

    label: str
    miss: float
    """mean |engine − trainer with those tensors changed|, nats."""
    alike: tuple[str, ...] = ()
    """Other sets that explain it as well."""
    factor: float = 1.0
    """What they are multiplied by, where that is the hypothesis."""
    change: str = ""
    """What else became of them on the way."""


@dataclass(frozen=True)
class Hypothesis:
    """A set of tensors, all changed alike."""

    names: tuple[str, ...]
    factor: float
    """What they are multiplied by; 1 where they are old instead."""
    miss: float
    """mean |engine − trainer with those tensors changed|, nats: to first order, or by a re-score."""


@dataclass(frozen=True, eq=False)
class SlopesAndGap:
    """What tensors do to the tokens with the largest gaps."""

    moves: np.ndarray
    """How far each tensor's change moves each token, to first order, nats: float64 [tokens, tensors]."""
    gap: np.ndarray
    """engine − trainer of those tokens, nats: float64 [tokens]."""


def stale(pair: Pair, canary: Canary, before: Snapshot, engine: np.ndarray, limit: float) -> Named | None:
    """Tensors that the engine still holds at their old values.

    Args:
        before: the old values; the trainer holds the new ones.
        engine: score B of the canary, float32 [T].
        limit: a hypothesis is proven when it misses by at most this in the mean, nats.
    """
    names = pair.trainer.parameter_names()
    ranked = _ranked(_slopes(pair, canary, engine, names, before), names, free=False)
    return _proven(pair, canary, engine, ranked, lambda chosen, factor: Earlier(before, chosen), limit)


def scaled(pair: Pair, canary: Canary, engine: np.ndarray, limit: float) -> Named | None:
    """Tensors that the engine holds multiplied by a constant. Arguments as :func:`stale`."""
    names = pair.trainer.parameter_names(trained=True)
    # No old values to move towards: each tensor moves along itself, which is a change of its scale.
    ranked = _ranked(_slopes(pair, canary, engine, names), names, free=True)
    return _proven(pair, canary, engine, ranked, Scaled, limit)


def rounded(pair: Pair, canary: Canary, engine: np.ndarray, limit: float) -> Named | None:
    """Every tensor as it is after a way through a coarser dtype. Arguments as :func:`stale`."""
    # A trainer that is in such a dtype itself loses nothing on the way.
    for dtype in ("bfloat16", "float16") if pair.trainer.dtype == "torch.float32" else ():
        with pair.trainer.holding(RoundedThrough(dtype)):
            miss = float(np.abs(engine - canary.trainer_scores(pair)).mean())
        if miss <= limit:
            return Named("every tensor", miss, change=f"rounded to {dtype}")
    return None


def _slopes(
    pair: Pair, canary: Canary, engine: np.ndarray, names: list[str], towards: Snapshot | None = None
) -> SlopesAndGap:
    """``Trainer.slopes`` of the tokens with the largest gaps."""
    gap = engine - canary.trainer_scores(pair)
    # Each costs a backward pass; the largest gaps are the furthest above what arithmetic brings.
    chosen = np.argsort(-np.abs(gap))[:TOKENS]
    slopes = pair.trainer.slopes(canary.groups, chosen, canary.temperature, names, towards, keep_looking)
    moves = np.array([slope.moves for slope in slopes])
    return SlopesAndGap(moves, np.array([gap[slope.token] for slope in slopes], np.float64))


def _ranked(slopes: SlopesAndGap, names: list[str], *, free: bool) -> list[Hypothesis]:
    """Sets of tensors by how well they fit to first order, the best first.

    Args:
        free: the size of the move is fitted (a factor), and not 1.
    """
    gap = slopes.gap
    column = {name: slopes.moves[:, at] for at, name in enumerate(names)}
    # A set is put together from whole moves, and under a factor that is free no move is whole.
    greedy = [] if free else [_greedy(column, gap, names)]
    candidates: dict[tuple[str, ...], Hypothesis] = {}
    for chosen in [candidate for candidate in (*_sets(names), *greedy) if candidate]:
        move = sum((column[name] for name in chosen), start=np.zeros(len(gap)))
        size = _projected(gap, move) if free else 1.0
        miss = float(np.abs(gap - size * move).mean())
        candidates[chosen] = Hypothesis(chosen, 1.0 + size if free else 1.0, miss)
    # First order ranks, and proves nothing: each that is left is scored again by the model itself.
    return sorted(candidates.values(), key=lambda hypothesis: hypothesis.miss)[:VERIFIED]


def _projected(gap: np.ndarray, move: np.ndarray) -> float:
    """How many times ``move`` comes nearest to ``gap``, by least squares."""
    return float(gap @ move / max(move @ move, 1e-30))


def _sets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """The sets of tensors that go wrong together.

    Each tensor alone; all of one block (attention, MLP) over all layers; all layers before one, and all from
    it on; a whole layer; those of a layer that engines fuse; a kind over all layers, and two kinds, as an
    adapter has them.
    """
    layers: dict[tuple[str, int], list[str]] = {}
    kinds: dict[str, list[str]] = {}
    blocks: dict[str, list[str]] = {}
    for name in names:
        yield (name,)
        if (place := in_layer(name)) is not None:
            layers.setdefault((place.stack, place.layer), []).append(name)
            kinds.setdefault(place.kind, []).append(name)
            blocks.setdefault(place.kind.split(".")[0], []).append(name)
    yield from (tuple(members) for members in blocks.values())
    stacked = list(layers.values())
    for at in range(1, len(stacked)):
        yield tuple(chain(*stacked[:at]))
        yield tuple(chain(*stacked[at:]))
    for members in layers.values():
        yield tuple(members)
        for fused in FUSED:
            yield tuple(name for name in members if name.split(".")[-2] in fused)
    ordered = list(kinds.values())
    for at, members in enumerate(ordered):
        yield tuple(members)
        yield from (tuple(members + other) for other in ordered[at + 1 :])


def _greedy(column: dict[str, np.ndarray], gap: np.ndarray, names: list[str]) -> tuple[str, ...]:
    """A set that is put together one tensor at a time, each the one that mends most of what the others
    leave."""
    chosen: list[str] = []
    rest = gap.copy()
    for _ in range(GREEDY):
        best = min(
            (n for n in names if n not in chosen), key=lambda n: np.abs(rest - column[n]).mean(), default=None
        )
        if best is None or np.abs(rest - column[best]).mean() >= np.abs(rest).mean():
            break
        chosen.append(best)
        rest = rest - column[best]
    return tuple(chosen)


def _proven(
    pair: Pair,
    canary: Canary,
    engine: np.ndarray,
    ranked: list[Hypothesis],
    variant: Callable[[tuple[str, ...], float], Variant],
    limit: float,
) -> Named | None:
    """The hypothesis whose re-score agrees with the engine, with those that do so as well."""
    gap = engine - canary.trainer_scores(pair)
    tried = [_rescored(pair, canary, engine, gap, hypothesis, variant) for hypothesis in ranked]
    if not tried:
        return None
    least = min(hypothesis.miss for hypothesis in tried)
    if not least <= limit:
        return None
    # Never below what arithmetic leaves: two that miss by nothing are alike, whatever the ratio of their
    # misses.
    close = min(max(ALIKE * least, limit / LIMIT_OVER_ALIKE), limit)
    # Of sets that explain alike, the smallest is named.
    alike = sorted(
        (hypothesis for hypothesis in tried if hypothesis.miss <= close), key=lambda h: len(h.names)
    )
    named = alike[0]
    others = tuple(label(other.names) for other in alike[1:] if len(other.names) == len(named.names))
    return Named(label(named.names), named.miss, others, named.factor)


def _rescored(
    pair: Pair,
    canary: Canary,
    engine: np.ndarray,
    gap: np.ndarray,
    hypothesis: Hypothesis,
    variant: Callable[[tuple[str, ...], float], Variant],
) -> Hypothesis:
    """A hypothesis with the miss of a real re-score, at the best of a few factors where that is fitted.

    Args:
        gap: engine − trainer as it is, float32 [T].
    """
    names = hypothesis.names
    factor = hypothesis.factor
    tried = []
    last = 1.0
    last_left = gap
    for _ in range(1 if factor == 1.0 else REFINED):
        keep_looking()
        with pair.trainer.holding(variant(names, factor)):
            left = engine - canary.trainer_scores(pair)
        tried.append(Hypothesis(names, factor, float(np.abs(left).mean())))
        # The line through the last two factors meets the engine's scores at the next one.
        ahead = factor + (factor - last) * _projected(left, last_left - left)
        last = factor
        last_left = left
        factor = ahead
    return min(tried, key=lambda at: (at.miss, at.factor))


def label(names: tuple[str, ...]) -> str:
    """A set of tensors for people."""
    places = [place for name in names if (place := in_layer(name)) is not None]
    if len(names) > 1 and len(places) == len(names):
        layers = sorted({place.layer for place in places})
        kinds = sorted({place.kind for place in places})
        span = f"layers {layers[0]} to {layers[-1]}"
        if len(kinds) > MANY_KINDS and len(layers) > 1:
            return span
        if len(layers) == 1:
            return f"layer {layers[0]}: {', '.join(kinds)}"
        if len(names) == len(layers) * len(kinds):
            return f"{' and '.join(kinds)} of {span}"
    return ", ".join(names)
