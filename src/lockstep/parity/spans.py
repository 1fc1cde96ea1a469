"""One sequence across an update in flight, replayed piece by piece: did the versions that it names draw it?

    what the engine says:  [0, 9) version 4 │ [9, 14) version 5, over the cache that version 4 left
    replay of just that fits ─► PASS.  Else, what fits in its place is named:
        cache rule   the same spans, over a cache of each span's own weights (or over the kept one)
        span         a boundary moved by a token or two
        version      two versions exchanged, or one in place of another

Where an update moved the sequence by less than the two sides' arithmetic, any of these fits: that is told, as
``told_apart`` 0.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from msgspec.structs import replace

from lockstep.parity.causes import finding
from lockstep.parity.evidence import within
from lockstep.parity.pair import Pair
from lockstep.records.samples import Sample
from lockstep.records.verdicts import Verdict
from lockstep.records.versions import VersionSpan
from lockstep.training.versions import Versions

MOVES = (-1, 1, -2, 2)
"""Tokens by which a boundary is tried to be off."""
Spans = tuple[VersionSpan, ...]


@dataclass(frozen=True)
class Claim:
    """Which weights drew which tokens, over which cache."""

    what: str
    """What it says is wrong, for people; of the engine's own claim: nothing."""
    spans: Spans
    kept: bool


@dataclass(frozen=True)
class Replay:
    """What sequences are replayed with."""

    pair: Pair
    versions: Versions
    """The weights of earlier versions."""
    version: int
    """The version that the trainer holds."""
    temperature: float

    @classmethod
    def of(cls, pair: Pair, version: int) -> "Replay":
        """A run's: the versions that its trainer keeps."""
        return cls(pair, pair.trainer.versions, version, pair.recipe.sampling.temperature)

    def knows(self, spans: Spans) -> bool:
        """True where there are weights of every version that is named."""
        return {span.version for span in spans} <= {self.version, *self.versions.ring.versions}

    def gap(self, sample: Sample, claim: Claim) -> np.ndarray:
        """|trainer − engine|, nats, of what the engine gave a number, under a claim: :func:`gap_of`."""
        sequence = dataclasses.replace(sample, version_spans=claim.spans)
        # Over a kept cache versions go up: a claim of versions that go down was drawn over none.
        rising = all(a.version <= b.version for a, b in pairwise(claim.spans))
        (numbers,) = self.versions.piecewise(
            [sequence], self.version, self.temperature, kept=claim.kept and rising
        )
        return gap_of(sample, numbers)

    def in_place_of(self, sample: Sample, claim: Claim) -> str:
        """What fits where the claim does not; says so where nothing does."""
        named = [span.version for span in sample.version_spans]
        known = [v for v in self.versions.ring.versions if v >= min(named) - 2]
        tried = alternatives(claim, [*known, self.version])
        fits = (
            other
            for other in tried
            if self.knows(other.spans) and within(self.pair.noise, self.gap(sample, other))
        )
        return next((other.what for other in fits), "no cache rule, span or version nearby fits")


def gap_of(sample: Sample, scores: np.ndarray) -> np.ndarray:
    """|trainer − engine|, nats; float [tokens that the engine gave a number]."""
    return np.abs(scores - sample.engine_logprobs)[sample.known]


def judge(
    replay: Replay, sample: Sample, *, kept: bool, power: bool = True, scores: np.ndarray | None = None
) -> Verdict:
    """Replay one spanning sequence as the engine and the run's update rule say, or name what fits instead.

    Args:
        kept: the rule of the run (``rollout.update = "keep"``).
        power: replay it over the other cache too: would that have shown?
        scores: the trainer's under just that claim, float32 [T], nats; None: a pass of its own finds them.
    """
    pair = replay.pair
    claimed = Claim("", sample.version_spans, kept)
    gap = replay.gap(sample, claimed) if scores is None else gap_of(sample, scores)
    shape = " then ".join(f"{span.version} for {span.stop - span.start}" for span in sample.version_spans)
    where = f"question {sample.item}, sample {sample.sample}, drawn by version {shape} tokens"
    figures = {"replay_gap_abs_max_nats": float(gap.max())}
    if power:
        other = replay.gap(sample, replace_rule(claimed))
        figures["replay_other_cache_abs_max_nats"] = float(other.max())
        figures["told_apart"] = float(not within(pair.noise, other))
    rule = "the cache kept" if kept else "the cache computed anew"
    if within(pair.noise, gap):
        summary = f"{where}, {rule}: replayed to {gap.max():.1e} nats"
        return Verdict(layer="weights", status="PASS", summary=summary, n_tokens=gap.size, figures=figures)
    what = replay.in_place_of(sample, claimed)
    evidence = f"{where}, {rule}: |gap| up to {gap.max():.1e} nats; {what}"
    named = finding(
        "in_flight_update", gap, np.zeros(gap.size, int), evidence, pair.engine.fix("in_flight_update")
    )
    return Verdict.failed("weights", evidence, named, figures)


def replace_rule(claim: Claim) -> Claim:
    """The same spans over the other cache."""
    rule = "computed anew" if claim.kept else "kept"
    return Claim(f"cache rule: it fits with the cache {rule}", claim.spans, not claim.kept)


def alternatives(claim: Claim, versions: list[int]) -> Iterator[Claim]:
    """What may be so instead, the likeliest first.

    Args:
        versions: those that can be replayed.
    """
    yield replace_rule(claim)
    for at, (left, right) in enumerate(pairwise(claim.spans)):
        for move in MOVES:
            edge = left.stop + move
            if left.start < edge < right.stop:
                moved = (replace(left, stop=edge), replace(right, start=edge))
                what = f"span: it fits with version {right.version} from token {edge} on, not {left.stop}"
                yield Claim(what, (*claim.spans[:at], *moved, *claim.spans[at + 2 :]), claim.kept)
    named = [span.version for span in claim.spans]
    others = ([*named[:at], v, *named[at + 1 :]] for v in versions for at in range(len(named)))
    for order in (named[::-1], *others):
        if order != named:
            spans = tuple(replace(span, version=v) for span, v in zip(claim.spans, order, strict=True))
            fits, said = (", ".join(map(str, these)) for these in (order, named))
            what = f"version: it fits with versions {fits}, not {said}"
            yield Claim(what, spans, claim.kept)
