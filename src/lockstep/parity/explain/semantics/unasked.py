"""Layer 1: settings that nobody asked for and that explain the numbers, of all rows or of those off."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.explain.fitting import miss_of
from lockstep.parity.explain.semantics.grammar import hidden_mask
from lockstep.parity.explain.semantics.held import Held, tokens_of_every_part
from lockstep.parity.explain.semantics.joint import hidden_cut
from lockstep.parity.explain.semantics.logit_bias import hidden_bias
from lockstep.parity.explain.semantics.penalties import Seen, hidden_penalty, seen_before
from lockstep.parity.explain.semantics.portions import places_of_rows, rows_off, temperatures_of_rows, where
from lockstep.parity.explain.semantics.sampler import Explained, setting_hypotheses
from lockstep.parity.pair import Pair
from lockstep.parity.search import Looks
from lockstep.parity.search_tolerances import EXPLAINS, LEAST_ROWS, LEAST_TOKENS
from lockstep.records.samples import Samples


def unasked(pair: Pair, sample: Samples, limit: float) -> Explained | None:
    """The first of them that does.

    ``limit``: a fit is an explanation when it misses by at most this, nats.
    """
    look = _Look(pair, sample, limit)
    return pair.search.first([*look.settings(), *look.portions()])


class _Look:
    """One sample, the passes over it that all hypotheses share, and the hypotheses."""

    def __init__(self, pair: Pair, sample: Samples, limit: float) -> None:
        self.pair = pair
        self.sample = sample
        self.limit = limit

    def settings(self) -> Iterator[Looks[Explained]]:
        """Settings of all of the sample, the cheap ones first."""
        pair = self.pair
        sample = self.sample
        limit = self.limit
        numbers = sample.engine_logprobs
        yield from setting_hypotheses(
            pair.trainer, sample.groups, numbers, sample.sampling, limit, lambda: self.held
        )
        yield "a penalty", lambda: hidden_penalty(sample, self.held, limit, self.seen)
        yield "a logit bias", lambda: hidden_bias(pair, sample, self.held)
        yield "a mask", lambda: hidden_mask(pair, sample, self.held, limit)
        yield (
            "a truncation behind a penalty",
            lambda: hidden_cut(self.held, self.seen, sample.temperature, limit),
        )

    def portions(self) -> Iterator[Looks[Explained]]:
        """Settings of some of its rows."""
        yield "the rows that are off by themselves", self._those_off
        yield "rows at temperatures of their own", self._temperatures

    @cached_property
    def hidden(self) -> list[Tensor]:
        return self.pair.trainer.hidden(self.sample.groups)

    @cached_property
    def held(self) -> Held:
        return tokens_of_every_part(
            self.pair.trainer, self.sample.groups, self.sample.engine_logprobs, hidden=self.hidden
        )

    @cached_property
    def seen(self) -> Seen:
        return seen_before(self.sample)

    @cached_property
    def gap(self) -> np.ndarray:
        """engine − trainer at the temperature that was asked for, float32 [T]."""
        hidden = torch.cat(self.hidden)
        ids = np.concatenate([group.completions[0] for group in self.sample.groups]).astype(np.int64)
        with torch.no_grad():
            scored = self.pair.trainer.project(
                hidden, torch.from_numpy(ids).to(hidden.device), self.sample.temperature
            ).logprobs
        return self.sample.engine_logprobs - scored.numpy(force=True)

    def _those_off(self) -> Explained | None:
        off = rows_off(self.sample, self.gap, self.pair.noise.p50)
        part = self.sample.take(off)
        if not LEAST_ROWS <= len(off) < len(self.sample) or part.engine_logprobs.size < LEAST_TOKENS:
            return None
        chosen = np.isin(self.sample.owners, off)
        look = _Look(self.pair, part, min(self.pair.noise.p50, EXPLAINS * miss_of(self.gap[chosen])))
        look.hidden = [self.hidden[row] for row in off]  # known already, so the model is not asked again
        explained = self.pair.search.first(
            (f"{name}, of the rows that are off", tried) for name, tried in look.settings()
        )
        return (
            None
            if explained is None
            else replace(explained, name=f"{explained.name}, in {where(self.sample, off)},")
        )

    def _temperatures(self) -> Explained | None:
        at = places_of_rows(self.sample)
        held = tokens_of_every_part(
            self.pair.trainer, self.sample.groups, self.sample.engine_logprobs, at, self.hidden
        )
        return temperatures_of_rows(self.sample, held, self.sample.owners[at], self.limit)
