"""Which tensors explain a gap? Named by gradients, proven by a re-score.

To first order, the trainer's log-probability of a token moves by ⟨∇ log p, ΔW⟩ when tensor W moves by ΔW. For the tokens with the
largest gaps one backward pass each gives that product for *every* tensor at once; a set of tensors is a hypothesis when its sum
fits the gaps. The best few are then held by the trainer for real, and only one whose re-score agrees with the engine is named.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lockstep.parity.canary import Canary
from lockstep.parity.pair import Pair
from lockstep.policy.variants import Earlier, RoundedThrough, Scaled, Snapshot, Variant

TOKENS = 24
"""Backward passes: the tokens with the largest gaps."""
VERIFIED = 8
"""Hypotheses that are re-scored."""
REFINED = 4
"""Re-scores of a hypothesis whose factor is fitted: the first is a linear guess."""
GREEDY = 4
"""Tensors of the set that is put together one at a time, in case no natural set fits."""
ALIKE = 1.5
"""Hypotheses that miss by less than this times the best are named beside it: some edits cannot be told apart by any score."""
MANY_KINDS = 4
"""Beyond which a label says the layers alone."""
_LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Engines hold these as one tensor."""


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


def stale(pair: Pair, canary: Canary, before: Snapshot, engine: np.ndarray, limit: float) -> Named | None:
    """Tensors that the engine still holds at their old values.

    Args:
        before: the old values; the trainer holds the new ones.
        engine: score B of the canary, float32 [T].
        limit: a hypothesis is proven when it misses by at most this in the mean, nats.
    """
    names = pair.trainer.parameter_names()
    slopes, gap = _slopes(pair, canary, engine, names, before)
    ranked = _ranked(slopes, gap, names, free=False)
    return _proven(pair, canary, engine, ranked, lambda chosen, factor: Earlier(before, chosen), limit)


def scaled(pair: Pair, canary: Canary, engine: np.ndarray, limit: float) -> Named | None:
    """Tensors that the engine holds multiplied by a constant. Arguments as :func:`stale`."""
    names = pair.trainer.parameter_names(trained=True)
    slopes, gap = _slopes(pair, canary, engine, names)
    ranked = _ranked(slopes, gap, names, free=True)
    return _proven(pair, canary, engine, ranked, Scaled, limit)


def rounded(pair: Pair, canary: Canary, engine: np.ndarray, limit: float) -> Named | None:
    """Every tensor as it is after a way through a coarser dtype. Arguments as :func:`stale`."""
    for dtype in ("bfloat16", "float16") if pair.trainer.dtype == "torch.float32" else ():
        with pair.trainer.holding(RoundedThrough(dtype)):
            miss = float(np.abs(engine - canary.trainer_scores(pair)).mean())
        if miss <= limit:
            return Named("every tensor", miss, change=f"rounded to {dtype}")
    return None


def _slopes(
    pair: Pair, canary: Canary, engine: np.ndarray, names: list[str], towards: Snapshot | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``Trainer.slopes`` of the tokens with the largest gaps, float64 [tokens, tensors], and engine − trainer of those tokens."""
    gap = engine - canary.trainer_scores(pair)
    chosen = np.argsort(-np.abs(gap))[:TOKENS]
    slopes = pair.trainer.slopes(canary.groups, chosen, canary.temperature, names, towards)
    return np.array([slope.moves for slope in slopes]), np.array([gap[slope.token] for slope in slopes], np.float64)


def _ranked(slopes: np.ndarray, gap: np.ndarray, names: list[str], *, free: bool) -> list[tuple[tuple[str, ...], float]]:
    """Sets of tensors by how well they fit, the best first, each with its factor.

    Args:
        free: the size of the move is fitted (a factor), and not 1.
    """
    column = {name: slopes[:, at] for at, name in enumerate(names)}
    found = {}
    greedy = [] if free else [_greedy(column, gap, names)]
    for chosen in [candidate for candidate in (*_sets(names), *greedy) if candidate]:
        move = sum((column[name] for name in chosen), start=np.zeros(len(gap)))
        size = float(gap @ move / max(move @ move, 1e-30)) if free else 1.0
        found[chosen] = (float(np.abs(gap - size * move).mean()), 1.0 + size if free else 1.0)
    ordered = sorted(found, key=lambda chosen: found[chosen][0])
    return [(chosen, found[chosen][1]) for chosen in ordered[:VERIFIED]]


def _sets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Each tensor; the fused ones of a layer; a whole layer, all before it and all from it on; a kind over all layers, two kinds,
    as an adapter has them, and a whole block.
    """
    layers: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    blocks: dict[str, list[str]] = {}
    for name in names:
        yield (name,)
        found = _LAYER.match(name)
        if found:
            layers.setdefault(found[1] + found[2], []).append(name)
            kinds.setdefault(found[3], []).append(name)
            blocks.setdefault(found[3].split(".")[1], []).append(name)
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
    chosen: list[str] = []
    rest = gap.copy()
    for _ in range(GREEDY):
        best = min((n for n in names if n not in chosen), key=lambda n: np.abs(rest - column[n]).mean(), default=None)
        if best is None or np.abs(rest - column[best]).mean() >= np.abs(rest).mean():
            break
        chosen.append(best)
        rest = rest - column[best]
    return tuple(chosen)


def _proven(
    pair: Pair,
    canary: Canary,
    engine: np.ndarray,
    ranked: list[tuple[tuple[str, ...], float]],
    variant: Callable[[tuple[str, ...], float], Variant],
    limit: float,
) -> Named | None:
    """The hypothesis whose re-score agrees with the engine, with those that do so as well."""
    misses: dict[tuple[tuple[str, ...], float], float] = {}
    gap = engine - canary.trainer_scores(pair)
    for chosen, factor in ranked:
        for _ in range(1 if factor == 1.0 else REFINED):
            with pair.trainer.holding(variant(chosen, factor)):
                left = engine - canary.trainer_scores(pair)
            misses[chosen, factor] = float(np.abs(left).mean())
            moved = gap - left  # what the factor did to each token; the line through it meets the gap at the next factor
            factor = 1.0 + (factor - 1.0) * float(gap @ moved / max(moved @ moved, 1e-30))
    if not misses or not min(misses.values()) <= limit:
        return None
    best = {chosen: min((miss, factor) for (c, factor), miss in misses.items() if c == chosen) for chosen, _ in misses}
    # Of sets that explain alike, the smallest is named.
    least = min(miss for miss, _ in best.values())
    close = min(max(ALIKE * least, limit / 10), limit)
    alike: list[tuple[str, ...]] = sorted((c for c, (miss, _) in best.items() if miss <= close), key=len)
    miss, factor = best[alike[0]]
    return Named(label(alike[0]), miss, tuple(label(other) for other in alike[1:] if len(other) == len(alike[0])), factor)


def label(names: tuple[str, ...]) -> str:
    """A set of tensors for people."""
    found = [_LAYER.match(name) for name in names]
    if len(names) > 1 and all(found):
        layers = sorted({int(f[2]) for f in found if f})
        kinds = sorted({f[3].strip(".") for f in found if f})
        span = f"layers {layers[0]} to {layers[-1]}"
        if len(kinds) > MANY_KINDS and len(layers) > 1:
            return span
        if len(layers) == 1:
            return f"layer {layers[0]}: {', '.join(kinds)}"
        if len(names) == len(layers) * len(kinds):
            return f"{' and '.join(kinds)} of {span}"
    return ", ".join(names)
