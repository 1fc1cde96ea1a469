"""Layer 4 at full depth: what the width of the gap hides.

A direction is called where chance explains it neither on the tokens that it was found on, among all that were
tried, nor on tokens of other prompts.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from msgspec.structs import replace

from lockstep.parity.causes import finding
from lockstep.parity.explain.numerics.by_token import CONSTANT, TEMPERATURE
from lockstep.parity.explain.numerics.direction import SCALED
from lockstep.parity.explain.numerics.systematic import Systematic, Tested, again, systematic
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.search_tolerances import (
    FEWEST_PROMPTS,
    SCORE_AGAIN_T,
    SCORE_POWER,
    SYSTEMATIC_LEFT,
    SYSTEMATIC_NATS,
)
from lockstep.records.samples import Samples
from lockstep.records.verdicts import Verdict

CAUSE = "systematic_departure"
SEQUENCES, SEQUENCES_COARSE = 32, 128
"""Drawn where the recipe does not say: in fp32, whose noise is a thousandth of bf16's, fewer show as much."""
SAME = "the two sides' numbers are the same to the last digit, which leaves no direction"
MARGIN = 1.1
"""More sequences than the root law asks for: the size that is seen is itself known to some per cent."""
MORE = 4
"""How many times as many sequences are drawn where so few show nothing of any size."""

DrawMore = Callable[[int, int], Samples]
"""(which, n) → n sequences, or as many as there are; each ``which`` has prompts of its own."""


def deepen(pair: Pair, numerics: Verdict, drawn: DrawMore | None = None) -> Verdict:
    """Layer 4's verdict with every direction tested besides; one that is proven fails it.

    Args:
        drawn: where sequences come from; None draws them from the engine.
    """
    drawn = drawn or partial(_drawn, pair)
    n = pair.recipe.parity.direction_sequences
    if n == 0:
        return replace(numerics, summary=f"{numerics.summary}; no direction was tested, as was asked for")
    sample = drawn(0, n or (SEQUENCES_COARSE if pair.coarse else SEQUENCES))
    if reason := _untestable(sample):
        return replace(numerics, summary=f"{numerics.summary}; no direction was tested: {reason}")
    trainer = sample.scored(pair.trainer)
    if not (sample.engine_logprobs != trainer).any():
        return replace(numerics, summary=f"{numerics.summary}; {SAME}")
    sample, tested = _tested(pair, sample, trainer, drawn)
    called = tested.called
    known = _figures(tested)
    figures: dict[str, Any] = numerics.figures | known | {"directions_n_tokens": sample.owners.size}
    if called is None:
        return replace(numerics, summary=f"{numerics.summary}; {_clean(known)}", figures=figures)
    fresh = drawn(1, len(sample))
    t = again(pair, fresh, fresh.scored(pair.trainer), called)
    figures |= {
        "direction": called.best.describe(),
        "direction_theta": called.theta,
        "direction_nats": called.size,
        "direction_again_t": t,
    }
    text = f"{called.told()}; on {len(fresh)} sequences of other prompts t = {t:+.1f}"
    if t < SCORE_AGAIN_T:
        chance = f"a direction that was found did not show again ({text})"
        return replace(numerics, summary=f"{numerics.summary}; {chance}", figures=figures)
    if called.size < SYSTEMATIC_NATS:
        small = f"a direction of {called.size:.1e} nats moves no ratio by {SYSTEMATIC_NATS:.1%} ({text})"
        return replace(numerics, summary=f"{numerics.summary}; {small}", figures=figures)
    named = abs(called.left) <= SYSTEMATIC_LEFT
    said = text if named else f"systematic, and unexplained by what comes nearest: {text}{_where(called)}"
    summary = f"the gap has a direction of {called.size:.1e} nats, hidden in its width"
    cause = finding(CAUSE, np.abs(called.effect), sample.owners, said, pair.engine.fix(CAUSE))
    return Verdict.failed("numerics", summary, cause, figures)


def _where(called: Systematic) -> str:
    return f"; the scores are largest in {called.loudest}" if called.loudest else ""


def _untestable(sample: Samples) -> str:
    """Why directions cannot be tested on it; empty where they can."""
    if sample.sampling.temperature == 0.0:
        return "greedy tokens are chosen by their own rounding"
    n = len({prompt.tobytes() for prompt in sample.prompts})
    return f"{n} prompts in one half, {FEWEST_PROMPTS} are needed" if n < FEWEST_PROMPTS else ""


def _tested(pair: Pair, sample: Samples, trainer: np.ndarray, drawn: DrawMore) -> tuple[Samples, Tested]:
    """Every direction on enough sequences for the size that is to be seen, or on all that there are.

    Args:
        trainer: score C of the first sample, float32 [T].
    """
    asked = pair.recipe.parity.directions_see
    n = len(sample)
    which = 0
    began = time.monotonic()
    tested = systematic(pair, sample, trainer)
    # A log that gave fewer sequences than were asked for holds no more: what these show is all.
    while asked and tested.called is None and _seen(tested) > asked and len(sample) == n:
        took = (time.monotonic() - began) / n
        seen = _seen(tested)
        # What is seen shrinks with the root of the number of sequences.
        n = math.ceil(n * (seen / asked) ** 2 * MARGIN) if math.isfinite(seen) else n * MORE
        pair.say(
            f"directions: {len(sample)} sequences show a departure of {seen:.2%}; "
            f"{n} are taken to show {asked:.2%}, about {n * took:.0f} s"
        )
        # Others, so that what chance put into these is not there again; even, for a log keeps the prompts of
        # odd numbers for the second look.
        which += 2
        began = time.monotonic()
        sample = drawn(which, n)
        tested = systematic(pair, sample, sample.scored(pair.trainer))
    return sample, tested


def _seen(tested: Tested) -> float:
    """The share by which a temperature, and half of the tensors' scales, would have to be off."""
    return float(max(tested.power(TEMPERATURE)[0], np.median(tested.power(SCALED))))


def _figures(tested: Tested) -> dict[str, float]:
    scales = tested.power(SCALED)
    return {
        "directions_n_tried": len(tested.directions),
        "directions_n_uncovered": len(tested.uncovered),
        "directions_largest_t": float(np.abs(tested.scored.t).max()),
        "directions_noise_t": tested.scored.critical,
        "directions_see_temperature": float(tested.power(TEMPERATURE)[0]),
        "directions_see_constant_nats": float(tested.power(CONSTANT)[0]),
        "directions_see_scale_p50": float(np.median(scales)),
        "directions_see_scale_max": float(scales[-1]),
    }


def _clean(known: dict[str, float]) -> str:
    largest, noise = known["directions_largest_t"], known["directions_noise_t"]
    temperature, constant = known["directions_see_temperature"], known["directions_see_constant_nats"]
    half, every = known["directions_see_scale_p50"], known["directions_see_scale_max"]
    return (
        f"none of {known['directions_n_tried']} directions has |t| over {largest:.1f}, and noise stays below "
        f"{noise:.1f}; seen {SCORE_POWER:.0%} of the time: a temperature off by {temperature:.2%}, "
        f"a constant of {constant:.1e} nats, half of the tensors scaled by {half:.1%}, each by {every:.0%}"
    )


def _drawn(pair: Pair, which: int, n: int) -> Samples:
    seed = pair.seed + 1_000 * (which + 1)
    parity = pair.recipe.parity
    sampling = replace(pair.recipe.sampling, max_tokens=parity.probe_tokens, stop_token_ids=())
    return draw(pair, probe_prompts(pair, n, seed), sampling, seed)
