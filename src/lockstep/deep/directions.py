"""Layer 4 at full depth: what the width of the gap hides.

A direction is called where chance explains it neither on the tokens that it was found on, among all that were
tried, nor on tokens drawn anew.
"""

from typing import Any

import numpy as np
from msgspec.structs import replace

from lockstep.parity.causes import finding
from lockstep.parity.explain.numerics.systematic import (
    CONSTANT,
    SCALED,
    TEMPERATURE,
    Tested,
    again,
    systematic,
)
from lockstep.parity.pair import Pair, draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import SCORE_AGAIN_T, SCORE_POWER, SYSTEMATIC_LEFT, SYSTEMATIC_NATS
from lockstep.records.samples import Samples
from lockstep.records.verdicts import Verdict

CAUSE = "systematic_departure"


def deepen(pair: Pair, numerics: Verdict) -> Verdict:
    """Layer 4's verdict with every direction tested besides; one that is proven fails it."""
    sample = _drawn(pair, 1)
    trainer = sample.scored(pair.trainer)
    tested = systematic(pair, sample, trainer)
    found = tested.found
    known = _figures(tested)
    figures: dict[str, Any] = numerics.figures | known | {"directions_n_tokens": trainer.size}
    if found is None:
        return replace(numerics, summary=f"{numerics.summary}; {_clean(known)}", figures=figures)
    fresh = _drawn(pair, 2)
    t = again(pair, fresh, fresh.scored(pair.trainer), found)
    figures |= {
        "direction": found.best.describe(),
        "direction_theta": found.theta,
        "direction_nats": found.size,
        "direction_again_t": t,
    }
    text = f"{found.told()}; on {len(fresh)} sequences drawn anew t = {t:+.1f}"
    if t < SCORE_AGAIN_T:
        chance = f"a direction that was found did not show again ({text})"
        return replace(numerics, summary=f"{numerics.summary}; {chance}", figures=figures)
    if found.size < SYSTEMATIC_NATS:
        small = f"a direction of {found.size:.1e} nats moves no ratio by {SYSTEMATIC_NATS:.1%} ({text})"
        return replace(numerics, summary=f"{numerics.summary}; {small}", figures=figures)
    named = abs(found.left) <= SYSTEMATIC_LEFT
    said = text if named else f"systematic, and unexplained by what comes nearest: {text}"
    summary = f"the gap has a direction of {found.size:.1e} nats, hidden in its width"
    cause = finding(CAUSE, np.abs(found.effect), sample.owners, said, pair.engine.fix(CAUSE))
    return Verdict.failed("numerics", summary, cause, figures)


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


def _drawn(pair: Pair, more: int) -> Samples:
    seed = pair.seed + 1_000 * more
    parity = pair.recipe.parity
    sampling = replace(pair.recipe.sampling, max_tokens=parity.probe_tokens, stop_token_ids=())
    return draw(pair, probe_prompts(pair, parity.direction_sequences, seed), sampling, seed)
