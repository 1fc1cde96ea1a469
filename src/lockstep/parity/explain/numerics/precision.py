"""Layer 4: does a difference of precision have the gap's size? Each is tried on the trainer's own model.

A precision is a hypothesis about the *size* of the gap: two roundings of one kind do not agree token by
token. Weights that are quantised do, for they err in one way whoever multiplies them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.rows import Explanation
from lockstep.parity.pair import Pair
from lockstep.parity.search import keep_looking
from lockstep.parity.tolerances import CENTRED, PRECISION_MULTIPLE, QUANTISED_CORRELATION
from lockstep.policy.variants import InDtype, Quantised, Variant
from lockstep.records.samples import Samples
from lockstep.training.trainer import Trainer

FORMS = ("torch.float16", "torch.bfloat16")
"""Dtypes that are tried for the body of an engine that does not tell its own."""
FEW_TOKENS = 48
"""The forms are tried on so many tokens of the sample, or a few more: whole rows are taken."""


@dataclass(frozen=True)
class Form:
    """A precision that was tried."""

    name: str
    expected: float
    """median |gap| that it alone brings, nats."""
    correlation: float
    """Between what it brings to each token and the gap."""


def precision(pair: Pair, sample: Samples, gap: np.ndarray) -> Explanation | None:
    """Dtypes read back from both sides differ, and a difference of that kind has the gap's size."""
    trainer = pair.trainer
    body = pair.engine_dtype
    head = pair.engine_head_dtype
    if not body or pair.presumed_dtype:
        return _unsaid(pair, sample, gap)
    ours = sample.scored(trainer)
    size = float(np.median(np.abs(gap)))
    if body != trainer.dtype:
        expected = _worth(trainer, sample, ours, InDtype(body))
        if size <= PRECISION_MULTIPLE * expected:
            text = f"engine {body}, trainer {trainer.dtype}: alone worth {expected:.1e} nats (median)"
            return Explanation("body_precision", text)
    if head not in ("", trainer.head_dtype):
        expected = _worth(trainer, sample, ours, InDtype(head=head))
        if size <= PRECISION_MULTIPLE * expected:
            text = (
                f"head in {head}, trainer's in {trainer.head_dtype}: alone worth {expected:.1e} nats (median)"
            )
            return Explanation("head_precision", text)
    if body == trainer.dtype != "torch.float32":  # in fp32 there is no finer one to be coarser than
        return _coarser(pair, sample, ours)
    return None


def _worth(trainer: Trainer, sample: Samples, ours: np.ndarray, variant: Variant) -> float:
    """median |scores under the variant − ours|, nats."""
    with trainer.holding(variant):
        return float(np.median(np.abs(sample.scored(trainer) - ours)))


def _coarser(pair: Pair, sample: Samples, ours: np.ndarray) -> Explanation | None:
    """One dtype on both sides, in which the engine rounds more coarsely: farther from fp32 (score D)."""
    scores = reference(pair.trainer, sample)
    trainer, engine = (float(np.median(np.abs(side - scores))) for side in (ours, sample.engine_logprobs))
    if not trainer < engine <= PRECISION_MULTIPLE * trainer:
        return None
    text = (
        f"both in {pair.engine_dtype}; from fp32 the trainer is {trainer:.1e} nats away, "
        f"the engine {engine:.1e} (medians)"
    )
    return Explanation("body_precision", text)


def reference(trainer: Trainer, sample: Samples) -> np.ndarray:
    """Score D: the trainer's model in fp32, body and head; float32 [T]."""
    with trainer.holding(InDtype("float32", "float32")):
        return sample.scored(trainer)


def presumed_dtype(pair: Pair, evidence: Evidence) -> str:
    """What an engine computes in that does not say.

    Empty where it does, or where nothing that was tried has the gap's size.
    """
    if pair.resolved_dtype:
        return ""
    gap = evidence.rescored - evidence.trainer
    if within(pair.trainer_noise, gap):
        return pair.trainer.dtype
    best = nearest([form for form in forms(pair, evidence.neutral, gap) if form.name in FORMS], gap)
    return "" if best is None else best.name


def nearest(tried: list[Form], gap: np.ndarray) -> Form | None:
    """The form whose size is nearest to the gap's, if that is a rounding's: centred, and of that order."""
    size = float(np.median(np.abs(gap)))
    if not abs(float(np.median(gap))) <= CENTRED * size:
        return None
    fits = [
        f
        for f in tried
        if f.expected > 0.0 and 1 / PRECISION_MULTIPLE <= size / f.expected <= PRECISION_MULTIPLE
    ]
    return min(fits, key=lambda form: abs(np.log(size / form.expected)), default=None)


def forms(pair: Pair, sample: Samples, gap: np.ndarray) -> list[Form]:
    """Each precision that an engine's body may be in, tried on a few rows of the trainer.

    ``gap``: float32 [T] of the sample.
    """
    counts = np.bincount(sample.owners, minlength=len(sample))
    order = np.argsort([len(ids) for ids in sample.sequences], kind="stable")
    rows = np.sort(order[: 1 + int(np.searchsorted(counts[order].cumsum(), FEW_TOKENS))])
    few = sample.take(rows)
    theirs = gap[np.isin(sample.owners, rows)]
    ours = few.scored(pair.trainer)
    tried = []
    for name, variant in _forms(pair.trainer):
        keep_looking()
        with pair.trainer.holding(variant):
            moved = few.scored(pair.trainer) - ours
        # What does not vary correlates with nothing: NaN.
        both = bool(moved.std() > 0.0 and theirs.std() > 0.0)
        correlation = abs(float(np.corrcoef(moved, theirs)[0, 1])) if both else 0.0
        tried.append(Form(name, float(np.median(np.abs(moved))), correlation))
    return tried


def _forms(trainer: Trainer) -> Iterator[tuple[str, Variant]]:
    for name in FORMS:
        if name != trainer.dtype:
            yield name, InDtype(name)
    yield "weights in int8, a scale for each row", Quantised("int8")
    yield "weights in fp8_e4m3, a scale for each row", Quantised("fp8_e4m3")


def _unsaid(pair: Pair, sample: Samples, gap: np.ndarray) -> Explanation | None:
    """An engine that does not say what it computes in."""
    tried = forms(pair, sample, gap)
    worth = ", ".join(f"{form.name.removeprefix('torch.')} {form.expected:.1e}" for form in tried)
    text = (
        "the engine does not say what it computes in; "
        f"on the trainer alone are worth, in nats (median): {worth}"
    )
    quantised = max((f for f in tried if f.name not in FORMS), key=lambda f: f.correlation)
    best = quantised if quantised.correlation >= QUANTISED_CORRELATION else None
    rounded = nearest([f for f in tried if f.name in FORMS], gap)
    if rounded is not None and (best is None or rounded.correlation >= best.correlation):
        best = rounded
    if best is None:
        return None
    size = float(np.median(np.abs(gap)))
    return Explanation(
        "body_precision", f"{text}; the gap is {size:.1e}, as {best.name.removeprefix('torch.')} brings it"
    )
