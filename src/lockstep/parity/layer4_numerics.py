"""Layer 4: what gap is left, against each side's own noise and against the objective's clip range.

The gap is judged by its tail (a median and a p999) and by the phantom clip fraction, never by a mean. The floors say how far
each side differs from *itself* under another batch shape: B against B′ from layer 2, C against C′ here.
"""

from typing import Any

import numpy as np

from lockstep.config.recipe import Objective
from lockstep.metrics.reduce import bootstrap_mean_ci95, mismatch_figures, outside_clip, quantiles_abs
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.tolerances import PHANTOM_CLIP_FRACTION, Tolerance
from lockstep.records.verdicts import Finding, Verdict


def judge(pair: Pair, sample: Sampled, path: Verdict) -> Verdict:
    """The verdict of layer 4.

    Args:
        sample: drawn with the recipe's own sampling.
        path: layer 2's verdict, for the engine's floor.
    """
    temperature, objective = sample.sampling.temperature, pair.recipe.objective
    trainer = np.concatenate(pair.policy.score(sample.groups, temperature))
    gap = trainer - sample.engine_logprobs
    floor_trainer = trainer_floor(pair, sample, trainer)
    floor_engine = path.figures["batch_composition_abs_p999_nats"]
    floor = max(floor_trainer, floor_engine, np.finfo(np.float32).eps)
    figures: dict[str, Any] = {"floor_trainer_abs_p999_nats": floor_trainer, "floor_engine_abs_p999_nats": floor_engine}
    figures["gap_p999_in_floors"] = quantiles_abs(gap)["p999"] / floor
    cause = precision_cause(pair)
    return judge_gap(gap, sample.owners, pair.noise, objective, (cause, pair.engine.fix(cause)), figures)


def judge_gap(
    gap: np.ndarray, owners: np.ndarray, noise: Tolerance, clip: Objective, cause: tuple[str, str], figures: dict[str, Any]
) -> Verdict:
    """Judge a gap by its tail and by the phantom clips that it makes.

    Args:
        gap: float [T], nats, of tokens that both sides scored under one version.
        owners: int [T], the completion of each.
        cause: the name of what would explain a gap that is too large, and its mend.
        figures: goes into the verdict besides.
    """
    quantiles = quantiles_abs(gap)
    phantom = outside_clip(gap, clip.clip_low, clip.clip_high)
    figures = figures | mismatch_figures(gap, clip.clip_low, clip.clip_high) | {"n_tokens": gap.size}
    figures |= {f"gap_abs_{name}_nats": value for name, value in quantiles.items()}
    evidence = []
    if not (quantiles["p50"] <= noise.p50 and quantiles["p999"] <= noise.p999):
        evidence.append(
            f"|gap| p50 {quantiles['p50']:.1e}, p99.9 {quantiles['p999']:.1e} nats; "
            f"arithmetic allows {noise.p50:g}, {noise.p999:g}"
        )
    if not phantom.mean() <= PHANTOM_CLIP_FRACTION:
        evidence.append(
            f"the objective would clip {phantom.mean():.2%} of the tokens for the mismatch alone; "
            f"the limit is {PHANTOM_CLIP_FRACTION:.0%}"
        )
    if evidence:
        size = np.abs(gap)
        found = Finding(
            cause=cause[0],
            effect_nats=float(size.mean()),
            ci95=bootstrap_mean_ci95(size, owners),
            n_tokens=gap.size,
            fix=cause[1],
            evidence="; ".join(evidence),
        )
        summary = f"the gap exceeds what the arithmetic explains ({cause[0].replace('_', ' ')})"
        return Verdict(layer="numerics", status="FAIL", summary=summary, n_tokens=gap.size, findings=(found,), figures=figures)
    summary = (
        f"|gap| p50 {quantiles['p50']:.1e}, p99.9 {quantiles['p999']:.1e}, max {quantiles['max']:.1e} nats "
        f"over {gap.size} tokens; phantom clips {phantom.mean():.2%}"
    )
    return Verdict(layer="numerics", status="PASS", summary=summary, n_tokens=gap.size, figures=figures)


def trainer_floor(pair: Pair, sample: Sampled, trainer: np.ndarray) -> float:
    """p999 of |C − C′|: the same tokens scored again, half the sequences at a time and in rows of their own, nats."""
    half = sample.groups[::2]
    again = np.concatenate([s for group in half for s in pair.policy.score([group], sample.sampling.temperature)])
    return quantiles_abs(again - trainer[sample.owners % 2 == 0])["p999"]


def precision_cause(pair: Pair) -> str:
    """The configured difference in precision that could explain a gap; none is ``unexplained_numerics``."""
    if pair.engine_dtype != str(pair.policy.model.dtype):
        return "body_precision"
    if pair.engine.ready.resolved.get("worker.head_dtype") != str(pair.policy.head_dtype):
        return "head_precision"
    return "unexplained_numerics"
