"""Layer 4: is there a direction in a gap that its own width hides, and which?

    one backward pass ─► pulls of every sequence towards every direction (policy/pulls.py)
                      ─► score test over all of them together (score_test.py)     noise? then that is all
                      ─► the best one's size θ, by one forward pass along it
                      ─► the trainer moved by θ: has the direction left the gap?  named; else unexplained

Directions: each tensor scaled; each layer's, and all layers', tensors together; each rounded as quantisers
round; the temperature; a constant; the first token of a completion alone; rows of long prompts alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lockstep.parity.explain.score_test import (
    Scored,
    alike,
    curvature,
    detectable,
    score_test,
    statistic,
    token_weights,
)
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import SCORE_STEP
from lockstep.policy.parameters import in_layer
from lockstep.policy.pulls import HEAD, Asked, Pulls, scale
from lockstep.policy.variants import QUANTISED, Along
from lockstep.records.samples import Samples

SCALED = "scaled"
WHOLE = "every layer"
TEMPERATURE = "temperature"
CONSTANT = "a constant"
FIRST = "first tokens off"
LONG = "rows of long prompts off"


@dataclass(frozen=True)
class Direction:
    """One way in which the engine may depart from the trainer."""

    family: str
    """``scaled``, a quantiser's form, or what acts on the distribution alone."""
    tensors: tuple[str, ...] = ()
    place: str = ""
    """The tensor, the layer, or ``every layer``."""

    def describe(self) -> str:
        """For people."""
        return f"{self.place} {self.family}" if self.place else self.family


@dataclass(frozen=True, eq=False)
class Systematic:
    """A direction that chance does not explain."""

    best: Direction
    alike: tuple[Direction, ...]
    """Others that these tokens cannot tell from it."""
    t: float
    p: float
    """Over all directions that were tried together."""
    theta: float
    """How far along it the engine is: a scale less 1, a share of a rounding, nats of a constant."""
    effect: np.ndarray
    """What it does to each token, nats, float32 [T]."""
    left: float
    """θ that is left once the trainer is moved there, in parts of θ."""

    @property
    def size(self) -> float:
        """Root mean square of the effect, nats."""
        return float(np.sqrt(np.square(self.effect).mean()))

    def told(self) -> str:
        """For people."""
        others = [direction.describe() for direction in self.alike[:4]]
        alias = f" (or, alike on these tokens: {', '.join(others)})" if others else ""
        where = f"{self.best.describe()} by {self.theta:+.3g}{alias}"
        gone = f"moved there, {abs(self.left):.0%} of it are left"
        return f"{where}: t = {self.t:+.1f}, family-wise p = {self.p:.1g}; {gone}"


@dataclass(frozen=True, eq=False)
class Tested:
    """All directions, put to the test together."""

    directions: list[Direction]
    scored: Scored
    sees: dict[Direction, float]
    """|θ| that would have been called with a chance of SCORE_POWER: of each scale, and of what acts on the
    distribution alone."""
    uncovered: tuple[str, ...]
    """Parameters that are in no direction: their modules are not linear in them."""
    found: Systematic | None

    def power(self, family: str) -> np.ndarray:
        """What would have been seen of each single tensor of a family, or of what acts on the distribution.

        Ascending.
        """
        sizes = [size for way, size in self.sees.items() if way.family == family and len(way.tensors) < 2]
        return np.sort(sizes)


def systematic(pair: Pair, sample: Samples, trainer: np.ndarray) -> Tested:
    """What of a gap is no noise.

    Args:
        trainer: score C of the sample, float32 [T].
    """
    gap = (sample.engine_logprobs - trainer).astype(np.float64)
    families = {SCALED: scale, **{form: _rounding(form) for form in QUANTISED}}
    signs = np.random.default_rng(pair.seed).choice((-1.0, 1.0), gap.size)
    asked = [
        Asked(token_weights(gap, trainer), families),
        Asked(signs * np.sqrt(curvature(gap, trainer)), {SCALED: scale}),
    ]
    with pair.exactly():
        pulled, probe = pair.trainer.pulls(sample.apart().groups, asked, sample.temperature)
        directions, sums = _rows(sample, asked[0].weights, pulled)
        scored = score_test(sums, pair.seed)
        probed, known = _rows(sample, asked[1].weights, probe)
        noise = sums[[directions.index(direction) for direction in probed]]
        shown = detectable(noise, known, scored.critical, pair.seed)
        sees = dict(zip(probed, shown.tolist(), strict=True))
        if not scored.significant:
            return Tested(directions, scored, sees, pulled.uncovered, None)
        best = directions[scored.best]
        here = sample.scored(pair.trainer)
        slopes = _slopes(pair, sample, best, here)
        theta = _size(gap, slopes, trainer)
        effect = _moved(pair, sample, best, theta, here) - here
    found = Systematic(
        best=best,
        alike=tuple(directions[row] for row in alike(sums, scored.best)[1:]),
        t=float(scored.t[scored.best]),
        p=float(scored.p[scored.best]),
        theta=theta,
        effect=effect.astype(np.float32),
        left=_size(gap - effect, slopes, trainer) / theta,
    )
    return Tested(directions, scored, sees, pulled.uncovered, found)


def again(pair: Pair, sample: Samples, trainer: np.ndarray, found: Systematic) -> float:
    """t of one direction on tokens that it was not found on, signed so that the same way is above 0."""
    gap = (sample.engine_logprobs - trainer).astype(np.float64)
    with pair.exactly():
        slopes = _slopes(pair, sample, found.best, sample.scored(pair.trainer))
    by_prompt = np.bincount(prompts_of(sample)[sample.owners], slopes * token_weights(gap, trainer))
    return float(statistic(by_prompt[None])[0]) * np.sign(found.theta)


def _size(gap: np.ndarray, slopes: np.ndarray, trainer: np.ndarray) -> float:
    """θ by one Gauss–Newton step on the clipped gap."""
    bent = float((slopes * slopes * curvature(gap, trainer)).sum())
    return float((slopes * token_weights(gap, trainer)).sum()) / max(bent, np.finfo(float).tiny)


def _rounding(form: str) -> Callable[[str, Tensor], Tensor | None]:
    def direction(name: str, parameter: Tensor) -> Tensor | None:
        if parameter.dim() != 2 or in_layer(name) is None:
            return None
        return QUANTISED[form](parameter) - parameter

    return direction


def _rows(sample: Samples, weights: np.ndarray, pulled: Pulls) -> tuple[list[Direction], np.ndarray]:
    """Every direction with its pulls, those of one prompt's samples summed: [K] and float64 [K, prompts]."""
    found = list(of_tensors(pulled))
    for family in (TEMPERATURE, CONSTANT, FIRST, LONG):
        slopes = pulled.temperature if family == TEMPERATURE else _of_rows(sample, family)
        found.append((Direction(family), np.bincount(sample.owners, slopes * weights, len(sample))))
    prompts = prompts_of(sample)
    by_prompt = np.stack([np.bincount(prompts, row) for _, row in found])
    return [direction for direction, _ in found], by_prompt


def prompts_of(sample: Samples) -> np.ndarray:
    """The number of each sample's prompt, int [S]: what follows one prompt shares its rounding."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(prompt.tobytes(), len(known)) for prompt in sample.prompts])


def of_tensors(pulled: Pulls) -> Iterator[tuple[Direction, np.ndarray]]:
    """Of each tensor, each layer's and all layers' tensors together: pulls of every sequence, float64 [S]."""
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (family, name) in enumerate(pulled.names):
        yield (
            Direction(family, (name,), name.removeprefix("model.").removesuffix(".weight")),
            pulled.sums[row],
        )
        if (at := in_layer(name)) is not None:
            layers[family, f"layer {at.layer}"].append(row)
            layers[family, WHOLE].append(row)
    for (family, place), rows in layers.items():
        names = tuple(pulled.names[row][1] for row in rows)
        yield Direction(family, names, place), pulled.sums[rows].sum(0)


def _of_rows(sample: Samples, family: str) -> np.ndarray:
    """∂ log p_i / ∂θ of a constant, on the tokens that the family is of, float64 [T]."""
    if family == CONSTANT:
        return np.ones(sample.owners.size)
    if family == FIRST:
        return (sample.positions == 0).astype(np.float64)
    lengths = np.array([len(prompt) for prompt in sample.prompts])
    return (lengths > np.median(lengths))[sample.owners].astype(np.float64)


def _slopes(pair: Pair, sample: Samples, best: Direction, here: np.ndarray) -> np.ndarray:
    """∂ log p_i / ∂θ along one direction, by a step along it from the scores ``here``, float64 [T]."""
    step = 1.0 if best.family in QUANTISED else SCORE_STEP
    return (_moved(pair, sample, best, step, here) - here).astype(np.float64) / step


def _moved(pair: Pair, sample: Samples, best: Direction, theta: float, here: np.ndarray) -> np.ndarray:
    """The trainer's scores, moved by θ along the direction from ``here``, float [T]."""
    if best.family in (CONSTANT, FIRST, LONG):
        return here + theta * _of_rows(sample, best.family)
    if best.family == TEMPERATURE or best.tensors == (HEAD,):
        by = 1.0 + theta if best.family == TEMPERATURE else 1.0 / (1.0 + theta)
        return np.concatenate(pair.trainer.score(sample.groups, sample.temperature * by))
    with pair.trainer.holding(Along(best.family, best.tensors, theta)):
        return sample.scored(pair.trainer)
