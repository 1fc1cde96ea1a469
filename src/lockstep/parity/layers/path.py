"""Layer 2: does the way through the engine change a log-probability?

The engine is compared with itself, so the trainer has no part in it. For tokens drawn at T = 1:

* A against B: what sampling reported against the same engine's re-score of the same ids, from prefill and
  past any cache; and at the recipe's own temperature where the engine can re-score at one;
* B against B′: re-scored all together, and again alone and in reverse order (batch composition);
* cold against warm: the same prompts and seeds drawn twice; the second time the prefix cache serves the
  prompts.

Absurd tokens in a minority of completions are corruption and are shown. What needs another start of the
engine (chunked prefill, async scheduling, a starved cache) is measured at full depth, in ``factors.py``.
"""

from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from lockstep.metrics.reduce import quantiles_abs
from lockstep.parity.causes import finding
from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.path.corruption import corrupted
from lockstep.parity.pair import Pair, draw
from lockstep.records.samples import Samples
from lockstep.records.verdicts import Finding, Verdict

ALONE = 4
"""Sequences that are re-scored alone."""
WARM_TOKENS = 8
"""Drawn of each prompt: each of them reads the prompt's blocks, and these are what is warm."""
ENOUGH_FOR_A_FLOOR = 96
"""Tokens: over fewer, as at depth quick, the floor was 0.0 where a standard check's was .12 nats (bf16)."""


class Compared(NamedTuple):
    """Tokens as the engine says them in two ways."""

    gap: np.ndarray
    """The one way − the other, float32 [T], nats."""
    owners: np.ndarray
    """The completion of each, int [T]."""


def judge(pair: Pair, evidence: Evidence) -> Verdict:
    """The verdict of layer 2."""
    neutral = evidence.neutral
    rescored = evidence.rescored
    comparisons = {
        # The floor first: what fails it is no yardstick.
        "batch_composition": _alone(pair, neutral, rescored),
        "decode_vs_prefill": _decode(pair, evidence),
        "prefix_cache": _warm(pair, neutral),
    }
    figures = {}
    findings = _corruption(pair, evidence)
    for cause, (gap, owners) in comparisons.items():
        quantiles = quantiles_abs(gap)
        figures |= {f"{cause}_abs_{name}_nats": value for name, value in quantiles.items()} | {
            f"{cause}_n_tokens": gap.size
        }
        # Decode parts from prefill wherever completions are corrupted or the floor fails: it is named only
        # where neither was.
        if not within(pair.engine_noise, gap) and not (findings and cause == "decode_vs_prefill"):
            findings.append(_finding(pair, cause, gap, owners))
    n = sum(gap.size for gap, _ in comparisons.values())
    figures["minimal_detectable_effect_nats"] = pair.engine_noise.p50
    if findings:
        summary = (
            f"the engine disagrees with itself: {findings[0].cause.replace('_', ' ')}, "
            f"{findings[0].effect_nats:.1e} nats"
        )
        return Verdict(
            layer="path",
            status="FAIL",
            summary=summary,
            n_tokens=n,
            findings=tuple(findings),
            figures=figures,
        )
    largest = max(float(np.abs(gap).max()) for gap, _ in comparisons.values())
    how = (
        "at T=1 and at the recipe's own"
        if neutral is not evidence.own and _rescores_own(pair, evidence)
        else "at T=1"
    )
    floor = comparisons["batch_composition"].gap.size
    few = f"; the floor is of {floor} tokens in a batch of {len(neutral.prompts)}, a larger one may show more"
    summary = (
        "decode, prefill, batch of one or many, cold or warm prefix cache "
        f"agree to {largest:.1e} nats ({how})"
        f"{few if floor < ENOUGH_FOR_A_FLOOR else ''}"
    )
    return Verdict(layer="path", status="PASS", summary=summary, n_tokens=n, figures=figures)


def _rescores_own(pair: Pair, evidence: Evidence) -> bool:
    own = evidence.own.sampling
    return (
        pair.engine.ready.capabilities["rescore_at_temperature"].supported
        and own.temperature != 1.0
        and not own.truncates
        and not own.penalises
    )


def _decode(pair: Pair, evidence: Evidence) -> Compared:
    """A − B, at T = 1, and at the recipe's temperature where the engine can."""
    neutral = evidence.neutral
    own = evidence.own
    gap = neutral.engine_logprobs - evidence.rescored
    owners = neutral.owners
    if _rescores_own(pair, evidence):
        again = own.rescored(pair.engine, own.sampling.temperature)
        gap = np.r_[gap, own.engine_logprobs - again]
        # Counted on: row 0 of one sample and row 0 of the other are two completions.
        owners = np.r_[owners, own.owners + owners.max() + 1]
    return Compared(gap, owners)


def _corruption(pair: Pair, evidence: Evidence) -> list[Finding]:
    known = [(evidence.neutral, evidence.rescored)]
    # Else the trainer is no witness against the engine.
    if within(pair.noise, evidence.rescored - evidence.trainer):
        known.append((evidence.own, evidence.own_trainer))
    for sample, other in known:
        corruption = corrupted(pair, sample, other)
        if corruption is not None:
            size = np.abs(sample.engine_logprobs - other)
            return [
                finding(
                    "corrupted_completions",
                    size,
                    sample.owners,
                    corruption.evidence(),
                    pair.engine.fix("corrupted_completions"),
                )
            ]
    return []


def _alone(pair: Pair, neutral: Samples, rescored: np.ndarray) -> Compared:
    """B′ − B for the first few sequences, each scored by itself, last first."""
    gaps, owners = [], []
    for i in reversed(range(min(ALONE, len(neutral.prompts)))):
        (alone,) = pair.engine.score([neutral.sequences[i]])
        # The first token of a sequence has no score, so the completion's begin one place before its own.
        gaps.append(alone[len(neutral.prompts[i]) - 1 :] - rescored[neutral.owners == i])
        owners.append(np.full(len(gaps[-1]), i))
    return Compared(np.concatenate(gaps), np.concatenate(owners))


def _warm(pair: Pair, neutral: Samples) -> Compared:
    """Drawn again over a warm prefix cache, against its own re-score, which reads no cache."""
    warm = draw(pair, neutral.prompts, replace(neutral.sampling, max_tokens=WARM_TOKENS), pair.seed)
    return Compared(warm.engine_logprobs - warm.rescored(pair.engine), warm.owners)


def _finding(pair: Pair, cause: str, gap: np.ndarray, owners: np.ndarray) -> Finding:
    size = np.abs(gap)
    text = (
        f"{int((~np.isfinite(gap)).sum())} non-finite of {gap.size}; largest {size.max():.2e} nats; "
        f"arithmetic allows {pair.engine_noise.p999:g}"
        f"{pair.search.told() if cause == 'decode_vs_prefill' else ''}"
    )
    return finding(cause, size, owners, text, pair.engine.fix(cause))
