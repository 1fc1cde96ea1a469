"""Layer 1: which distribution are the engine's log-probabilities of, and is it the one the trainer scores?

In this order, each only when those before it found nothing:

1. every token has a finite number, and no function was applied to the numbers (``transforms.py``); 2. one
hypothesis explains the numbers on tokens where the hypotheses differ (``hypotheses.py``), with its runner-up;
where none does, settings that nobody asked for are fitted (``unasked.py``); 3. the numbers stand beside their
own tokens, the tokens are those that were drawn (``alignment.py``), after the prompt that was sent
(``prompt_edits.py``); 4. what explains them is what the recipe asked for, and what the trainer scores; 5. the
tokens are drawn from the distribution that the numbers are of (``sampler.py``).

What B and C differ by, at T = 1, where all hypotheses coincide, is the *ground*: it is no matter of
semantics, so wrong weights or coarse arithmetic further down disturb nothing here. Nor does an engine that
disagrees with itself at T = 1: that is layer 2's.
"""

from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from lockstep.parity.causes import finding
from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.fitting import miss_of
from lockstep.parity.explain.rows import Mangled
from lockstep.parity.explain.semantics.alignment import dropped_stop, examine, transformed
from lockstep.parity.explain.semantics.draws import draw_many
from lockstep.parity.explain.semantics.groups import examine_groups
from lockstep.parity.explain.semantics.hypotheses import Fit, fits, scored_under
from lockstep.parity.explain.semantics.prompt_edits import doubled_bos
from lockstep.parity.explain.semantics.sampler import Explained, examine_draws, likeliest_temperature
from lockstep.parity.explain.semantics.unasked import unasked
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import EXPLAINS, MOST_ROWS
from lockstep.parity.tolerances import RARELY_ABOVE, SEMANTICS_MARGIN
from lockstep.policy.truncation import kept_log_mass
from lockstep.records.samples import Samples
from lockstep.records.semantics import LogprobSemantics
from lockstep.records.verdicts import Finding, Verdict


@dataclass(frozen=True)
class Identified:
    """Which candidate explains the engine's numbers on the telling sample."""

    ranked: list[Fit]
    ground: float
    """median |B − C| at T = 1, nats."""
    limit: float
    """A candidate explains the numbers when its median miss is at most this, nats."""

    @property
    def best(self) -> LogprobSemantics | None:
        """The candidate that explains them, if one does."""
        return self.ranked[0].semantics if self.ranked[0].p50 <= self.limit else None

    @property
    def margin(self) -> float:
        """How many times worse the runner-up fits; infinite where the sampling tells no two candidates
        apart."""
        # Two sides that agree bit for bit miss by 0.
        return self.ranked[1].miss / max(self.ranked[0].miss, 1e-9) if len(self.ranked) > 1 else float("inf")

    def evidence(self) -> str:
        """The fits, for people."""
        best = "; ".join(f"{named(fit.semantics)} fits to {fit.p50:.1e} nats" for fit in self.ranked[:2])
        return f"{best} (medians); at T=1 the two sides differ by {self.ground:.1e}"


def named(semantics: LogprobSemantics) -> str:
    """``raw``, ``tempered``, ``truncated``, ``penalised``, or what of them applies."""
    parts = {
        "tempered": semantics.temperature != 1.0,
        "truncated": semantics.truncated,
        "penalised": semantics.penalised,
    }
    return ", ".join(name for name, applies in parts.items() if applies) or "raw"


def identify(pair: Pair, evidence: Evidence) -> Identified:
    """Fit every candidate."""
    telling = evidence.telling
    ground = float(np.median(np.abs(evidence.rescored - evidence.trainer)))
    limit = max(pair.noise.p50, SEMANTICS_MARGIN * ground)
    states = evidence.states(pair, telling)
    ranked = fits(pair.trainer, telling.groups, telling.engine_logprobs, telling.sampling, limit, states)
    identified = Identified(ranked, ground, limit)
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
    return Identified([*first, *rest], identified.ground, limit)


def judge(pair: Pair, evidence: Evidence) -> Verdict:
    """The verdict of layer 1."""
    missing = sum(sample.missing for sample in evidence.samples)
    n = evidence.n_tokens
    sampling = evidence.own.sampling
    figures = {"missing_logprobs": missing, "declared": pair.engine.semantics(sampling).describe()}
    if missing:
        evidence_text = f"{missing} of {n} tokens came without a finite log-probability"
        return _fail(pair, evidence, "missing_logprobs", evidence_text, figures, np.full(1, np.nan))
    prompt = pair.renderer.prompt(pair.task.messages(pair.task.item(0)))
    # Before any fit: a setting fitted to a function of the right numbers would be a wrong name for it.
    mangled = doubled_bos(pair, prompt) or transformed(pair, evidence)
    if mangled is not None:
        return _mangled(pair, evidence, mangled, figures)
    identified = identify(pair, evidence)
    hidden = _hidden(pair, evidence, identified)
    mangled = (examine(pair, evidence) or dropped_stop(pair, evidence, pair.seed)) if hidden is None else None
    if mangled is not None:
        return _mangled(pair, evidence, mangled, figures)
    figures |= {
        "identified": named(identified.ranked[0].semantics) if identified.best is not None else "unexplained",
        "runner_up": named(identified.ranked[1].semantics) if len(identified.ranked) > 1 else "none",
        "margin": identified.margin,
        "fit_p50_nats": identified.ranked[0].p50,
        "ground_p50_nats": identified.ground,
        "minimal_detectable_effect_nats": identified.limit,
    }
    failed = _distribution(pair, evidence, identified, hidden) or _draws(pair, evidence, identified, figures)
    if failed is not None:
        return Verdict.failed("semantics", _summary(failed.cause, evidence), failed, figures)
    seen = figures.get("draws_would_see", "")
    summary = f"{_passed(pair, evidence, identified)}{f'; {seen}, would have been seen' if seen else ''}"
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


def _hidden(pair: Pair, evidence: Evidence, identified: Identified) -> Explained | None:
    """Settings that nobody asked for, where the numbers need them, even if most tokens do not feel them."""
    telling, neutral = evidence.telling, evidence.neutral
    if identified.best is None:
        # Where the sides differ at T = 1 too the limit is wide: a setting must also leave little of the miss,
        # not just come near.
        limit = min(identified.limit, EXPLAINS * identified.ranked[0].p50)
        return unasked(pair, telling, limit)
    # What was asked for explains most numbers and not all: a setting that few tokens feel, such as a bias.
    if _confirmed(pair, evidence) and not within(pair.noise, neutral.engine_logprobs - evidence.trainer):
        limit = min(identified.limit, EXPLAINS * miss_of(neutral.engine_logprobs - evidence.trainer))
        return unasked(pair, neutral, limit)
    return None


def _mangled(pair: Pair, evidence: Evidence, mangled: Mangled, figures: dict) -> Verdict:
    """The verdict on numbers that are wrong on ``neutral`` already."""
    size = np.abs(evidence.neutral.engine_logprobs - evidence.trainer)
    return _fail(pair, evidence, mangled.cause, mangled.evidence, figures, size)


def _fail(pair: Pair, evidence: Evidence, cause: str, text: str, figures: dict, size: np.ndarray) -> Verdict:
    """A verdict that fails. ``size``: what the cause does to each token of ``neutral``, nats, or to all of
    them: one number."""
    of_neutral = size.size == evidence.neutral.engine_logprobs.size
    owners = evidence.neutral.owners if of_neutral else np.zeros(size.size, int)
    summary = _summary(cause, evidence) if cause != "missing_logprobs" else text
    failed = finding(cause, size, owners, text, pair.engine.fix(cause), evidence.n_tokens)
    return Verdict.failed("semantics", summary, failed, figures)


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


def _distribution(
    pair: Pair, evidence: Evidence, identified: Identified, hidden: Explained | None
) -> Finding | None:
    """Is what explains the numbers what was asked for, and what the trainer scores?"""
    own = evidence.own
    asked = evidence.own.sampling
    size = np.abs(evidence.own_trainer - own.engine_logprobs)
    text = identified.evidence()
    if asked.truncates:
        cause = "truncation_unmodelled"
        # Not the gap: an engine that truncates the draws and reports raw numbers has none.
        parts = [kept_log_mass(pair.trainer.logits, h, asked) for h in evidence.states(pair, own)]
        size = np.concatenate([-part.numpy(force=True) for part in parts])
    elif asked.penalises:
        cause = "penalties_unmodelled"
        drawn = LogprobSemantics.of("sampler_untruncated", asked)
        (scores,) = scored_under(pair.trainer, own.groups, asked, [drawn])
        size = np.abs(scores - evidence.own_trainer)
    elif hidden is not None:
        cause = hidden.cause
        text = f"{hidden.name} fits to {hidden.miss:.1e} nats; of what was asked for, {text}"
        sample, gap = _missed(evidence, identified)
        return finding(cause, np.abs(gap), sample.owners, text, pair.engine.fix(cause), evidence.n_tokens)
    elif identified.best is None:
        return (
            None
            if _path_may_explain(pair, evidence, identified)
            else _unexplained(pair, evidence, identified)
        )
    # At T = 1 raw numbers are the tempered ones.
    elif identified.best.temperature != evidence.telling.sampling.temperature and asked.temperature != 1.0:
        cause, text = _raw(pair, own, text)
    else:
        return None
    return finding(cause, size, own.owners, text, pair.engine.fix(cause), evidence.n_tokens)


def _missed(evidence: Evidence, identified: Identified) -> tuple[Samples, np.ndarray]:
    """The sample on which what was asked for does not explain the numbers, and engine − what comes nearest,
    float32 [T]."""
    if identified.best is None:
        return evidence.telling, identified.ranked[0].gap
    return evidence.neutral, evidence.neutral.engine_logprobs - evidence.trainer


def _unexplained(pair: Pair, evidence: Evidence, identified: Identified) -> Finding:
    sample, gap = _missed(evidence, identified)
    finite = gap[np.isfinite(gap)]
    text = f"{identified.evidence()}{pair.search.told()}"
    # What is banned leaves its mass to what is allowed: a mask makes numbers larger, never smaller.
    if np.mean(gap > identified.limit) >= MOST_ROWS and np.mean(gap < -identified.limit) <= RARELY_ABOVE:
        text = (
            "hardly a number is below the trainer's, as under a mask that changes from token to token "
            f"(a grammar); {text}"
        )
    owners = sample.owners[np.isfinite(gap)]
    cause = "unexplained_semantics"
    return finding(cause, np.abs(finite), owners, text, pair.engine.fix(cause), evidence.n_tokens)


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


def _confirmed(pair: Pair, evidence: Evidence) -> bool:
    """True when the engine re-scores, and as the trainer scores."""
    return pair.engine.ready.capabilities["rescore"].supported and evidence.confirmed(pair)


def _raw(pair: Pair, own: Samples, text: str) -> tuple[str, str]:
    """Raw numbers of tokens drawn at the recipe's temperature; or an engine that draws at T = 1 too, whatever
    it is asked."""
    asked = examine_draws(pair.trainer, own.groups, own.sampling)
    at_one = examine_draws(pair.trainer, own.groups, replace(own.sampling, temperature=1.0))
    if asked.oddity() and not at_one.oddity():
        return (
            "temperature_altered",
            f"drawn at T=1 too, not at {own.sampling.temperature:g}: {asked.oddity()}; {text}",
        )
    return "raw_logprobs", text


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
            return finding(
                "draws_differ",
                draws.sizes,
                sample.owners,
                text,
                pair.engine.fix("draws_differ"),
                evidence.n_tokens,
            )
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
