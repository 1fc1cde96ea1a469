"""The completions of a log that were drawn under one setting: what of the layers can be said of them.

Layer 1 asks what it asks of a live engine, in the same order, of a few rows; what strikes some tokens or some
rows, and leaves the median right, is looked for on all that are measured.
"""

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from lockstep.engines.logged import REASON
from lockstep.logged.numbers import (
    Gaps,
    corrupted,
    foreign,
    not_greedy,
    of_all,
    of_few,
    placeholders,
    some_rows,
)
from lockstep.logged.rows import Logged
from lockstep.parity.causes import CAUSES, NamedCause, finding
from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.explain.semantics.hypotheses import fits
from lockstep.parity.explain.semantics.order import Case, Identified, finding_of, first_cause
from lockstep.parity.explain.semantics.sampler import examine_draws
from lockstep.parity.explain.semantics.vocabulary import moved_ids
from lockstep.parity.explain.weights.trainer_hypotheses import explain
from lockstep.parity.pair import Pair
from lockstep.records.samples import Samples
from lockstep.records.verdicts import Finding, LayerName, Verdict

FEW_ROWS = 32
"""Completions that hypotheses are tried on; the gap is measured on all. Neighbours, for a log may have mixed
them up."""
FEW_TOKENS = 256
"""The first so many of each."""
SAID_EVERY_S = 10.0
"""How far the scoring is."""
UNEXPLAINED = "unexplained_numerics"
SAY_DTYPE = "say what it ran in: --set engine.dtype=bfloat16"
MEND_CORRUPTED = (
    "Join completions to prompts by request id wherever they pass a proxy or a log. "
    "If the engine returned them so, its state or cache slots are mixed up: "
    "look for its version notes; try a larger cache."
)
"""The general one speaks of an engine alone."""


class LogPart:
    """The completions of a log that were drawn under one setting, and a few of them for hypotheses.

    Args:
        every: its rows that have a judged token.
        rows: those of them that the gap is measured on.
        wrong_mask: what is wrong with a mask of the file; empty when nothing is.
    """

    def __init__(
        self, pair: Pair, logged: Logged, every: np.ndarray, rows: np.ndarray, wrong_mask: str = ""
    ) -> None:
        self.pair = pair
        self.logged = logged
        self.every = every
        self.rows = rows
        self.wrong_mask = wrong_mask
        self.n = int(logged.counts(rows).sum())
        self.sampling = logged.samplings[logged.settings[rows[0]]]

    @cached_property
    def few(self) -> Samples:
        """The first run of tokens that were sampled one after the other, of each of the first rows."""
        return self.logged.turns(self.every[:FEW_ROWS], FEW_TOKENS)

    @cached_property
    def trainer(self) -> np.ndarray:
        """The trainer's scores of the few: float32 [tokens of those]."""
        return self.few.scored(self.pair.trainer)

    @cached_property
    def gaps(self) -> Gaps:
        """trainer − engine of every token that is judged."""
        gap = np.empty(self.n, np.float32)
        done = 0
        said = time.monotonic()
        for portion in self.logged.gaps(self.pair.trainer, self.rows, self.sampling.temperature or 1.0):
            gap[done : done + portion.size] = portion
            done += portion.size
            if time.monotonic() - said > SAID_EVERY_S:
                self.pair.say(f"scoring: {done:,} of {self.n:,} tokens")
                said = time.monotonic()
        return of_all(self.logged, self.rows, gap)

    def portion(self, which: int, n: int) -> Samples:
        """Up to ``n`` completions of the prompts that are for ``which``."""
        return self.logged.portion(self.rows, which, n, self.pair.recipe.parity.probe_tokens)

    def semantics(self) -> Verdict:
        """The verdict of layer 1."""
        case = Case(
            pair=self.pair,
            n_tokens=self.n,
            unreal=self._unreal,
            prompt=lambda: self.few.prompts[0],
            evidence=lambda: self.evidence,
            identified=lambda: self.identified,
            ours=lambda: self._some_off,
            later=lambda: self.other is not None,
            draws=self._draws,
            strange=self._strange,
            question="; is --model the checkpoint that drew them?",
        )
        found = first_cause(case)
        if isinstance(found, Explanation):
            return self._failed(finding_of(case, found), {})
        best = self.identified.ranked[0]
        figures = {"identified": best.semantics.describe(), "fit_p50_nats": best.p50}
        figures["minimal_detectable_effect_nats"] = self.identified.limit
        if found is not None:
            return self._failed(found, figures)
        summary = f"the log holds what the trainer scores: the {best.semantics.describe()}"
        if self.identified.best is None:
            summary = "the log's numbers are those of another model, which layer numerics names"
        return Verdict(layer="semantics", status="PASS", summary=summary, n_tokens=self.n, figures=figures)

    @cached_property
    def identified(self) -> Identified:
        """What of what was asked for explains the few."""
        few = self.few
        limit = self.pair.noise.p50
        ranked = fits(self.pair.trainer, few.groups, few.engine_logprobs, few.sampling, limit)
        return Identified(ranked, limit)

    @cached_property
    def evidence(self) -> Evidence:
        """The few, of an engine that cannot be asked again."""
        few = self.few
        rows = self.every[:FEW_ROWS]
        # For the sample at T = 1, where all hypotheses coincide, stands what explains the numbers.
        best = self.identified.ranked[0]
        scores = few.engine_logprobs - best.gap if self.identified.best is not None else self.trainer
        gaps = of_few(few, scores)
        shown = corrupted(self.pair, self.logged, rows, gaps)
        some = None if shown is None else some_rows(self.pair, self.logged, rows, gaps)
        # What layer path shows, nothing of this one is to explain.
        if shown is not None and some is not None and not some.plausible and not some.related:
            scores = np.where(np.isin(few.owners, shown.rows), few.engine_logprobs, scores)
        return replace(Evidence.by_trainer(few, scores), own_trainer=self.trainer)

    def _unreal(self) -> Explanation | None:
        # First: while it is in doubt which tokens were sampled, no number says anything.
        if self.wrong_mask:
            return Explanation("mask_contradicted", self.wrong_mask)
        values = self.logged.logprobs[self.logged.judged(self.every)]
        missing = np.count_nonzero(np.isnan(values))
        if missing:
            return Explanation(
                "missing_logprobs", f"{missing} of {values.size} are null, non-finite or clamped"
            )
        return placeholders(of_few(self.few, self.trainer), self.pair.noise)

    def _strange(self) -> Explanation | None:
        """Ids of another vocabulary; of all rows, numbers that are none of their tokens."""
        pair = self.pair
        if self.identified.best is None:
            return pair.search.first([("ids of another vocabulary", lambda: moved_ids(pair, self.few))])
        if not self._some_off:
            return None
        some = some_rows(pair, self.logged, self.rows, self.gaps)
        moved = None if some is None else foreign(pair, self.gaps, some)
        return placeholders(self.gaps, pair.noise) or moved

    @cached_property
    def _some_off(self) -> bool:
        """True where what explains the few is what the trainer scores, and does not explain all rows."""
        best = self.identified.best
        asked = self.few.sampling
        if best is None or best.temperature != self.few.temperature or asked.truncates or asked.penalises:
            return False
        return not within(self.pair.noise, self.gaps.gap)

    def _draws(self) -> Finding | None:
        """Tokens that are not drawn from the distribution that the numbers are of, or not as the log says."""
        few = self.few
        if self.identified.best is None:
            return None
        if few.sampling.temperature == 0.0:
            text = not_greedy(self.pair.trainer, few, self.pair.noise)
            size = np.abs(self.trainer - few.engine_logprobs)
            return finding("temperature_altered", size, few.owners, text, n_tokens=self.n) if text else None
        draws = examine_draws(self.pair.trainer, few.groups, few.sampling)
        # Not how likely they are, as of a live engine: a log may hold none but rows that were rewarded.
        text = draws.cut()
        return finding("draws_differ", draws.sizes, few.owners, text, n_tokens=self.n) if text else None

    @cached_property
    def other(self) -> Explanation | None:
        """A difference between two models that explains the numbers."""
        gap = self.trainer - self.few.engine_logprobs
        explanation = explain(self.pair, self.few, gap, precision_last=not self.pair.engine_dtype)
        return None if explanation.cause == UNEXPLAINED else explanation

    def explanation(self) -> NamedCause:
        """What the gap comes from."""
        if self.other is None:
            return NamedCause(UNEXPLAINED, "nothing is known of the engine that drew them", SAY_DTYPE)
        mend = CAUSES[self.other.cause].mend
        unsaid = self.other.cause == "body_precision" and not self.pair.engine_dtype
        fix = f"{SAY_DTYPE}; {mend}" if unsaid else mend
        return NamedCause(self.other.cause, self.other.evidence, fix)

    def path(self) -> Verdict:
        """The verdict of layer 2: corrupted completions are seen without an engine, the rest is not."""
        gaps = self.gaps
        completions = corrupted(self.pair, self.logged, self.rows, gaps)
        if completions is None:
            return Verdict.not_judged("path", REASON)
        text = completions.evidence()
        found = finding("corrupted_completions", np.abs(gaps.gap), gaps.owners, text, MEND_CORRUPTED, self.n)
        return self._failed(found, {}, "path")

    def _failed(self, found: Finding, figures: dict[str, Any], layer: LayerName = "semantics") -> Verdict:
        summary = f"{found.cause.replace('_', ' ')}, in completions drawn at T={self.sampling.temperature:g}"
        return Verdict.failed(layer, summary, found, figures)
