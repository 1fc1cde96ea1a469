"""Layer 4: would the trainer agree with the engine if it computed as the engine may? Each hypothesis is tried
on the trainer.

A precision has the gap's size (``precision.py``). The engine's own model configuration, another setting of
the model (``fitted_settings.py``) or a scaled tensor must make the gap vanish: fitted on a few dozen tokens,
proven on more.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lockstep.errors import ModelError
from lockstep.parity.canary import Canary
from lockstep.parity.explain.fitting import fitted
from lockstep.parity.explain.numerics.precision import precision
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.explain.weights import attribution
from lockstep.parity.explain.weights.fitted_settings import FittedSetting, settings_of
from lockstep.parity.explain.weights.model_settings import Departure, departures
from lockstep.parity.pair import Pair
from lockstep.parity.search import Looks, keep_looking
from lockstep.parity.search_tolerances import EXPLAINS, SETTING_SCREEN_SLACK
from lockstep.policy.variant_settings import CACHE_FORMS, CacheKept, SlidingWindow
from lockstep.policy.variants import Configured, Variant
from lockstep.records.samples import Samples

WINDOWS = tuple(2**n for n in range(3, 13))
SETTING_ROWS = 4
"""Settings are tried on so many rows of the sample at least. It takes dozens of passes, and a setting that is
right leaves nothing in any row."""
SCREENED_CONTEXT = 112
"""Tokens, prompts and all, on which a setting is fitted before it is proven."""
SCALED_TOKENS = 64
"""A scaled tensor is looked for on so many tokens of the sample."""


def explain(pair: Pair, sample: Samples, gap: np.ndarray, *, precision_last: bool = False) -> Explanation:
    """The first hypothesis that explains a gap of the recipe's own sample.

    Args:
        gap: trainer − engine, float32 [T].
        precision_last: where nothing is known of the engine's precision: one that merely has the gap's size
            comes after what makes it vanish.
    """
    search = pair.search
    before = len(pair.search.tried)
    looks: list[Looks[Explanation]] = []
    if np.median(np.abs(gap)) > pair.noise.p50:  # else there is nothing for a setting to take away
        looks += [*_Settings(pair, sample).looks(), ("a scaled tensor", lambda: _scale(pair, sample))]
    looks.insert(
        len(looks) if precision_last else 0,
        ("a difference of precision", lambda: precision(pair, sample, gap)),
    )
    explanation = search.first(looks)
    if explanation is None:
        tried = ", ".join(search.tried[before:]) or "nothing"
        explanation = Explanation(
            "unexplained_numerics", f"tried, and not the explanation: {tried}{search.told()}"
        )
    if explanation.cause in ("unexplained_numerics", "tensor_scaled") and (engines := departures(pair)):
        return replace(
            explanation, evidence=f"{explanation.evidence}; suspected, not proven: {_named(engines)}"
        )
    return explanation


class _Settings:
    """Another configuration of the model, or of its attention, under which the trainer agrees with the
    engine."""

    def __init__(self, pair: Pair, sample: Samples) -> None:
        self.pair = pair
        self.few = sample[: max(SETTING_ROWS, len(sample) // 4)]
        self.least = screened(sample)

    @cached_property
    def now(self) -> tuple[float, float]:
        """What both miss by as the trainer is, nats: the screened rows, and the rows for the proof."""
        return self._miss(self.least), self._miss(self.few)

    @cached_property
    def _hidden(self) -> Tensor:
        return torch.cat(self.pair.trainer.hidden(self.least.groups))

    def looks(self) -> Iterator[Looks[Explanation]]:
        """Each with its name, the cheap and the likely ones first."""
        if departures(self.pair):
            yield "the engine's own configuration", self._departures
        for setting in settings_of(self.pair.trainer):
            yield (
                setting.told.partition("{")[0].strip().removeprefix("a "),
                lambda setting=setting: self._fitted(setting),
            )
        if self.pair.trainer.shares_prompts:
            yield "keys and values in a narrower dtype", self._cache
            yield "a sliding window", self._window

    def _miss(self, sample: Samples, variant: Variant | None = None) -> float:
        keep_looking()
        with self.pair.trainer.holding(variant) if variant is not None else nullcontext():
            return float(np.median(np.abs(sample.scored(self.pair.trainer) - sample.engine_logprobs)))

    def _enough(self, now: float) -> float:
        return min(self.pair.noise.p50, EXPLAINS * now)

    def _departures(self) -> Explanation | None:
        engines = departures(self.pair)
        try:
            left = self._miss(
                self.few, Configured({departure.path: departure.engine for departure in engines})
            )
        except ModelError:
            return None
        if not left <= self._enough(self.now[1]):
            return None
        return Explanation(
            "model_config_differs", f"{_named(engines)}; so configured the trainer agrees to {left:.1e} nats"
        )

    def _fitted(self, setting: FittedSetting) -> Explanation | None:
        def miss(value: float) -> float:
            tried = setting.variant(value)
            return self._of_head(tried) if setting.of_head else self._miss(self.least, tried)

        best = fitted(setting.grid, miss, self.now[0])
        if not best.miss <= SETTING_SCREEN_SLACK * self._enough(self.now[0]):
            return None
        left = self._miss(self.few, setting.variant(best.value))
        if not left <= self._enough(self.now[1]):
            return None
        changed = setting.told.format(best.value)
        return Explanation("model_config_differs", f"with {changed} the trainer agrees to {left:.1e} nats")

    def _of_head(self, variant: Variant) -> float:
        """What the screened rows miss by under another head alone: the body's pass is shared."""
        keep_looking()
        least = self.least
        trainer = self.pair.trainer
        ids = torch.from_numpy(
            np.concatenate([group.completions[0] for group in least.groups]).astype(np.int64)
        )
        with trainer.holding(variant):
            scored = trainer.project(self._hidden, ids.to(self._hidden.device), least.temperature).logprobs
        return float(np.median(np.abs(scored.numpy(force=True) - least.engine_logprobs)))

    def _cache(self) -> Explanation | None:
        # Held to a share of the gap and not to arithmetic: what is nearly on a border of so coarse a dtype is
        # rounded to the other side by the least difference.
        for name in CACHE_FORMS:
            if not self._miss(self.least, CacheKept(name)) <= SETTING_SCREEN_SLACK * EXPLAINS * self.now[0]:
                continue
            left = self._miss(self.few, CacheKept(name))
            now = self.now[1]
            if left <= EXPLAINS * now:
                text = (
                    f"over keys and values kept in {name} the trainer is {left:.1e} nats off, "
                    f"else {now:.1e} (medians)"
                )
                return Explanation("kv_cache_precision", text)
        return None

    def _window(self) -> Explanation | None:
        own = [d.engine for d in departures(self.pair) if d.path[-1] == "sliding_window" and d.engine]
        longest = max(len(ids) for ids in self.few.sequences)  # a wider window is none
        for window in [w for w in (*own, *WINDOWS) if w < longest]:
            left = self._miss(self.few, SlidingWindow(window))
            if left <= self._enough(self.now[1]):
                text = f"with a sliding window of {window} the trainer agrees to {left:.1e} nats"
                return Explanation("model_config_differs", text)
        return None


def screened(sample: Samples) -> Samples:
    """A few rows whose contexts come to few tokens, the longest that do: a setting is felt more over a longer
    one."""
    lengths = np.array([len(ids) for ids in sample.sequences])
    order = np.argsort(-lengths, kind="stable")
    rows = []
    for row in order.tolist():
        if lengths[row] <= SCREENED_CONTEXT / 2 and sum(lengths[rows]) + lengths[row] <= SCREENED_CONTEXT:
            rows.append(row)
    return sample.take(sorted(rows or [int(order[-1])]))


def _named(departures: Sequence[Departure]) -> str:
    return ", ".join(
        f"{d.path[-1]} is {d.engine} in the engine, {d.trainer} in the trainer" for d in departures
    )


def _scale(pair: Pair, sample: Samples) -> Explanation | None:
    """A tensor, or a natural set of them, that the engine holds times a constant."""
    if pair.engine.ready.capabilities["rescore"].supported:
        canary = Canary.of(sample, SCALED_TOKENS)
        engine = canary.engine_scores(pair)
    else:
        rows = 1 + int(np.searchsorted(np.bincount(sample.owners).cumsum(), SCALED_TOKENS))
        few = sample[:rows]
        canary = Canary(few.groups, few.temperature)
        engine = few.engine_logprobs
    enough = min(pair.noise.p50, EXPLAINS * float(np.abs(engine - canary.trainer_scores(pair)).mean()))
    named = attribution.scaled(pair, canary, engine, enough)
    if named is None:
        return None
    others = f"; {' or '.join(named.alike[:3])} would look the same" if named.alike else ""
    text = f"with {named.label} times {named.factor:.4g} the trainer agrees to {named.miss:.1e} nats{others}"
    return Explanation("tensor_scaled", text)
