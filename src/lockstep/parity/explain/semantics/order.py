"""Layer 1's one order: which cause is named, of a live engine's numbers as of a log's.

Each only when those before it found nothing: 1. numbers that are none; a doubled BOS; a function applied to
the numbers; 2. numbers beside other tokens, tokens that are others, edited prompts, where no setting that
nobody asked for explains the numbers; 3. what was asked for and the trainer does not score: a truncation,
then penalties; 4. settings that nobody asked for; 5. numbers that nothing explains; 6. raw numbers; 7. draws
from another distribution than that of the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from lockstep.parity.causes import finding
from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.fitting import miss_of
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.explain.semantics.alignment import examine, transformed
from lockstep.parity.explain.semantics.hypotheses import Fit, scored_under
from lockstep.parity.explain.semantics.prompt_edits import doubled_bos
from lockstep.parity.explain.semantics.sampler import Explained, examine_draws
from lockstep.parity.explain.semantics.unasked import unasked
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import EXPLAINS, MOST_ROWS
from lockstep.parity.tolerances import RARELY_ABOVE
from lockstep.policy.truncation import kept_log_mass
from lockstep.records.semantics import LogprobSemantics
from lockstep.records.verdicts import Finding


@dataclass(frozen=True)
class Identified:
    """Which candidate explains the engine's numbers on the telling sample."""

    ranked: list[Fit]
    limit: float
    """A candidate explains the numbers when its median miss is at most this, nats."""
    ground: float = float("nan")
    """median |B − C| at T = 1, nats; NaN of a log, which nothing was drawn for."""

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
        apart = "" if np.isnan(self.ground) else f"; at T=1 the two sides differ by {self.ground:.1e}"
        return f"{best} (medians){apart}"


def named(semantics: LogprobSemantics) -> str:
    """``raw``, ``tempered``, ``truncated``, ``penalised``, or what of them applies."""
    parts = {
        "tempered": semantics.temperature != 1.0,
        "truncated": semantics.truncated,
        "penalised": semantics.penalised,
    }
    return ", ".join(name for name, applies in parts.items() if applies) or "raw"


@dataclass(frozen=True)
class Case:
    """One check. Its looks are made when the order comes to them: some cost a pass over a whole file."""

    pair: Pair
    n_tokens: int
    """What the judgement rests on."""
    unreal: Callable[[], Explanation | None]
    """Numbers that are none, whatever they are held against."""
    prompt: Callable[[], np.ndarray]
    """One that the engine is sent, int32 [P]."""
    evidence: Callable[[], Evidence]
    identified: Callable[[], Identified]
    ours: Callable[[], bool]
    """True when what is off, where most numbers are explained, is no later layer's."""
    later: Callable[[], bool]
    """True when a later layer may explain what no hypothesis of this one does."""
    draws: Callable[[], Finding | None]
    """Tokens that are not drawn from what the numbers are of."""
    strange: Callable[[], Explanation | None] = lambda: None
    """What no setting brings about, and :func:`examine` does not know."""
    stops: Callable[[], Explanation | None] = lambda: None
    """Completions that ended at a stop token and come without it."""
    question: str = ""
    """What is asked where nothing explains the numbers, as the end of a sentence."""


def first_cause(case: Case) -> Explanation | Finding | None:
    """The first that is found; an :class:`Explanation` where the numbers are wrong on ``neutral`` already."""
    mangled = (
        case.unreal()
        or doubled_bos(case.pair, case.prompt())
        # Before any setting: one fitted to a function of the right numbers would be a wrong name for it.
        or transformed(case.pair, case.evidence())
        or case.strange()
    )
    if mangled is not None:
        return mangled
    hidden = _hidden(case)
    mangled = (examine(case.pair, case.evidence()) or case.stops()) if hidden is None else None
    return mangled or _distribution(case, hidden) or case.draws()


def finding_of(case: Case, explanation: Explanation) -> Finding:
    """With what the numbers miss by on ``neutral``; with one NaN where some are missing."""
    if explanation.cause == "missing_logprobs":
        return _finding(case, explanation.cause, explanation.evidence, np.full(1, np.nan), np.zeros(1, int))
    evidence = case.evidence()
    neutral = evidence.neutral
    trainer = evidence.own_trainer if neutral is evidence.own else evidence.trainer
    size = np.abs(neutral.engine_logprobs - trainer)
    return _finding(case, explanation.cause, explanation.evidence, size, neutral.owners)


def _finding(case: Case, cause: str, text: str, size: np.ndarray, owners: np.ndarray) -> Finding:
    return finding(cause, size, owners, text, case.pair.engine.fix(cause), case.n_tokens)


def _hidden(case: Case) -> Explained | None:
    """Settings that nobody asked for, where the numbers need them, even if most tokens do not feel them."""
    evidence = case.evidence()
    identified = case.identified()
    samples = evidence.telling
    miss = identified.ranked[0].p50
    if identified.best is not None:
        # What was asked for explains most numbers, not all: a setting that few tokens feel, such as a bias.
        samples = evidence.neutral
        gap = samples.engine_logprobs - evidence.trainer
        if within(case.pair.noise, gap) or not case.ours():
            return None
        miss = miss_of(gap)
    # The limit is wide where the sides differ at T = 1 too: a setting must also leave little of the miss.
    return unasked(case.pair, samples, min(identified.limit, EXPLAINS * miss))


def _distribution(case: Case, hidden: Explained | None) -> Finding | None:
    """Is what explains the numbers what was asked for, and what the trainer scores?"""
    evidence = case.evidence()
    identified = case.identified()
    trainer = case.pair.trainer
    own = evidence.own
    asked = own.sampling
    text = identified.evidence()
    if asked.truncates:
        # Not the gap: an engine that truncates the draws and reports raw numbers has none.
        parts = [kept_log_mass(trainer.logits, h, asked) for h in evidence.states(case.pair, own)]
        size = np.concatenate([-part.numpy(force=True) for part in parts])
        return _finding(case, "truncation_unmodelled", text, size, own.owners)
    if asked.penalises:
        drawn = LogprobSemantics.of("sampler_untruncated", asked)
        (scores,) = scored_under(trainer, own.groups, asked, [drawn])
        return _finding(case, "penalties_unmodelled", text, np.abs(scores - evidence.own_trainer), own.owners)
    if hidden is not None:
        samples = evidence.neutral
        gap = samples.engine_logprobs - evidence.trainer
        if identified.best is None:
            samples = evidence.telling
            gap = identified.ranked[0].gap
        text = f"{hidden.name} fits to {hidden.miss:.1e} nats; of what was asked for, {text}"
        return _finding(case, hidden.cause, text, np.abs(gap), samples.owners)
    if identified.best is None:
        return None if case.later() else _unexplained(case, text)
    # At T = 1 raw numbers are the tempered ones, and so they are of greedy draws.
    if identified.best.temperature != evidence.telling.temperature and own.temperature != 1.0:
        return _raw(case, text)
    return None


def _unexplained(case: Case, text: str) -> Finding:
    gap = case.identified().ranked[0].gap
    limit = case.identified().limit
    finite = np.isfinite(gap)
    owners = case.evidence().telling.owners[finite]
    text = f"{text}{case.question}{case.pair.search.told()}"
    # What is banned leaves its mass to what is allowed: a mask makes numbers larger, never smaller.
    if np.mean(gap > limit) >= MOST_ROWS and np.mean(gap < -limit) <= RARELY_ABOVE:
        text = (
            "hardly a number is below the trainer's, as under a mask that changes from token to token "
            f"(a grammar); {text}"
        )
    return _finding(case, "unexplained_semantics", text, np.abs(gap[finite]), owners)


def _raw(case: Case, text: str) -> Finding:
    """Raw numbers of draws at the temperature that was asked for; or the draws are at T = 1 too."""
    evidence = case.evidence()
    own = evidence.own
    asked = examine_draws(case.pair.trainer, own.groups, own.sampling)
    at_one = examine_draws(case.pair.trainer, own.groups, replace(own.sampling, temperature=1.0))
    cause = "raw_logprobs"
    if asked.oddity() and not at_one.oddity():
        cause = "temperature_altered"
        text = f"drawn at T=1 too, not at {own.sampling.temperature:g}: {asked.oddity()}; {text}"
    return _finding(case, cause, text, np.abs(evidence.own_trainer - own.engine_logprobs), own.owners)
