"""Layer 4: is there a direction in a gap that its own width hides, and which?

    one backward pass ─► pulls of every sequence towards every direction (policy/pulls.py)
                      ─► score test over all of them together (score_test.py)     noise? then that is all
                      ─► the best one's size θ, by one forward pass along it
                      ─► the trainer moved by θ: has the direction left the gap?  named; else unexplained

Directions: each tensor, fused group, layer, and all layers, scaled or rounded as quantisers round
(``direction.py``); the distribution, settings of the model, a prompt's first token (``by_token.py``); and
these in a part of the rows or of the tokens alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.parity.explain.numerics.by_token import (
    CONSTANT,
    TEMPERATURE,
    all_slopes,
    moved_by,
    slopes_of,
)
from lockstep.parity.explain.numerics.direction import (
    SCALED,
    Direction,
    in_rows,
    of_tensors,
    prompt_numbers,
    rounding,
    token_classes,
)
from lockstep.parity.explain.score_test import (
    TestedDirections,
    alike,
    curvature,
    detectable,
    score_test,
    statistic,
    token_weights,
)
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import SCORE_STEP
from lockstep.policy.parameters import in_layer
from lockstep.policy.pulls import HEAD, Asked, Pulls, scale
from lockstep.policy.variants import QUANTISED, Along
from lockstep.records.samples import Samples

TOKEN_INTERACTIONS = (TEMPERATURE, CONSTANT)
"""What is tried in a class of tokens alone, besides scales in a class of rows."""


@dataclass(frozen=True, eq=False)
class Systematic:
    """A direction that chance does not explain."""

    best: Direction
    alike: tuple[Direction, ...]
    """Others that these tokens cannot tell from it."""
    t: float
    p: float
    """The chance of it in noise, over all directions that were tried together."""
    theta: float
    """How far along it the engine is: a scale less 1, a share of a rounding, nats of a constant."""
    effect: np.ndarray
    """What it does to each token, nats, float32 [T]."""
    left: float
    """θ that is left once the trainer is moved there, in parts of θ."""
    loudest: str
    """The layer whose tensors' scores are largest; where to look if the direction itself explains nothing."""

    @property
    def size(self) -> float:
        """Root mean square of the effect, nats."""
        return float(np.sqrt(np.square(self.effect).mean()))

    def told(self) -> str:
        """The direction, its size and its chance, in words."""
        others = [direction.describe() for direction in self.alike[:4]]
        alias = f" (or, alike on these tokens: {', '.join(others)})" if others else ""
        where = f"{self.best.describe()} by {self.theta:+.3g}{alias}"
        gone = f"moved there, {abs(self.left):.0%} of it are left"
        return f"{where}: t = {self.t:+.1f}, family-wise p = {self.p:.1g}; {gone}"


@dataclass(frozen=True, eq=False)
class Tested:
    """All directions, put to the test together."""

    directions: list[Direction]
    scored: TestedDirections
    sees: dict[Direction, float]
    """|θ| that would have been called with a chance of SCORE_POWER: of each scale, and of what acts on the
    distribution alone."""
    uncovered: tuple[str, ...]
    """Parameters that are in no direction: their modules are not linear in them."""
    called: Systematic | None
    """The direction that chance does not explain; None where none was significant."""

    def power(self, family: str) -> np.ndarray:
        """What would have been seen of each single tensor of a family, or of what acts on the distribution.

        Ascending.
        """
        ways = ((way, size) for way, size in self.sees.items() if way.family == family and not way.only)
        sizes = [size for way, size in ways if len(way.tensors) < 2]
        return np.sort(sizes)


def systematic(pair: Pair, sample: Samples, trainer: np.ndarray) -> Tested:
    """What of a gap is no noise.

    Args:
        trainer: score C of the sample, float32 [T].
    """
    gap = (sample.engine_logprobs - trainer).astype(np.float64)
    families = {SCALED: scale, **{form: rounding(form) for form in QUANTISED}}
    # The same tokens with a random sign each: a gap as wide and with no direction in it, by which is known
    # what would have shown.
    signs = np.random.default_rng(pair.seed).choice((-1.0, 1.0), gap.size)
    asked = [
        Asked(token_weights(gap, trainer), families),
        Asked(signs * np.sqrt(curvature(gap, trainer)), {SCALED: scale}),
    ]
    with pair.exactly():
        pulled, probe = pair.trainer.pulls(sample.apart().groups, asked, sample.temperature)
        here = sample.scored(pair.trainer)
        felt = all_slopes(pair, sample, here)
        directions, sums = _rows(sample, asked[0].weights, pulled, felt)
        scored = score_test(sums, pair.seed)
        probed, known = _rows(sample, asked[1].weights, probe, felt)
        place = {direction: row for row, direction in enumerate(directions)}
        noise = sums[[place[direction] for direction in probed]]
        shown = detectable(noise, known, scored.critical, pair.seed)
        sees = dict(zip(probed, shown.tolist(), strict=True))
        # Fitting θ costs passes of the model: only where there is something to fit.
        if not scored.significant:
            return Tested(directions, scored, sees, pulled.uncovered, None)
        best = directions[scored.best]
        slopes = _slopes(pair, sample, best, here)
        theta = _size(gap, slopes, trainer)
        effect = _moved(pair, sample, best, theta, here, slopes) - here
    called = Systematic(
        best=best,
        alike=tuple(directions[row] for row in alike(sums, scored.best)[1:]),
        t=float(scored.t[scored.best]),
        p=float(scored.p[scored.best]),
        theta=theta,
        effect=effect.astype(np.float32),
        left=_size(gap - effect, slopes, trainer) / theta,
        loudest=_loudest(directions, scored.t),
    )
    return Tested(directions, scored, sees, pulled.uncovered, called)


def _loudest(directions: Sequence[Direction], t: np.ndarray) -> str:
    """The layer with the largest mean square of t over its tensors' scales; empty where there are none."""
    squares: dict[str, list[float]] = {}
    for direction, score in zip(directions, t, strict=True):
        at = in_layer(direction.tensors[0]) if len(direction.tensors) == 1 else None
        if at is not None and direction.family == SCALED and not direction.only:
            squares.setdefault(f"layer {at.layer}", []).append(float(score) ** 2)
    return max(squares, key=lambda layer: float(np.mean(squares[layer])), default="")


def again(pair: Pair, sample: Samples, trainer: np.ndarray, called: Systematic) -> float:
    """t of one direction on tokens that it was not found on, signed so that the same way is above 0."""
    gap = (sample.engine_logprobs - trainer).astype(np.float64)
    with pair.exactly():
        slopes = _slopes(pair, sample, called.best, sample.scored(pair.trainer))
    by_prompt = np.bincount(
        prompt_numbers(sample.prompts)[sample.owners], slopes * token_weights(gap, trainer)
    )
    return float(statistic(by_prompt[None])[0]) * np.sign(called.theta)


def _size(gap: np.ndarray, slopes: np.ndarray, trainer: np.ndarray) -> float:
    """θ by one Gauss–Newton step on the clipped gap."""
    # Clipped, so that a few wild tokens set no size; the curvature is that of the clipped loss.
    bent = float((slopes * slopes * curvature(gap, trainer)).sum())
    return float((slopes * token_weights(gap, trainer)).sum()) / max(bent, np.finfo(float).tiny)


def _rows(
    sample: Samples, weights: np.ndarray, pulled: Pulls, felt: dict[str, np.ndarray]
) -> tuple[list[Direction], np.ndarray]:
    """Every direction with its pulls, those of one prompt's samples summed: [K] and float64 [K, prompts]."""
    by_direction = list(of_tensors(pulled))
    by_direction += list(in_rows(by_direction, sample))
    for way, slopes in by_tokens(sample, felt):
        by_direction.append((way, np.bincount(sample.owners, slopes * weights, len(sample))))
    prompts = prompt_numbers(sample.prompts)
    by_prompt = np.stack([np.bincount(prompts, row) for _, row in by_direction])
    return [direction for direction, _ in by_direction], by_prompt


def by_tokens(sample: Samples, felt: Mapping[str, np.ndarray]) -> list[tuple[Direction, np.ndarray]]:
    """The families that are felt token by token, and those of them that are tried in a part of the tokens.

    Args:
        felt: family → ∂ log p_i / ∂θ, float64 [T].
    """
    by_direction = [(Direction(family), slopes) for family, slopes in felt.items()]
    for only, tokens in token_classes(sample).items():
        by_direction += [
            (Direction(family, only=only), felt[family] * tokens) for family in TOKEN_INTERACTIONS
        ]
    return by_direction


def _slopes(pair: Pair, sample: Samples, best: Direction, here: np.ndarray) -> np.ndarray:
    """∂ log p_i / ∂θ along one direction, float64 [T]; 0 where these tokens cannot feel it."""
    if best.tensors:
        step = 1.0 if best.family in QUANTISED else SCORE_STEP
        whole = (_with_tensors(pair, sample, best, step, here) - here).astype(np.float64) / step
    else:
        known = slopes_of(pair, sample, best.family, here)
        whole = np.zeros(here.size) if known is None else known
    return whole * _where(sample, best.only)


def _moved(
    pair: Pair, sample: Samples, best: Direction, theta: float, here: np.ndarray, slopes: np.ndarray
) -> np.ndarray:
    """The trainer's scores, moved by θ along the direction from ``here``, float [T].

    Args:
        slopes: of that direction. What has no variant of the model is as straight as they are.
    """
    if best.tensors:
        moved = _with_tensors(pair, sample, best, theta, here)
    else:
        moved = moved_by(pair, sample, best.family, theta, here)
    if moved is None:
        return here + theta * slopes
    return here + (moved - here) * _where(sample, best.only)


def _with_tensors(pair: Pair, sample: Samples, best: Direction, theta: float, here: np.ndarray) -> np.ndarray:
    # Scaling the head is dividing the temperature, and needs no other model.
    if best.tensors == (HEAD,):
        return np.concatenate(pair.trainer.score(sample.groups, sample.temperature / (1.0 + theta)))
    with pair.trainer.holding(Along(best.family, best.tensors, theta)):
        return sample.scored(pair.trainer)


def _where(sample: Samples, only: str) -> np.ndarray:
    """1 on the tokens that a direction acts on, float64 [T]."""
    if not only:
        return np.ones(sample.owners.size)
    known = token_classes(sample).get(only)
    return np.zeros(sample.owners.size) if known is None else known.astype(np.float64)
