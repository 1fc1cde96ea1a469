"""Did a tensor of the last updates stay behind? Every one is asked at once, by what its old values would do.

    gap of a step's tokens ─► pulls towards old − new of every tensor (policy/pulls.py), added up over steps
                           ─► score test of all of them (score_test.py)        noise: nothing is said
                           ─► an experiment on the suspect and what is like it: moved far, sent, scored, and
                              put back, sent, scored                           arrived: it was chance

One tensor of hundreds moves a token by a twentieth of what the whole update does, so that the share of the
update as a whole, which ``delivered.py`` estimates, hides it. Tokens alone refuse none: rounding is a
function of the weights, and may have a part along so small a direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lockstep.parity.canary import Canary
from lockstep.parity.causes import finding
from lockstep.parity.delivered import Missing, Moves, missing
from lockstep.parity.explain.numerics.direction import Direction, of_tensors, prompt_numbers
from lockstep.parity.explain.score_test import alike, curvature, detectable, score_test, token_weights
from lockstep.parity.pair import Pair
from lockstep.parity.perturbation import PROBE_VERSION
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import FARTHER, SCORE_LEVEL, SUSPECTED
from lockstep.policy.parameters import Snapshot
from lockstep.policy.pulls import HEAD, Asked, Pulls
from lockstep.policy.variants import Earlier, EarlierHead, Perturbed, Variant
from lockstep.records.samples import Group, Samples
from lockstep.records.verdicts import Finding

STALE = "old"
PROMPTS = 64
"""That are held at least, where there have been so many. |t| is at most the root of their number; but the
older a step, the less of a tensor's change is in its tokens."""
TRIED = 4
"""Tensors that an experiment is made on: the suspect, and what these tokens can least tell from it."""
TOKENS = 512
"""Of an experiment, where they are a step's."""
EACH = 8
"""Of each probe, where it is scored alone."""


@dataclass(frozen=True, eq=False)
class AskedTokens:
    """What is asked: tokens of some completions, and how far the engine is from the trainer in each."""

    groups: Sequence[Group]
    prompts: np.ndarray
    """The prompt of each group, int [G]: what follows one shares its rounding."""
    temperature: float
    sampled: np.ndarray
    """Which of the completions' tokens are asked, bool [ΣT]."""
    gap: np.ndarray
    """engine − trainer of those, nats, float64 [T]."""
    logprobs: np.ndarray
    """The trainer's, float64 [T]."""

    @classmethod
    def of(cls, rollouts: Samples, moves: Moves) -> "AskedTokens":
        """Those of a step that the model sampled."""
        groups = rollouts.groups
        prompts = prompt_numbers(group.prompt for group in groups)
        return cls(groups, prompts, rollouts.temperature, rollouts.loss_mask, moves.gap, moves.logprobs)


@dataclass(frozen=True)
class Suspect:
    """Tensors that chance does not explain the gap without, the likeliest first."""

    places: tuple[Direction, ...]
    t: float
    p: float
    """Over all that were asked."""


@dataclass(frozen=True, eq=False)
class TensorLeft:
    """A tensor that stayed behind, as the experiment showed."""

    place: Direction
    missing: Missing
    """Of the experiment's own move; where it arrived when it was sent again, of the updates."""
    effect: np.ndarray
    """What the missing part does to the experiment's tokens, nats, float [T]."""
    owners: np.ndarray
    again: bool
    """Sent again, it arrived: what was lost was one sync, not the tensor's way."""

    def told(self) -> str:
        """For people."""
        done = "arrived when it was sent again" if self.again else "did not move when it was moved alone"
        return f"{self.place.place} {done}: {self.missing.told()}"


@dataclass(eq=False)
class LeftBehind:
    """What the tokens since the last proof of every tensor say of each."""

    since: Snapshot
    """The weights that were proven tensor by tensor."""
    n_tensors: int = 0
    """That changed since."""
    n_seen: int = 0
    """Of them, those that would have been suspected had they stayed as they were then."""
    _cleared: set[Direction] = field(default_factory=set)
    _steps: list[dict[Direction, tuple[np.ndarray, np.ndarray]]] = field(default_factory=list)
    """Of each step, of each tensor: pulls of the gap and of what is known, float64 [prompts] each."""

    def suspect(self, pair: Pair, asked: AskedTokens) -> Suspect | None:
        """What these tokens, with those of the steps before, point to."""
        self._steps.append(self._pulled(pair, asked))
        # The oldest steps go once those after them are enough: an update that was lost early is in the later
        # gaps too.
        while len(self._steps) > 1 and sum(map(_width, self._steps[1:])) >= PROMPTS:
            del self._steps[0]
        places = list(self._steps[-1])
        self.n_tensors = len(places)
        self.n_seen = 0
        if not places:
            return None
        pulls, known = (self._over_steps(places, which) for which in (0, 1))
        scored = score_test(pulls, pair.seed)
        self.n_seen = int((detectable(pulls, known, scored.critical, pair.seed) <= 1.0).sum())
        share = pulls.sum(1) / np.maximum(np.square(known).sum(1), np.finfo(float).tiny)
        # What an experiment has cleared is not asked again.
        open_yet = [
            n for n, place in enumerate(places) if place not in self._cleared and share[n] > SUSPECTED
        ]
        best = max(open_yet, key=lambda n: scored.t[n], default=0)
        if best not in open_yet or scored.p[best] > SCORE_LEVEL:
            return None
        likely = tuple(places[n] for n in alike(pulls, best) if n in open_yet)
        return Suspect(likely[:TRIED], float(scored.t[best]), float(scored.p[best]))

    def tried(self, pair: Pair, suspect: Suspect, canary: Canary) -> list[TensorLeft]:
        """Those of the suspects that really did not arrive; the others are cleared.

        Leaves trainer and engine with the weights that they are meant to have.

        Args:
            canary: what both sides score in the experiment.
        """
        # Scored before anything is sent: what arrives by being sent again was lost in one sync alone.
        before = canary.engine_scores(pair)
        place = suspect.places[0]
        pair.sync(pair.version)
        with pair.exactly():
            new = canary.trainer_scores(pair).astype(np.float64)
            old = _scores_with_old(pair, canary, place, self.since)
        served = canary.engine_scores(pair)
        # Cleared or named, each is tried once: an experiment costs loads, and chance will suspect it again.
        self._cleared |= set(suspect.places)
        once = _left(place, Moves(before - served, new - old, new, canary.owners), again=True)
        if once is not None:
            return [once]
        now = pair.trainer.snapshot()
        tried = [_moved_alone(pair, each, canary, now, served - new) for each in suspect.places]
        return [found for found in tried if found is not None]

    def _pulled(self, pair: Pair, asked: AskedTokens) -> dict[Direction, tuple[np.ndarray, np.ndarray]]:
        def back(name: str, value: Tensor) -> Tensor | None:
            return self._back(pair, name, value)

        signs = np.random.default_rng(pair.seed).choice((-1.0, 1.0), asked.gap.size)
        bent = np.sqrt(curvature(asked.gap, asked.logprobs))
        questions = []
        for weights in (token_weights(asked.gap, asked.logprobs), signs * bent):
            of_all = np.zeros(asked.sampled.size)
            of_all[asked.sampled] = weights
            questions.append(Asked(of_all, {STALE: back}))
        with pair.exactly():
            pulled = pair.trainer.pulls(asked.groups, questions, asked.temperature)
        found, known = (_by_tensor(each, asked.prompts, pair.trainer.head_name) for each in pulled)
        return {place: (pulls, known[place]) for place, pulls in found.items()}

    def _back(self, pair: Pair, name: str, value: Tensor) -> Tensor | None:
        """From a tensor as it is to what it was; None where it is the same."""
        old = self.since.values.get(pair.trainer.head_name if name == HEAD else name)
        move = None if old is None else old.to(value) - value
        return move if move is not None and bool(move.any()) else None

    def _over_steps(self, places: list[Direction], which: int) -> np.ndarray:
        """float64 [places, prompts of all steps]."""
        found = np.zeros((len(places), sum(map(_width, self._steps))))
        start = 0
        for step in self._steps:
            for row, place in enumerate(places):
                if place in step:
                    found[row, start : start + _width(step)] = step[place][which]
            start += _width(step)
        return found


def proven_each(pair: Pair) -> tuple[LeftBehind, list[TensorLeft]]:
    """All tensors moved at once, sent and scored: what did not arrive?

    Leaves trainer and engine with the weights that they had.
    """
    n = min(PROMPTS, pair.trainer.vocabulary)
    probes = probe_prompts(pair, n, pair.seed)
    canary = Canary([Group(ids[:1], [ids[1 : 1 + EACH]]) for ids in probes])
    noise = _far(pair, pair.trainer.snapshot())
    tensors = LeftBehind(noise.before)
    with pair.exactly():
        # What they differ by already is no move: kernels that round otherwise would pass for a tensor.
        start = canary.engine_scores(pair) - canary.trainer_scores(pair).astype(np.float64)
    with pair.trainer.holding(noise):
        pair.sync(PROBE_VERSION)
        with pair.exactly():
            new = canary.trainer_scores(pair).astype(np.float64)
        every = np.ones(new.size, bool)
        gap = canary.engine_scores(pair) - new - start
        suspect = tensors.suspect(pair, AskedTokens(canary.groups, np.arange(n), 1.0, every, gap, new))
    pair.sync(pair.version)
    return tensors, [] if suspect is None else tensors.tried(pair, suspect, canary)


def left_behind(pair: Pair, left: Sequence[TensorLeft], found: str = "") -> Finding:
    """The finding that tensors stayed behind, the first with its size."""
    first = left[0]
    cause = "stale_tensors"
    told = "; ".join(each.told() for each in left) + found
    return finding(cause, first.effect, first.owners, told, pair.engine.fix(cause), first.missing.n_tokens)


def _width(step: dict[Direction, tuple[np.ndarray, np.ndarray]]) -> int:
    return len(next(iter(step.values()))[0]) if step else 0


def _by_tensor(pulled: Pulls, prompts: np.ndarray, head_name: str) -> dict[Direction, np.ndarray]:
    """Pulls of each tensor, by prompt.

    A table that is the head too is one tensor, which acts at both ends; an engine's copy for the head may be
    old alone.
    """
    sums = {place: np.bincount(prompts, row) for place, row in of_tensors(pulled) if len(place.tensors) == 1}
    head = Direction(STALE, (HEAD,), HEAD)
    if head not in sums:
        return sums
    tables = [place for place in sums if place.tensors == (head_name,)]
    if tables:
        # One memory, moved once; the product rule adds what it does at either end.
        sums[tables[0]] += sums[head]
    else:
        sums[Direction(STALE, (head_name,), head_name.removesuffix(".weight"))] = sums.pop(head)
    return sums


def _far(pair: Pair, tensors: Snapshot) -> Perturbed:
    return Perturbed(tensors, FARTHER * pair.noise.perturbation, pair.seed)


def _moved_alone(
    pair: Pair, place: Direction, canary: Canary, now: Snapshot, start: np.ndarray
) -> TensorLeft | None:
    """One tensor moved far, sent, and put back; None where the move arrived.

    Args:
        now: the weights as they are.
        start: engine − trainer before, nats: both sides' moves are held against each other.
    """
    name = pair.trainer.head_name if place.tensors == (HEAD,) else place.tensors[0]
    with pair.trainer.holding(_far(pair, Snapshot({name: now.values[name]}))):
        pair.sync(PROBE_VERSION)
        engine = canary.engine_scores(pair)
        with pair.exactly():
            new = canary.trainer_scores(pair).astype(np.float64)
            old = _scores_with_old(pair, canary, place, now)
    pair.sync(pair.version)
    return _left(place, Moves(engine - new - start, new - old, new, canary.owners), again=False)


def _scores_with_old(pair: Pair, canary: Canary, place: Direction, before: Snapshot) -> np.ndarray:
    """The trainer's, as an engine's would be that still has the tensor's value of then."""
    variant: Variant = EarlierHead(before) if place.tensors == (HEAD,) else Earlier(before, place.tensors)
    with pair.trainer.holding(variant):
        return canary.trainer_scores(pair)


def _left(place: Direction, moves: Moves, *, again: bool) -> TensorLeft | None:
    found = missing(moves)
    if not found.refuted:
        return None
    return TensorLeft(place, found, np.abs(found.share * moves.moved), moves.owners, again)
