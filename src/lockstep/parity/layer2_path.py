"""Layer 2: does the way through the engine change a log-probability?

The engine is compared with itself, so the trainer has no part in it. For tokens drawn at T = 1:

* A against B: what sampling reported against the same engine's re-score of the same ids, from prefill and past any cache;
* B against B′: re-scored all together, and again alone and in reverse order (batch composition);
* cold against warm: the same prompts and seeds drawn twice; the second time the prefix cache serves the prompts.
"""

import numpy as np
from msgspec.structs import replace

from lockstep.metrics.reduce import bootstrap_mean_ci95, quantiles_abs
from lockstep.parity.pair import Pair, Sampled, draw
from lockstep.records.verdicts import Finding, Verdict

ALONE = 4
"""Sequences that are re-scored alone."""
WARM_TOKENS = 8


def judge(pair: Pair, neutral: Sampled, rescored: np.ndarray, seed: int) -> Verdict:
    """The verdict of layer 2.

    Args:
        neutral: drawn at T = 1, not truncated, not penalised.
        rescored: score B of its tokens.
        seed: what ``neutral`` was drawn with.
    """
    comparisons = {
        "decode_vs_prefill": (neutral.engine_logprobs - rescored, neutral.owners),
        "batch_composition": _alone(pair, neutral, rescored),
        "prefix_cache": _warm(pair, neutral, seed),
    }
    figures, findings = {}, []
    for cause, (gap, owners) in comparisons.items():
        quantiles = quantiles_abs(gap)
        figures |= {f"{cause}_abs_{name}_nats": value for name, value in quantiles.items()} | {f"{cause}_n_tokens": gap.size}
        if not (quantiles["p50"] <= pair.noise.p50 and quantiles["p999"] <= pair.noise.p999):
            findings.append(_finding(pair, cause, gap, owners))
    n = sum(gap.size for gap, _ in comparisons.values())
    if findings:
        worst = max(findings, key=lambda finding: finding.effect_nats)
        summary = f"the engine disagrees with itself: {worst.cause.replace('_', ' ')}, {worst.effect_nats:.1e} nats"
        return Verdict(layer="path", status="FAIL", summary=summary, n_tokens=n, findings=tuple(findings), figures=figures)
    largest = max(float(np.abs(gap).max()) for gap, _ in comparisons.values())
    summary = f"decode, prefill, batch of one or many, cold or warm prefix cache agree to {largest:.1e} nats"
    return Verdict(layer="path", status="PASS", summary=summary, n_tokens=n, figures=figures)


def _alone(pair: Pair, neutral: Sampled, rescored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B′ − B for the first few sequences, each scored by itself, last first."""
    gaps, owners = [], []
    for i in reversed(range(min(ALONE, len(neutral.prompts)))):
        (alone,) = pair.engine.score([neutral.sequences[i]])
        gaps.append(alone[len(neutral.prompts[i]) - 1 :] - rescored[neutral.owners == i])
        owners.append(np.full(len(gaps[-1]), i))
    return np.concatenate(gaps), np.concatenate(owners)


def _warm(pair: Pair, neutral: Sampled, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawn again over a warm prefix cache, against its own re-score, which reads no cache."""
    warm = draw(pair, neutral.prompts, replace(neutral.sampling, max_tokens=WARM_TOKENS), seed)
    return warm.engine_logprobs - warm.rescored(pair.engine), warm.owners


def _finding(pair: Pair, cause: str, gap: np.ndarray, owners: np.ndarray) -> Finding:
    size = np.abs(gap)
    return Finding(
        cause=cause,
        effect_nats=float(size.mean()),
        ci95=bootstrap_mean_ci95(size, owners),
        n_tokens=gap.size,
        fix=pair.engine.fix(cause),
        evidence=f"{int((~np.isfinite(gap)).sum())} non-finite of {gap.size}; largest {size.max():.2e} nats; "
        f"arithmetic allows {pair.noise.p999:g}",
    )
