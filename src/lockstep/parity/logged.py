"""Rollouts that another framework logged, judged by the trainer alone. No engine runs.

Layers semantics and numerics are judged, and of layer path completions that are corrupted; the rest needs a live engine: NOT_RUN.
What layer 1 cannot explain may still be a difference between two models: where one that layer 4 knows explains every number, that
is what is named.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.engines.logged import REASON, LoggedEngine
from lockstep.errors import UsageError
from lockstep.parity.alignment import examine, transformed
from lockstep.parity.causes import CAUSES, finding
from lockstep.parity.corruption import corrupted
from lockstep.parity.evidence import Evidence, Floors, within
from lockstep.parity.fitting import miss_of
from lockstep.parity.hypotheses import Fit, fits
from lockstep.parity.layer4_numerics import judge_gap
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.prompt_edits import doubled_bos
from lockstep.parity.sampler import examine_draws
from lockstep.parity.tolerances import EXPLAINS
from lockstep.parity.trainer_hypotheses import Explanation, explain
from lockstep.parity.unasked import unasked
from lockstep.policy.model import Policy
from lockstep.records.verdicts import LAYERS, LayerName, Verdict
from lockstep.rendering import Renderer

FEW_ROWS = 32
"""Completions that hypotheses are tried on; the gap is measured on all."""
FEW_TOKENS = 256
"""The first so many of each."""
UNEXPLAINED = "unexplained_numerics"


class Part:
    """The completions of a log that were drawn under one setting, and a few of them for hypotheses."""

    def __init__(self, pair: Pair, sample: Sampled) -> None:
        self.pair, self.sample = pair, sample
        self.n = sample.engine_logprobs.size
        self.few = _few(sample)
        self.trainer = self.few.scored(pair.policy)

    @cached_property
    def gap(self) -> np.ndarray:
        """trainer − engine of every token, float32 [T]."""
        return self.sample.scored(self.pair.policy) - self.sample.engine_logprobs

    def semantics(self) -> Verdict:
        """The verdict of layer 1."""
        pair, few = self.pair, self.few
        if self.sample.missing:
            text = f"{self.sample.missing} of {self.n} are null, non-finite or clamped"
            return self._fail("missing_logprobs", text, {}, np.full(1, np.nan))
        ranked = fits(pair.policy, few.groups, few.engine_logprobs, few.sampling, pair.noise.p50)
        figures = {"identified": ranked[0].semantics.describe(), "fit_p50_nats": ranked[0].p50}
        figures["minimal_detectable_effect_nats"] = pair.noise.p50
        told = doubled_bos(pair, few.prompts[0])
        found = (told.cause, told.evidence) if told else self._named(ranked)
        if found is not None:
            return self._fail(*found, figures)
        summary = f"the log holds what the trainer scores: the {ranked[0].semantics.describe()}"
        if not ranked[0].p50 <= pair.noise.p50:
            summary = "the log's numbers are those of another model, which layer numerics names"
        return Verdict(layer="semantics", status="PASS", summary=summary, n_tokens=self.n, figures=figures)

    def _named(self, ranked: Sequence[Fit]) -> tuple[str, str] | None:
        """Cause and evidence of what is wrong with the numbers; None where nothing is."""
        asked, best = self.few.sampling, ranked[0].semantics
        told = "; ".join(f"{fit.semantics.describe()} fits to {fit.p50:.1e} nats" for fit in ranked[:2]) + " (medians)"
        if not ranked[0].p50 <= self.pair.noise.p50:
            found = self._unasked(told)
            if found is not None:
                return found
            if self.other is not None:
                return None
            return "unexplained_semantics", f"{told}; is --model the checkpoint that drew them?"
        if asked.penalises:
            return "penalties_unmodelled", told
        if asked.truncates:
            return "truncation_unmodelled", told if best.truncated else f"{told}; the numbers do not show what was cut"
        if best.temperature != asked.temperature and asked.temperature > 0.0:
            return "raw_logprobs", told
        hidden = self._rarely_felt()
        if hidden is not None:
            return hidden
        cut = examine_draws(self.pair.policy, self.few.groups, asked).cut() if asked.temperature > 0.0 else ""
        return ("draws_differ", cut) if cut else None

    def _unasked(self, told: str) -> tuple[str, str] | None:
        """Numbers changed, settings that nobody asked for, rows mangled, prompts edited: what layer 1 knows besides."""
        pair, few, evidence = self.pair, self.few, self._evidence()
        mangled = transformed(pair, evidence)
        if mangled is not None:
            return mangled.cause, mangled.evidence
        hidden = unasked(pair, few, pair.noise.p50)
        if hidden is not None:
            return hidden.cause, f"{hidden.name} fits to {hidden.miss:.1e} nats; of what was asked for, {told}"
        mangled = examine(pair, evidence)
        return None if mangled is None else (mangled.cause, f"{mangled.evidence}; {told}")

    def _rarely_felt(self) -> tuple[str, str] | None:
        """A setting, or tokens that are others, where the median token feels nothing of it."""
        pair, few = self.pair, self.few
        gap = few.engine_logprobs - self.trainer
        if within(pair.noise, gap):
            return None
        found = unasked(pair, few, min(pair.noise.p50, EXPLAINS * miss_of(gap)))
        if found is not None:
            return found.cause, f"{found.name} fits to {found.miss:.1e} nats"
        mangled = examine(pair, self._evidence())
        return None if mangled is None else (mangled.cause, mangled.evidence)

    def _evidence(self) -> Evidence:
        """The trainer's scores stand in for the engine's own."""
        n = self.trainer.size
        floors = Floors(np.zeros(n, np.float32), np.zeros(n, np.float32), np.ones(n, bool))
        return Evidence(self.few, self.few, self.few, self.trainer, self.trainer, self.trainer, floors)

    @cached_property
    def other(self) -> Explanation | None:
        """A difference between two models that explains the numbers."""
        found = explain(self.pair, self.few, self.trainer - self.few.engine_logprobs)
        return None if found.cause == UNEXPLAINED else found

    def explanation(self) -> tuple[str, str, str]:
        """Cause, evidence and mend of the gap."""
        if self.other is not None:
            return self.other.cause, self.other.evidence, CAUSES[self.other.cause].mend
        return UNEXPLAINED, "nothing is known of the engine that drew them", "say what it ran in: --set engine.dtype=bfloat16"

    def path(self) -> Verdict:
        """The verdict of layer 2: corrupted completions are seen without an engine, the rest is not."""
        found = corrupted(self.pair, self.sample, self.sample.engine_logprobs + self.gap)
        if found is None:
            return _not_run("path", REASON)
        return self._fail("corrupted_completions", found.evidence(), {}, np.abs(self.gap), "path")

    def _fail(
        self, cause: str, evidence: str, figures: dict[str, Any], size: np.ndarray | None = None, layer: LayerName = "semantics"
    ) -> Verdict:
        size = np.abs(self.trainer - self.few.engine_logprobs) if size is None else size
        owners = next(
            (s.owners for s in (self.few, self.sample) if s.engine_logprobs.size == size.size), np.zeros(size.size, int)
        )
        found = finding(cause, size, owners, evidence, CAUSES[cause].mend, self.n)
        summary = f"{cause.replace('_', ' ')}, in completions drawn at T={self.sample.sampling.temperature:g}"
        return Verdict(layer=layer, status="FAIL", summary=summary, n_tokens=self.n, findings=(found,), figures=figures)


def judge(
    logged: Sequence[Sampled], policy: Policy, renderer: Renderer, recipe: Recipe, say: Callable[[str], None] = lambda text: None
) -> list[Verdict]:
    """All five layers' verdicts; a later one is NOT_RUN once one has failed.

    ``say``: told where it takes longer.
    """
    engine = LoggedEngine(recipe.engine.dtype or recipe.model.dtype, recipe.engine.head_dtype or "")
    nothing = cast(Any, None)  # a log takes no weights, and its prompts are its own
    pair = Pair(engine, policy, nothing, renderer, nothing, recipe, say=say)
    _refuse_other_vocabulary(policy, logged)
    parts = [Part(pair, sample) for sample in logged]
    layers: dict[LayerName, Callable[[], Verdict]] = {
        "semantics": lambda: _worst([part.semantics() for part in parts]),
        "path": lambda: _worst([part.path() for part in parts]),
        "numerics": lambda: _numerics(parts),
    }
    verdicts: list[Verdict] = []
    for layer in LAYERS:
        failed = next((verdict.layer for verdict in verdicts if verdict.status == "FAIL"), None)
        if failed is not None:
            verdicts.append(_not_run(layer, f"layer {failed} did not pass"))
        else:
            verdicts.append(layers[layer]() if layer in layers else _not_run(layer, REASON))
    return verdicts


def _refuse_other_vocabulary(policy: Policy, logged: Sequence[Sampled]) -> None:
    vocabulary = policy.head.shape[0]
    for sample in logged:
        for number, ids in enumerate(sample.sequences, 1):
            if not 0 <= ids.min() <= ids.max() < vocabulary:
                got = f"token {ids.max()} in completion {number}"
                hint = "is --model the one that drew them?"
                raise UsageError("check --rollouts", got=got, expected=f"ids below the model's {vocabulary}", hint=hint)


def _numerics(parts: Sequence[Part]) -> Verdict:
    """The verdict of layer 4 over all parts."""
    pair, gaps = parts[0].pair, [part.gap for part in parts]
    starts = np.cumsum([0, *(len(part.sample.completions) for part in parts)])
    owners = np.concatenate([part.sample.owners + start for part, start in zip(parts, starts, strict=False)])
    widest = parts[int(np.argmax([np.median(np.abs(gap)) for gap in gaps]))]
    return judge_gap(np.concatenate(gaps), owners, pair.noise, pair.recipe.objective, widest.explanation, {})


def _few(sample: Sampled) -> Sampled:
    """The first rows of the log, each cut to its first tokens. Neighbours, for a log may have mixed them up."""
    cut = [
        replace(c, token_ids=c.token_ids[: 4 * FEW_TOKENS], logprobs=c.logprobs[: 4 * FEW_TOKENS])
        for c in sample.completions[:FEW_ROWS]
    ]
    return Sampled(sample.prompts[:FEW_ROWS], cut, sample.sampling)


def _not_run(layer: LayerName, reason: str) -> Verdict:
    return Verdict(layer=layer, status="NOT_RUN", summary="not judged", reason=reason)


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The first that failed, or what all say, over all tokens."""
    failed = next((verdict for verdict in verdicts if verdict.status == "FAIL"), None)
    return replace(verdicts[0], n_tokens=sum(v.n_tokens for v in verdicts)) if failed is None else failed
