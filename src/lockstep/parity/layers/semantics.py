"""Layer 1: which distribution are the engine's log-probabilities of, and is it the one the trainer scores?

What is looked at, and in which order, stands in ``explain/semantics/order.py``; here is what only a live
engine can be asked: its own re-score, completions that stop, requests for several samples, many draws.

What B and C differ by, at T = 1, where all hypotheses coincide, is the *ground*: it is no matter of
semantics, so wrong weights or coarse arithmetic further down disturb nothing here. Nor does an engine that
disagrees with itself at T = 1: that is layer 2's.
"""

from functools import cache
from typing import Any

import numpy as np

from lockstep.parity.causes import finding
from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.explain.semantics.alignment import dropped_stop
from lockstep.parity.explain.semantics.draws import draw_many
from lockstep.parity.explain.semantics.groups import examine_groups
from lockstep.parity.explain.semantics.hypotheses import fits
from lockstep.parity.explain.semantics.order import Case, Identified, finding_of, first_cause, named
from lockstep.parity.explain.semantics.sampler import examine_draws, likeliest_temperature
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import SEMANTICS_MARGIN
from lockstep.records.verdicts import Finding, Verdict


def identify(pair: Pair, evidence: Evidence) -> Identified:
    """Fit every candidate."""
    telling = evidence.telling
    ground = float(np.median(np.abs(evidence.rescored - evidence.trainer)))
    limit = max(pair.noise.p50, SEMANTICS_MARGIN * ground)
    states = evidence.states(pair, telling)
    ranked = fits(pair.trainer, telling.groups, telling.engine_logprobs, telling.sampling, limit, states)
    identified = Identified(ranked, limit, ground)
    if ground > pair.noise.p50 and identified.margin < SEMANTICS_MARGIN:
        identified = _by_the_engine_alone(pair, evidence, identified)
    return identified


def _by_the_engine_alone(pair: Pair, evidence: Evidence, identified: Identified) -> Identified:
    """Where the trainer's scores are too far off to tell, the engine's own re-score says whether its numbers
    are raw."""
    telling = evidence.telling
    if not pair.engine.ready.capabilities["rescore"].supported:
        return identified
    fit = float(np.median(np.abs(telling.engine_logprobs - telling.rescored(pair.engine))))
    raw = fit <= pair.noise.p50
    first = [f for f in identified.ranked if (named(f.semantics) == "raw") == raw]
    rest = [f for f in identified.ranked if (named(f.semantics) == "raw") != raw]
    if not first:
        return identified
    # The engine has decided: what the trainer's scores miss by, too far off to judge, must not refuse it.
    limit = max(identified.limit, first[0].p50)
    return Identified([*first, *rest], limit, identified.ground)


def judge(pair: Pair, evidence: Evidence) -> Verdict:
    """The verdict of layer 1."""
    missing = sum(sample.missing for sample in evidence.samples)
    n = evidence.n_tokens
    declared = pair.engine.semantics(evidence.own.sampling)
    figures = {"missing_logprobs": missing, "declared": declared.describe()}
    without = Explanation(
        "missing_logprobs", f"{missing} of {n} tokens came without a finite log-probability"
    )
    identified = cache(lambda: identify(pair, evidence))
    draws: dict[str, Any] = {}
    case = Case(
        pair=pair,
        n_tokens=n,
        unreal=lambda: without if missing else None,
        prompt=lambda: pair.renderer.prompt(pair.task.messages(pair.task.item(0))),
        evidence=lambda: evidence,
        identified=identified,
        ours=lambda: _confirmed(pair, evidence),
        later=lambda: _path_may_explain(pair, evidence, identified()),
        draws=lambda: _draws(pair, evidence, identified(), draws),
        stops=lambda: dropped_stop(pair, evidence, pair.seed),
    )
    found = first_cause(case)
    if isinstance(found, Explanation):
        summary = found.evidence if found is without else _summary(found.cause, evidence)
        return Verdict.failed("semantics", summary, finding_of(case, found), figures)
    fitted = identified()
    figures |= {
        "identified": named(fitted.ranked[0].semantics) if fitted.best is not None else "unexplained",
        "runner_up": named(fitted.ranked[1].semantics) if len(fitted.ranked) > 1 else "none",
        "margin": fitted.margin,
        "fit_p50_nats": fitted.ranked[0].p50,
        "ground_p50_nats": fitted.ground,
        "minimal_detectable_effect_nats": fitted.limit,
    } | draws
    if found is not None:
        return Verdict.failed("semantics", _summary(found.cause, evidence), found, figures)
    seen = figures.get("draws_would_see", "")
    summary = f"{_passed(pair, evidence, fitted)}{f'; {seen}, would have been seen' if seen else ''}"
    return Verdict(layer="semantics", status="PASS", summary=summary, n_tokens=n, figures=figures)


def _passed(pair: Pair, evidence: Evidence, identified: Identified) -> str:
    if identified.best is None:
        return "nothing but what the engine disagrees with itself about at T = 1, which is the next layer's"
    best = identified.best
    declared = pair.engine.semantics(evidence.telling.sampling)
    said = "" if named(declared) == named(best) else f", though it declares the {declared.describe()}"
    note = ", which is the same at T=1" if named(best) == "raw" else ""
    own = evidence.telling is evidence.own
    reported = best.describe() if own else f"{best.distribution} distribution, at T=1 here"
    if identified.margin < SEMANTICS_MARGIN:
        apart = f"the two sides are {identified.ground:.1e} nats apart at T=1"
        return f"{apart}, too far to tell the {reported} from others: a later layer's"
    finite = np.isfinite(identified.margin)
    margin = f"; the runner-up fits {identified.margin:.0f} times worse" if finite else ""
    return f"the engine reports what the trainer scores: the {reported}{note}{said}{margin}"


def _summary(cause: str, evidence: Evidence) -> str:
    t = evidence.own.sampling.temperature
    return {
        "raw_logprobs": f"the engine reports raw log-probabilities (T=1) of tokens that it drew at T={t:g}",
        "truncation_unmodelled": (
            "tokens are drawn from a truncated distribution, the trainer scores the whole one"
        ),
        "penalties_unmodelled": "tokens are drawn under penalties that the trainer does not apply",
        "unexplained_semantics": "no hypothesis explains the engine's log-probabilities",
        "draws_differ": "the tokens are not drawn from the distribution that their numbers are of",
        "generation_config_applied": (
            "the engine applies the checkpoint's generation_config.json to every request"
        ),
    }.get(cause, cause.replace("_", " "))


def _confirmed(pair: Pair, evidence: Evidence) -> bool:
    """True when the engine re-scores, and as the trainer scores."""
    return pair.engine.ready.capabilities["rescore"].supported and evidence.confirmed(pair)


def _path_may_explain(pair: Pair, evidence: Evidence, identified: Identified) -> bool:
    """True when the numbers are no worse than the engine disagrees with itself at T = 1, which is for layer 2
    to judge.

    A completion's first token comes out of a prefill, as its re-score does: where the trainer confirms the
    re-score and already the first token's number is another, no path through the engine explains it.
    """
    neutral = evidence.neutral
    gap = np.abs(neutral.engine_logprobs - evidence.rescored)
    if not identified.ranked[0].p50 <= SEMANTICS_MARGIN * np.median(gap):
        return False
    return not _confirmed(pair, evidence) or bool(np.median(gap[neutral.positions == 0]) <= pair.noise.p50)


def _draws(pair: Pair, evidence: Evidence, identified: Identified, figures: dict) -> Finding | None:
    """Are the tokens drawn from what the numbers are of? Judged where the two sides agree at all."""
    at_one = np.median(np.abs(evidence.neutral.engine_logprobs - evidence.trainer))
    if not max(identified.ground, at_one) <= pair.noise.p50:
        return None
    for name, sample in (("own", evidence.own), ("neutral", evidence.neutral)):
        states = evidence.states(pair, sample)
        draws = examine_draws(pair.trainer, sample.groups, sample.sampling, states)
        figures |= {f"draws_z_{name}": draws.z, f"draws_excess_{name}_nats": draws.excess_nats}
        if draws.oddity():
            likeliest = likeliest_temperature(pair.trainer, sample.groups, sample.sampling)
            text = (
                f"over {draws.n_tokens} tokens {draws.oddity()}; "
                f"the draws look like T={likeliest:.2g}, asked was {sample.sampling.temperature:g}"
            )
            fix = pair.engine.fix("draws_differ")
            return finding("draws_differ", draws.sizes, sample.owners, text, fix, evidence.n_tokens)
        if evidence.own is evidence.neutral:  # a recipe that samples plainly at T = 1: one sample, two names
            break
    return _grouped(pair, evidence, figures) or _many_draws(pair, evidence, figures)


def _grouped(pair: Pair, evidence: Evidence, figures: dict) -> Finding | None:
    """Are requests for several samples answered as those for one are? Asked where those for one are right."""
    if not within(pair.noise, evidence.own.engine_logprobs - evidence.own_trainer):
        return None
    wrong, sample, gap = examine_groups(pair, evidence.own.sampling)
    figures["grouped_gap_abs_max_nats"] = float(np.abs(gap).max())
    if wrong is None:
        return None
    owners = sample.owners if gap.size == sample.owners.size else np.zeros(gap.size, int)
    fix = pair.engine.fix(wrong.cause)
    return finding(wrong.cause, np.abs(gap), owners, wrong.evidence, fix, sample.owners.size)


def _many_draws(pair: Pair, evidence: Evidence, figures: dict) -> Finding | None:
    """Draws enough for small effects; the smallest that would have been seen goes into the figures."""
    n_tokens = pair.recipe.parity.draw_tokens
    if not n_tokens:
        return None
    drawn = draw_many(pair, evidence.own.sampling, n_tokens)
    figures |= {
        "draws_log_evidence": drawn.log_evidence,
        "draws_n_tokens": drawn.singles.n + drawn.crowd.n,
        "draws_smallest_temperature": drawn.smallest_temperature,
        "draws_power_better_of_two": drawn.power_of_two,
        "draws_would_see": drawn.told(),
    }
    if not drawn.odd:
        return None
    worst = max(drawn.parts, key=lambda part: max(part.log_products))
    # Turned, not absolute: single draws scatter to both sides, and the effect is their mean.
    size = worst.excess * np.sign(worst.excess_nats)
    cause = "draws_differ"
    fix = pair.engine.fix("draws_differ")
    return finding(cause, size, np.arange(size.size), drawn.oddity(), fix, drawn.singles.n + drawn.crowd.n)
