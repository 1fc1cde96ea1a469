"""Scores of rollouts under the weights that drew each token, where these are not the weights of now.

span of version 5 ─ whole context, weights 5 ────────────────────► score      wait, recompute
spans of 5 and 6  ─ weights 5, then 6 over the cache of 5 ───────► scores     keep
span of version 7, which is now ─ the step's own forward pass ──► (NaN here)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from lockstep.policy.model import Policy
from lockstep.policy.parameters import Snapshot
from lockstep.policy.replay import over_kept_caches
from lockstep.records.samples import Group, Sample, Samples
from lockstep.records.versions import VersionSpan
from lockstep.weights.ring import Ring


@dataclass(frozen=True, eq=False)
class Before:
    """What is known of a step's tokens before it is trained on."""

    logprobs: np.ndarray
    """float32 [ΣT], nats: the trainer's under the weights that drew each token. NaN: those of now drew it."""
    audited: np.ndarray
    """bool [ΣT]: False where nothing was scored, and the engine's number stands in its place."""

    @property
    def scored(self) -> np.ndarray:
        """float32 [ΣT], nats: the trainer's numbers alone; NaN where there is none yet, or will be none."""
        return np.where(self.audited, self.logprobs, np.float32("nan"))


@dataclass(frozen=True)
class Drawing:
    """How the rollouts of a run are drawn across updates, and how many of them are scored."""

    kept: bool
    """An update leaves the caches of what is being drawn."""
    share: float
    """The share of samples with tokens of earlier versions that is scored; the others are not audited."""
    seed: tuple[int, ...]
    """Draws which, with the step's number."""


class Versions:
    """The weights of the last versions, and what they say of the tokens that they drew.

    Args:
        policy: gives the one that holds the weights of now.
    """

    def __init__(self, policy: Callable[[], Policy], ring: Ring) -> None:
        self._policy = policy
        self.ring = ring

    def remember(self, version: int) -> None:
        """The weights as they are now are ``version``; they are kept."""
        if self.ring.depth:
            self.ring.remember(version, Snapshot.of(self._policy().model))

    def before(self, rollouts: Samples, version: int, drawing: Drawing) -> Before:
        """Scores of what versions before ``version``, which the policy holds, drew: :func:`before_of`."""
        return before_of(rollouts, self._policy(), self.ring, version, drawing)

    def piecewise(
        self, sequences: Sequence[Sample], version: int, temperature: float, *, kept: bool
    ) -> list[np.ndarray]:
        """Each span of completions under its version, float32 [T] each, nats: :func:`piecewise`."""
        return piecewise(self._policy(), self.ring, sequences, version, temperature, kept=kept)


def before_of(rollouts: Samples, policy: Policy, ring: Ring, version: int, drawing: Drawing) -> Before:
    """Score what earlier versions drew, and no stored score says.

    Args:
        version: of the weights that the policy holds.

    Raises:
        KeyError: for a version that the ring does not hold.
    """
    # Seeded by the step: a resume audits the same samples, and its replayed figures are comparable.
    chosen = np.random.default_rng([*drawing.seed, version]).random(len(rollouts)) < drawing.share
    scores = [_stored(sample, version, drawing) for sample in rollouts]
    audited = [np.ones(len(known), bool) for known in scores]
    lacking = {
        row: spans
        for row, (sample, known) in enumerate(zip(rollouts, scores, strict=True))
        if (spans := _lacking(sample, known, version, drawing))
    }
    there = {version, *ring.versions}
    for row, spans in lacking.items():
        # After an interruption the weights of some may be gone: these cannot be among those that are audited.
        gone = drawing.share < 1.0 and not {span.version for span in spans} <= there
        if gone or not chosen[row]:
            scores[row][:] = rollouts[row].engine_logprobs
            audited[row][:] = False
    scored = {row: spans for row, spans in lacking.items() if audited[row].all()}
    for row, numbers in _scored(rollouts, scored, policy, ring, version, drawing).items():
        np.copyto(scores[row], numbers, where=~np.isnan(numbers))
    return Before(np.concatenate(scores), np.concatenate(audited))


def _stored(sample: Sample, version: int, drawing: Drawing) -> np.ndarray:
    """The scores on disk; NaN for what the step's own forward pass gives."""
    if sample.sampling_logprobs is None:
        return np.full(len(sample.token_ids), np.nan, np.float32)
    known = sample.sampling_logprobs.copy()
    for span in sample.version_spans:
        # A step that is trained again is judged by the weights of now, never by the numbers it stored.
        if _own_pass_gives(sample, span, version, drawing):
            known[span.start : span.stop] = np.nan
    return known


def _own_pass_gives(sample: Sample, span: VersionSpan, version: int, drawing: Drawing) -> bool:
    # Drawn over an older cache, tokens of now lack it as well: the step's pass has none such.
    over_old_cache = drawing.kept and len(sample.version_spans) > 1
    return span.version == version and not over_old_cache


def _lacking(sample: Sample, known: np.ndarray, version: int, drawing: Drawing) -> tuple[VersionSpan, ...]:
    """The spans of which a score is missing that the step's own forward pass does not give."""
    lacking = tuple(
        span
        for span in sample.version_spans
        if np.isnan(known[span.start : span.stop]).any()
        and not _own_pass_gives(sample, span, version, drawing)
    )
    # Over a cache that was kept no span is scored without those before it.
    return sample.version_spans if lacking and drawing.kept else lacking


def _scored(
    rollouts: Samples,
    lacking: Mapping[int, Sequence[VersionSpan]],
    policy: Policy,
    ring: Ring,
    version: int,
    drawing: Drawing,
) -> dict[int, np.ndarray]:
    """Scores of the spans that lack them, by row, float32 [T] each; NaN elsewhere."""
    # A cache that was kept holds what the old weights wrote: no single pass under either version scores what
    # followed.
    spanning = [row for row in lacking if drawing.kept and len(rollouts[row].version_spans) > 1]
    plain = {row: spans for row, spans in lacking.items() if row not in spanning}
    scores = {row: np.full(len(rollouts[row].token_ids), np.nan, np.float32) for row in plain}
    for earlier in sorted({span.version for spans in plain.values() for span in spans}):
        here = [row for row, spans in plain.items() if any(span.version == earlier for span in spans)]
        with ring.of(earlier).standing_in(policy.model):
            # Completions of a prompt share one pass over it.
            whole = policy.score(rollouts.take(here).groups, rollouts.temperature)
        for row, numbers in zip(here, whole, strict=True):
            _take(rollouts[row], earlier, numbers, scores[row])
    replayed = piecewise(policy, ring, rollouts.take(spanning), version, rollouts.temperature, kept=True)
    return scores | dict(zip(spanning, replayed, strict=True))


def piecewise(
    policy: Policy,
    ring: Ring,
    sequences: Sequence[Sample],
    version: int,
    temperature: float,
    *,
    kept: bool,
) -> list[np.ndarray]:
    """Each span of whole completions under the version that drew it, float32 [T] each, nats.

    Args:
        version: of the weights that the policy holds.
        kept: over the cache that the spans before it left; else over one of the span's own weights.

    Raises:
        KeyError: for a version that the ring does not hold.
    """
    versions = {span.version for sequence in sequences for span in sequence.version_spans}
    weights = {v: None if v == version else ring.of(v) for v in versions}
    if kept:
        return over_kept_caches(policy, sequences, weights, temperature)
    scores = [np.full(len(sequence.token_ids), np.nan, np.float32) for sequence in sequences]
    groups = [Group(sequence.prompt_ids, [sequence.token_ids]) for sequence in sequences]
    for v, earlier in weights.items():
        with earlier.standing_in(policy.model) if earlier is not None else nullcontext():
            whole = policy.score(groups, temperature)
        for sequence, numbers, out in zip(sequences, whole, scores, strict=True):
            _take(sequence, v, numbers, out)
    return scores


def _take(sample: Sample, version: int, whole: np.ndarray, out: np.ndarray) -> None:
    """Copy into ``out`` those scores of the whole completion whose tokens ``version`` drew."""
    for span in sample.version_spans:
        if span.version == version:
            out[span.start : span.stop] = whole[span.start : span.stop]
