"""The completions of a log that were drawn under one setting: what of the layers can be said of them.

Layer 1 goes from what was asked for to what nobody asked for, on a few rows; what strikes some tokens or some
rows, and leaves the median right, is looked for on all that are measured.
"""

import time
from collections.abc import Sequence
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
from lockstep.parity.explain.fitting import miss_of
from lockstep.parity.explain.rows import Mangled
from lockstep.parity.explain.semantics.alignment import examine, transformed
from lockstep.parity.explain.semantics.hypotheses import Fit, fits
from lockstep.parity.explain.semantics.prompt_edits import doubled_bos
from lockstep.parity.explain.semantics.sampler import examine_draws
from lockstep.parity.explain.semantics.unasked import unasked
from lockstep.parity.explain.semantics.vocabulary import moved_ids
from lockstep.parity.explain.weights.trainer_hypotheses import Explanation, explain
from lockstep.parity.pair import Pair
from lockstep.parity.search_tolerances import EXPLAINS
from lockstep.records.samples import Samples
from lockstep.records.verdicts import LayerName, Verdict

FEW_ROWS = 32
"""Completions that hypotheses are tried on; the gap is measured on all. Neighbours, for a log may have mixed
them up."""
FEW_TOKENS = 256
"""The first so many of each."""
SAID_EVERY_S = 10.0
"""How far the scoring is."""
UNEXPLAINED = "unexplained_numerics"
SAY_DTYPE = "say what it ran in: --set engine.dtype=bfloat16"
MENDS_OF_A_LOG = {
    "corrupted_completions": (
        "Join completions to prompts by request id wherever they pass a proxy or a log. "
        "If the engine returned them so, its state or cache slots are mixed up: "
        "look for its version notes; try a larger cache."
    ),
}
"""Of causes whose general mend speaks of an engine alone."""


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
        """Of the first rows, the first run of tokens that were sampled one after the other."""
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
        pair = self.pair
        few = self.few
        # First: while it is in doubt which tokens were sampled, no number says anything.
        if self.wrong_mask:
            return self._fail("mask_contradicted", self.wrong_mask, {})
        values = self.logged.logprobs[self.logged.judged(self.every)]
        missing = np.count_nonzero(np.isnan(values))
        if missing:
            text = f"{missing} of {values.size} are null, non-finite or clamped"
            return self._fail("missing_logprobs", text, {}, np.full(1, np.nan))
        ranked = fits(pair.trainer, few.groups, few.engine_logprobs, few.sampling, pair.noise.p50)
        figures = {"identified": ranked[0].semantics.describe(), "fit_p50_nats": ranked[0].p50}
        figures["minimal_detectable_effect_nats"] = pair.noise.p50
        wrong = (
            doubled_bos(pair, few.prompts[0])
            or placeholders(of_few(few, self.trainer), pair.noise)
            or self._named(ranked)
        )
        if wrong is not None:
            return self._fail(wrong.cause, wrong.evidence, figures)
        summary = f"the log holds what the trainer scores: the {ranked[0].semantics.describe()}"
        if not ranked[0].p50 <= pair.noise.p50:
            summary = "the log's numbers are those of another model, which layer numerics names"
        return Verdict(layer="semantics", status="PASS", summary=summary, n_tokens=self.n, figures=figures)

    def _named(self, ranked: Sequence[Fit]) -> Mangled | None:
        """What is wrong with the numbers; None where nothing is, or where layer 4 explains them."""
        asked = self.few.sampling
        best = ranked[0]
        fitting = (
            "; ".join(f"{fit.semantics.describe()} fits to {fit.p50:.1e} nats" for fit in ranked[:2])
            + " (medians)"
        )
        if not best.p50 <= self.pair.noise.p50:
            return self._unexplained(fitting)
        if asked.penalises:
            return Mangled("penalties_unmodelled", fitting)
        if asked.truncates:
            hint = "" if best.semantics.truncated else "; the numbers do not show what was cut"
            return Mangled("truncation_unmodelled", f"{fitting}{hint}")
        if best.semantics.temperature != asked.temperature and asked.temperature > 0.0:
            return Mangled("raw_logprobs", fitting)
        return self._in_some() or self._drawn()

    def _unexplained(self, fitting: str) -> Mangled | None:
        """What is wrong where nothing that was asked for explains the numbers; None where layer 4 explains
        them."""
        hidden = self._unasked(fitting)
        if hidden is not None or self.other is not None:
            return hidden
        question = f"{fitting}; is --model the checkpoint that drew them?{self.pair.search.told()}"
        return Mangled("unexplained_semantics", question)

    def _drawn(self) -> Mangled | None:
        """Tokens that are not drawn from the distribution that the numbers are of, or not as the log says."""
        pair = self.pair
        few = self.few
        if few.sampling.temperature == 0.0:
            others = not_greedy(pair.trainer, few, pair.noise)
            return Mangled("temperature_altered", others) if others else None
        cut = examine_draws(pair.trainer, few.groups, few.sampling).cut()
        return Mangled("draws_differ", cut) if cut else None

    def _in_some(self) -> Mangled | None:
        """What strikes some tokens, or some rows, and leaves the median right."""
        pair = self.pair
        gaps = self.gaps
        if within(pair.noise, gaps.gap):
            return None
        replaced = placeholders(gaps, pair.noise)
        if replaced is not None:
            return replaced
        some = some_rows(pair, self.logged, self.rows, gaps)
        if some is None:
            return self._rarely_felt()
        moved = foreign(pair, gaps, some)
        if moved is not None:
            return moved
        unlike = not some.plausible and not some.related
        if unlike and corrupted(pair, self.logged, self.rows, gaps) is not None:
            return None  # layer path shows them
        return self._rarely_felt()

    def _unasked(self, fitting: str) -> Mangled | None:
        """Numbers changed, settings that nobody asked for, rows mangled, prompts edited: what layer 1 knows
        besides."""
        pair = self.pair
        few = self.few
        evidence = self._evidence()
        mangled = transformed(pair, evidence) or pair.search.first(
            [("ids of another vocabulary", lambda: moved_ids(pair, few))]
        )
        if mangled is not None:
            return mangled
        hidden = unasked(pair, few, pair.noise.p50)
        if hidden is not None:
            evidence_text = f"{hidden.name} fits to {hidden.miss:.1e} nats; of what was asked for, {fitting}"
            return Mangled(hidden.cause, evidence_text)
        mangled = examine(pair, evidence)
        return None if mangled is None else Mangled(mangled.cause, f"{mangled.evidence}; {fitting}")

    def _rarely_felt(self) -> Mangled | None:
        """A setting, or tokens that are others, where the median token feels nothing of it."""
        pair = self.pair
        few = self.few
        gap = few.engine_logprobs - self.trainer
        if within(pair.noise, gap):
            return None
        hidden = unasked(pair, few, min(pair.noise.p50, EXPLAINS * miss_of(gap)))
        if hidden is not None:
            return Mangled(hidden.cause, f"{hidden.name} fits to {hidden.miss:.1e} nats")
        return examine(pair, self._evidence())

    def _evidence(self) -> Evidence:
        """The few, of an engine that cannot be asked again."""
        return Evidence.by_trainer(self.few, self.trainer)

    @cached_property
    def other(self) -> Explanation | None:
        """A difference between two models that explains the numbers."""
        gap = self.trainer - self.few.engine_logprobs
        explanation = explain(self.pair, self.few, gap, precision_last=not self.pair.engine_dtype)
        return None if explanation.cause == UNEXPLAINED else explanation

    def explanation(self) -> NamedCause:
        """Of the gap."""
        if self.other is None:
            return NamedCause(UNEXPLAINED, "nothing is known of the engine that drew them", SAY_DTYPE)
        mend = CAUSES[self.other.cause].mend
        unsaid = self.other.cause == "body_precision" and not self.pair.engine_dtype
        fix = f"{SAY_DTYPE}; {mend}" if unsaid else mend
        return NamedCause(self.other.cause, self.other.evidence, fix)

    def path(self) -> Verdict:
        """The verdict of layer 2: corrupted completions are seen without an engine, the rest is not."""
        completions = corrupted(self.pair, self.logged, self.rows, self.gaps)
        if completions is None:
            return Verdict.not_judged("path", REASON)
        return self._fail("corrupted_completions", completions.evidence(), {}, np.abs(self.gaps.gap), "path")

    def _fail(
        self,
        cause: str,
        evidence: str,
        figures: dict[str, Any],
        size: np.ndarray | None = None,
        layer: LayerName = "semantics",
    ) -> Verdict:
        """A verdict that fails.

        Args:
            size: what the cause does to each token of the few or of all, nats; None for the gap of the few.
        """
        size = np.abs(self.trainer - self.few.engine_logprobs) if size is None else size
        owners = np.zeros(1, int)
        if size.size == self.trainer.size:
            owners = self.few.owners
        elif size.size == self.n:
            owners = self.gaps.owners
        mend = MENDS_OF_A_LOG.get(cause, CAUSES[cause].mend)
        named = finding(cause, size, owners, evidence, mend, self.n)
        summary = f"{cause.replace('_', ' ')}, in completions drawn at T={self.sampling.temperature:g}"
        return Verdict.failed(layer, summary, named, figures)
