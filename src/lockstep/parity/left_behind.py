"""Does a tensor stay behind? Every one is asked at once, by what its old values would do.

    all tensors moved at once, sent and scored ─► pulls of the gap towards old − new of each (policy/pulls.py)
        ─► score test of all of them (score_test.py)                      noise: nothing is said
        ─► an experiment on the suspect and what is like it: moved far alone, sent, scored, and put back
                                                                          arrived: it was chance

Tokens alone refuse none: rounding is a function of the weights, and may have a part along so small a
direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lockstep.parity.canary import Canary
from lockstep.parity.causes import finding
from lockstep.parity.delivered import Missing, Moves, missing
from lockstep.parity.explain.numerics.direction import Direction, of_tensors
from lockstep.parity.explain.score_test import alike, curvature, detectable, score_test, token_weights
from lockstep.parity.pair import Pair
from lockstep.parity.perturbation import PROBE_VERSION
from lockstep.parity.probes import probe_prompts
from lockstep.parity.search_tolerances import SCORE_LEVEL
from lockstep.parity.tolerances import ARRIVED, FARTHER, SUSPECTED
from lockstep.policy.parameters import Snapshot
from lockstep.policy.pulls import HEAD, Asked, Pulls
from lockstep.policy.variants import Earlier, EarlierHead, Perturbed, Variant
from lockstep.records.samples import Group
from lockstep.records.verdicts import Finding

STALE = "old"
PROMPTS = 64
"""Each with one completion: |t| is at most the root of their number."""
TRIED = 4
"""Tensors that an experiment is made on: the suspect, and what these tokens can least tell from it."""
EACH = 8
"""Tokens asked after each prompt."""


@dataclass(frozen=True, eq=False)
class AskedTokens:
    """What is asked: tokens after some prompts, and how far the engine is from the trainer in each."""

    groups: Sequence[Group]
    """Each with a prompt of its own."""
    gap: np.ndarray
    """engine − trainer of all tokens, nats, float64 [T]."""
    logprobs: np.ndarray
    """The trainer's, at T = 1, float64 [T]."""


@dataclass(frozen=True)
class Suspect:
    """Tensors that chance does not explain the gap without, the likeliest first."""

    places: tuple[Direction, ...]
    t: float
    p: float
    """The chance of it in noise, over all tensors that were asked."""


@dataclass(frozen=True, eq=False)
class TensorLeft:
    """A tensor that stayed behind, as the experiment showed."""

    place: Direction
    missing: Missing
    """The share of the experiment's own move that is missing."""
    effect: np.ndarray
    """What the missing part does to the experiment's tokens, nats, float [T]."""
    owners: np.ndarray

    def told(self) -> str:
        """What did not move, in words."""
        return f"{self.place.place} did not move when it was moved alone: {self.missing.told()}"


@dataclass(frozen=True)
class Look:
    """What tokens say of each tensor that changed since."""

    suspect: Suspect | None = None
    n_tensors: int = 0
    """Tensors that changed."""
    n_seen: int = 0
    """Those of them that would have been suspected had they stayed as they were then."""


def look(pair: Pair, since: Snapshot, asked: AskedTokens) -> Look:
    """Does one of the tensors seem to be as it was ``since``?"""
    places, pulls, known = _pulled(pair, since, asked)
    if not places:
        return Look()
    scored = score_test(pulls, pair.seed)
    n_seen = int((detectable(pulls, known, scored.critical, pair.seed) <= 1.0).sum())
    share = pulls.sum(1) / np.maximum(np.square(known).sum(1), np.finfo(float).tiny)
    # What would have to have moved the other way, or by next to nothing, did not stay behind.
    behind = np.flatnonzero(share > SUSPECTED)
    best = max(behind, key=lambda row: scored.t[row], default=None)
    if best is None or scored.p[best] > SCORE_LEVEL:
        return Look(None, len(places), n_seen)
    likely = tuple(places[row] for row in alike(pulls, int(best)) if row in behind)
    return Look(Suspect(likely[:TRIED], float(scored.t[best]), float(scored.p[best])), len(places), n_seen)


def _pulled(
    pair: Pair, since: Snapshot, asked: AskedTokens
) -> tuple[list[Direction], np.ndarray, np.ndarray]:
    """Tensors, and the pulls of the gap and of what is known on each, float64 [tensors, prompts]."""

    def back(name: str, value: Tensor) -> Tensor | None:
        """From a tensor as it is to what it was; None where it is the same."""
        old = since.values.get(pair.trainer.head_name if name == HEAD else name)
        move = None if old is None else old.to(value) - value
        return move if move is not None and bool(move.any()) else None

    signs = np.random.default_rng(pair.seed).choice((-1.0, 1.0), asked.gap.size)
    bent = np.sqrt(curvature(asked.gap, asked.logprobs))
    weightings = token_weights(asked.gap, asked.logprobs), signs * bent
    with pair.exactly():
        questions = [Asked(weights, {STALE: back}) for weights in weightings]
        pulled = pair.trainer.pulls(asked.groups, questions, 1.0)
    by_gap, by_known = (_by_tensor(each, pair.trainer.head_name) for each in pulled)
    places = list(by_gap)
    shape = len(places), len(asked.groups)
    of_gap, known = (np.reshape([rows[place] for place in places], shape) for rows in (by_gap, by_known))
    return places, of_gap, known


def proven_each(pair: Pair) -> tuple[Look, list[TensorLeft]]:
    """All tensors moved at once, sent and scored: what did not arrive?

    Leaves trainer and engine with the weights that they had.
    """
    n = min(PROMPTS, pair.trainer.vocabulary)
    probes = probe_prompts(pair, n, pair.seed)
    canary = Canary([Group(ids[:1], [ids[1 : 1 + EACH]]) for ids in probes])
    noise = _far(pair, pair.trainer.snapshot())
    with pair.exactly():
        # What they differ by already is no move: kernels that round otherwise would pass for a tensor.
        start = canary.engine_scores(pair) - canary.trainer_scores(pair).astype(np.float64)
    with pair.trainer.holding(noise):
        pair.sync(PROBE_VERSION)
        with pair.exactly():
            new = canary.trainer_scores(pair).astype(np.float64)
        gap = canary.engine_scores(pair) - new - start
        seen = look(pair, noise.before, AskedTokens(canary.groups, gap, new))
    pair.sync(pair.version)
    return seen, [] if seen.suspect is None else tried(pair, seen.suspect, canary)


@dataclass(frozen=True, eq=False)
class _Before:
    """The engine's numbers before an experiment, twice; nats, float64 [T]."""

    engine: np.ndarray
    again: np.ndarray

    def moved_by(self, after: np.ndarray) -> float:
        """Root mean square of its move, less what it differs by from itself."""
        noise = np.square(self.again - self.engine).mean()
        return float(np.sqrt(max(0.0, np.square(after - self.engine).mean() - noise)))


def tried(pair: Pair, suspect: Suspect, canary: Canary) -> list[TensorLeft]:
    """Those of the suspects that really do not arrive.

    Leaves trainer and engine with the weights that they are meant to have.

    Args:
        canary: what both sides score in the experiment.
    """
    before = _Before(*(canary.engine_scores(pair).astype(np.float64) for _ in range(2)))
    with pair.exactly():
        start = before.engine - canary.trainer_scores(pair)
    now = pair.trainer.snapshot()
    found = [_moved_alone(pair, each, canary, now, before, start) for each in suspect.places]
    return [left for left in found if left is not None]


def left_behind(pair: Pair, left: Sequence[TensorLeft]) -> Finding:
    """The finding that tensors stayed behind, the first with its size."""
    first = left[0]
    cause = "stale_tensors"
    told = "; ".join(each.told() for each in left)
    return finding(cause, first.effect, first.owners, told, pair.engine.fix(cause), first.missing.n_tokens)


def _by_tensor(pulled: Pulls, head_name: str) -> dict[Direction, np.ndarray]:
    """Pulls of each tensor, by prompt.

    A table that is the head too is one tensor, which acts at both ends; an engine's copy for the head may be
    old alone.
    """
    sums = {place: row for place, row in of_tensors(pulled) if len(place.tensors) == 1}
    head = Direction(STALE, (HEAD,), HEAD)
    if head not in sums:
        return sums
    tables = [place for place in sums if place.tensors == (head_name,)]
    if tables:
        # One memory, moved once; the product rule adds what it does at either end.
        sums[tables[0]] = sums[tables[0]] + sums[head]
    else:
        sums[Direction(STALE, (head_name,), head_name.removesuffix(".weight"))] = sums.pop(head)
    return sums


def _far(pair: Pair, tensors: Snapshot) -> Perturbed:
    return Perturbed(tensors, FARTHER * pair.noise.perturbation, pair.seed)


def _moved_alone(
    pair: Pair, place: Direction, canary: Canary, now: Snapshot, before: _Before, start: np.ndarray
) -> TensorLeft | None:
    """One tensor moved far, sent, and put back; None where the move arrived.

    Args:
        now: the weights as they are.
        before: the engine's numbers under them.
        start: engine − trainer before, nats: both sides' moves are held against each other.
    """
    of_head = place.tensors == (HEAD,)
    name = pair.trainer.head_name if of_head else place.tensors[0]
    # The trainer's scores as an engine's would be that still has the tensor's value of then.
    stayed: Variant = EarlierHead(now) if of_head else Earlier(now, place.tensors)
    with pair.trainer.holding(_far(pair, Snapshot({name: now.values[name]}))):
        pair.sync(PROBE_VERSION)
        engine = canary.engine_scores(pair)
        with pair.exactly():
            new = canary.trainer_scores(pair).astype(np.float64)
            with pair.trainer.holding(stayed):
                old = canary.trainer_scores(pair)
    pair.sync(pair.version)
    moves = Moves(engine - new - start, new - old, new, canary.owners)
    found = missing(moves)
    # An engine that lacks the tensor does not move at all. One that moved, but not as the trainer did, has
    # it: then it is the trainer that computes something else (attention that leaks).
    if before.moved_by(engine) > ARRIVED * np.sqrt(np.square(moves.moved).mean()) or not found.refuted:
        return None
    return TensorLeft(place, found, np.abs(found.share * moves.moved), moves.owners)
