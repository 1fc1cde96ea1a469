"""Layer 4: what gap is left, against each side's own noise and against the objective's clip range.

The gap is judged by its width, its tail and the phantom clip fraction, never by a mean. The floors come
first: C against C, the same rows twice, and C against C′, each sequence by itself; B against B′ is layer 2's.
Where a side computes in less than fp32, the width that the two sides' own rounding gives is measured
(``own_noise.py``), and the gap is to be no wider; the table of dtypes is the last bound. What has a direction
inside that width is ``directions.py``'s.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lockstep.config.recipe import Objective
from lockstep.metrics.reduce import mean_over_sequences, mismatch_figures, outside_clip, quantiles_abs
from lockstep.parity.causes import NamedCause, finding
from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.numerics.precision import reference
from lockstep.parity.explain.weights.trainer_hypotheses import explain
from lockstep.parity.own_noise import OwnNoise, Ratio
from lockstep.parity.pair import Pair
from lockstep.parity.tolerances import OWN_NOISE_RATIO, PHANTOM_CLIP_FRACTION, Tolerance
from lockstep.policy.variants import InDtype
from lockstep.records.samples import Samples
from lockstep.records.verdicts import Verdict

UNEXPLAINED = "unexplained_numerics"
PROBABILITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
POSITIONS = (0, 1, 4, 16, 64, 256)


def judge(pair: Pair, evidence: Evidence, path: Verdict) -> Verdict:
    """The verdict of layer 4.

    Args:
        path: layer 2's verdict, for the engine's floor.
    """
    sample = evidence.own
    trainer = evidence.own_trainer
    gap = trainer - sample.engine_logprobs
    again = evidence.floors.repeat
    alone = evidence.floors.alone
    # Not measured where the engine cannot re-score.
    floor_engine = path.figures.get("batch_composition_abs_p999_nats", 0.0)
    figures: dict[str, Any] = {
        "floor_trainer_repeat_abs_p999_nats": quantiles_abs(again)["p999"],
        "floor_trainer_abs_p999_nats": quantiles_abs(alone)["p999"],
        "floor_engine_abs_p999_nats": floor_engine,
        "by_probability": _binned(gap, np.exp(sample.engine_logprobs), PROBABILITIES),
        "by_position": _binned(gap, sample.positions, POSITIONS),
    }
    # Both floors may be 0: a side that repeats bit for bit. Then the gap is told in float32's own spacing.
    floor = max(figures["floor_trainer_abs_p999_nats"], floor_engine, float(np.finfo(np.float32).eps))
    figures["gap_p999_in_floors"] = quantiles_abs(gap)["p999"] / floor
    for cause, size, owners in (
        ("trainer_not_repeatable", again, sample.owners),
        ("trainer_batch_dependent", alone, sample.owners[evidence.floors.half]),
    ):
        if not within(pair.trainer_noise, size):
            text = f"the trainer differs from itself by up to {np.abs(size).max():.1e} nats"
            named = finding(cause, np.abs(size), owners, text)
            return Verdict.failed("numerics", text, named, figures)
    rescored = evidence.rescored if pair.engine.ready.capabilities["rescore"].supported else None
    figures["neutral_n_tokens"] = evidence.trainer.size
    if rescored is not None:
        figures |= _between("rescore_to_trainer", evidence.trainer - rescored)
    ratio = None
    if pair.coarse:
        ratio = _against_own_noise(pair, evidence, rescored, figures)
    figures["note"] = _note(pair)

    def cause_of() -> NamedCause:
        if ratio is not None and ratio.exceeded and within(pair.noise, gap):
            # directions.py looks for what is in the gap besides.
            known = f"what {pair.engine_dtype} and {pair.trainer.dtype} round away is in that width"
            return NamedCause(UNEXPLAINED, known, pair.engine.fix(UNEXPLAINED))
        explanation = explain(pair, sample, gap)
        return NamedCause(explanation.cause, explanation.evidence, pair.engine.fix(explanation.cause))

    return judge_gap(gap, sample.owners, pair.noise, pair.recipe.objective, cause_of, figures, ratio)


def judge_gap(
    gap: np.ndarray,
    owners: np.ndarray,
    noise: Tolerance,
    clip: Objective,
    cause_of: Callable[[], NamedCause],
    figures: dict[str, Any],
    ratio: Ratio | None = None,
) -> Verdict:
    """Judge a gap by its width, its tail and the phantom clips that it makes.

    Args:
        gap: float [T], nats, of tokens that both sides scored under one version.
        owners: int [T], the completion of each.
        cause_of: asked when the gap is too large.
        figures: goes into the verdict besides; its ``note`` goes into the summary.
        ratio: of the gap to both sides' own noise; None where that was not measured, and the table decides.
    """
    quantiles = quantiles_abs(gap)
    phantom = outside_clip(gap, clip.clip_low, clip.clip_high)
    figures = figures | mismatch_figures(gap, clip.clip_low, clip.clip_high) | {"n_tokens": gap.size}
    figures |= {f"gap_abs_{name}_nats": value for name, value in quantiles.items()}
    figures["gap_mean_nats"], figures["gap_mean_se_nats"] = mean_over_sequences(gap, owners)
    figures["minimal_detectable_effect_nats"] = noise.p50
    exceeded = []
    if ratio is not None and ratio.exceeded:
        exceeded.append(f"the gap is {ratio.told()}; at most {OWN_NOISE_RATIO:g} times is arithmetic's")
    if not (quantiles["p50"] <= noise.p50 and quantiles["p999"] <= noise.p999):
        exceeded.append(
            f"|gap| p50 {quantiles['p50']:.1e}, p99.9 {quantiles['p999']:.1e} nats; "
            f"arithmetic allows {noise.p50:g}, {noise.p999:g}"
        )
    if not phantom.mean() <= PHANTOM_CLIP_FRACTION:
        exceeded.append(
            f"the objective, clipping outside [{1 - clip.clip_low:g}, {1 + clip.clip_high:g}], "
            f"would clip {phantom.mean():.2%} of the tokens for the mismatch alone; "
            f"the limit is {PHANTOM_CLIP_FRACTION:.0%}"
        )
    if exceeded:
        cause, evidence, fix = cause_of()
        named = finding(cause, np.abs(gap), owners, "; ".join([*exceeded, evidence]), fix)
        summary = f"the gap exceeds what the arithmetic and the objective bear ({cause.replace('_', ' ')})"
        return Verdict.failed("numerics", summary, named, figures)
    summary = (
        f"|gap| p50 {quantiles['p50']:.1e}, p99.9 {quantiles['p999']:.1e}, max {quantiles['max']:.1e} nats "
        f"over {gap.size} tokens{'' if ratio is None else f', {ratio.told()}'}; "
        f"phantom clips {phantom.mean():.2%}{figures.get('note', '')}"
    )
    return Verdict(layer="numerics", status="PASS", summary=summary, n_tokens=gap.size, figures=figures)


def _between(scores: str, gap: np.ndarray) -> dict[str, float]:
    """How far two of the four scores are apart on ``neutral``, as the report's table of them reads it."""
    return {f"{scores}_abs_{name}_nats": value for name, value in quantiles_abs(gap).items()}


def _against_own_noise(
    pair: Pair, evidence: Evidence, rescored: np.ndarray | None, figures: dict[str, Any]
) -> Ratio:
    """The gap beside what both sides round away, on the tokens at T = 1; puts what it measures into
    ``figures``.

    Args:
        rescored: score B, float32 [T]; None of an engine that cannot be asked again.
    """
    sample = evidence.neutral
    trainer = evidence.trainer
    exact = reference(pair.trainer, sample)  # score D
    rounded = trainer - exact
    of_engine = [_in_the_engines_dtype(pair, sample, trainer) - exact]
    if rescored is not None:
        # Decode and prefill each round by themselves: their difference is √2 times as wide as either.
        of_engine.append((sample.engine_logprobs - rescored) / np.sqrt(2.0))
        figures |= _between("rescore_to_reference", exact - rescored)
    noise = OwnNoise.measured(exact, of_engine, rounded)
    ratio = noise.ratio(trainer - sample.engine_logprobs, exact, sample.owners)
    figures |= _between("trainer_to_reference", rounded)
    figures |= _between("engine_to_reference", exact - sample.engine_logprobs)
    figures |= {
        "own_noise": noise.figures(),
        "gap_in_own_noise": ratio.value,
        "gap_in_own_noise_low": ratio.low,
        "gap_in_own_noise_high": ratio.high,
    }
    return ratio


def _in_the_engines_dtype(pair: Pair, sample: Samples, trainer: np.ndarray) -> np.ndarray:
    """Scores of the trainer's model as the engine rounds, float32 [T]."""
    body = pair.engine_dtype or pair.trainer.dtype
    head = pair.engine_head_dtype or pair.trainer.head_dtype
    if (body, head) == (pair.trainer.dtype, pair.trainer.head_dtype):  # those are the scores at hand
        return trainer
    with pair.trainer.holding(InDtype(body, head)):
        return sample.scored(pair.trainer)


def _note(pair: Pair) -> str:
    """Said beside a PASS: precisions that differ and that the clip range bears."""
    body, head = pair.trainer.dtype, pair.trainer.head_dtype
    theirs = pair.engine_head_dtype
    if not pair.engine_dtype:
        return " (the engine does not tell its dtype)"
    if pair.engine_dtype != body:
        return f" (engine body {pair.engine_dtype}, trainer {body}: the clip range bears it)"
    return (
        f" (engine head {theirs}, trainer {head}: the clip range bears it)"
        if theirs not in ("", head)
        else ""
    )


def _binned(gap: np.ndarray, by: np.ndarray, edges: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """|gap| in each bin that holds tokens: count, p50 and max."""
    bins = {}
    for low, high in zip(edges, (*edges[1:], np.inf), strict=True):
        part = np.abs(gap[(by >= low) & (by < high)])
        if part.size:
            name = f"{low:g}-{high:g}"
            bins[name] = {
                "n": float(part.size),
                "p50_nats": float(np.median(part)),
                "max_nats": float(part.max()),
            }
    return bins
