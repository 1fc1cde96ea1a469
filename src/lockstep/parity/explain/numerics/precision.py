"""Layer 4: does a difference of precision have the gap's size? Each is tried on the trainer's own model.

A precision is a hypothesis about the *size* of the gap: two roundings of one kind do not agree token by token. Weights that are
quantised do, for they err in one way whoever multiplies them.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.parity.evidence import Evidence, within
from lockstep.parity.explain.semantics.portions import of_rows
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.search import keep_looking
from lockstep.parity.tolerances import CENTRED, PRECISION_MULTIPLE, QUANTISED_CORRELATION
from lockstep.policy.model import Policy

FORMS = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}
"""What the body of an engine that does not say is tried in."""
INT8 = 127.0
FEW_TOKENS = 48
"""Of the sample at least, on which the forms are tried."""


@dataclass(frozen=True)
class Explanation:
    """What explains a gap."""

    cause: str
    evidence: str


@dataclass(frozen=True)
class Form:
    """A precision that was tried."""

    name: str
    expected: float
    """median |gap| that it alone brings, nats."""
    correlation: float
    """Between what it brings to each token and the gap."""


def in_dtype(policy: Policy, dtype: torch.dtype, head_dtype: torch.dtype) -> Policy:
    """A copy of the policy that computes in another precision (score D in fp32)."""
    model: Any = copy.deepcopy(policy.model)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32 on every side
        parameter.data = parameter.data.to(dtype)
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return replace(policy, model=model, head=head.weight, head_bias=bias, head_dtype=head_dtype)


def precision(pair: Pair, sample: Sampled, gap: np.ndarray) -> Explanation | None:
    """Dtypes read back from both sides differ, and a difference of that kind has the gap's size."""
    policy, ours = pair.policy, sample.scored(pair.policy)
    body, head = pair.engine_dtype, pair.engine_head_dtype
    size = float(np.median(np.abs(gap)))
    if not body or pair.presumed_dtype:
        return _unsaid(pair, sample, gap)
    if body != str(policy.model.dtype):
        as_engine = in_dtype(policy, _dtype(body), policy.head_dtype)
        expected = np.median(np.abs(sample.scored(as_engine) - ours))
        if size <= PRECISION_MULTIPLE * expected:
            return Explanation(
                "body_precision", f"engine {body}, trainer {policy.model.dtype}: alone worth {expected:.1e} nats (median)"
            )
    if head not in ("", str(policy.head_dtype)):
        as_engine = replace(policy, head_dtype=_dtype(head))
        expected = np.median(np.abs(sample.scored(as_engine) - ours))
        if size <= PRECISION_MULTIPLE * expected:
            return Explanation(
                "head_precision", f"head in {head}, trainer's in {policy.head_dtype}: alone worth {expected:.1e} nats (median)"
            )
    if body == str(policy.model.dtype) != "torch.float32":
        return _coarser(pair, sample, ours)
    return None


def _coarser(pair: Pair, sample: Sampled, ours: np.ndarray) -> Explanation | None:
    """One dtype on both sides, and the engine rounds more coarsely in it: it lies farther from fp32 (score D)."""
    reference = in_dtype(pair.policy, torch.float32, torch.float32)
    scores = sample.scored(reference)
    trainer, engine = (float(np.median(np.abs(side - scores))) for side in (ours, sample.engine_logprobs))
    if not trainer < engine <= PRECISION_MULTIPLE * trainer:
        return None
    text = f"both in {pair.engine_dtype}; from fp32 the trainer is {trainer:.1e} nats away, the engine {engine:.1e} (medians)"
    return Explanation("body_precision", text)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def presumed_dtype(pair: Pair, evidence: Evidence) -> str:
    """What an engine computes in that does not say; empty where it does, or where nothing that was tried has the gap's size."""
    if pair.engine.ready.resolved.get("worker.parameter_dtype"):
        return ""
    gap = evidence.rescored - evidence.trainer
    if within(pair.trainer_noise, gap):
        return str(pair.policy.model.dtype)
    found = nearest([form for form in forms(pair, evidence.neutral, gap) if form.name in FORMS], gap)
    return "" if found is None else found.name


def nearest(tried: list[Form], gap: np.ndarray) -> Form | None:
    """The form whose size is nearest to the gap's, if that is a rounding's: centred, and of that order."""
    size = float(np.median(np.abs(gap)))
    if not abs(float(np.median(gap))) <= CENTRED * size:
        return None
    fits = [f for f in tried if f.expected > 0.0 and 1 / PRECISION_MULTIPLE <= size / f.expected <= PRECISION_MULTIPLE]
    return min(fits, key=lambda form: abs(np.log(size / form.expected)), default=None)


def forms(pair: Pair, sample: Sampled, gap: np.ndarray) -> list[Form]:
    """Each precision that an engine's body may be in, tried on a few rows of the trainer. ``gap``: float32 [T] of the sample."""
    counts = np.bincount(sample.owners, minlength=len(sample.prompts))
    order = np.argsort([len(ids) for ids in sample.sequences], kind="stable")
    rows = np.sort(order[: 1 + int(np.searchsorted(counts[order].cumsum(), FEW_TOKENS))])
    few, told = of_rows(sample, rows), gap[np.isin(sample.owners, rows)]
    ours, found = few.scored(pair.policy), []
    for name, form in _forms(pair.policy):
        keep_looking()
        moved = few.scored(form()) - ours
        both = bool(moved.std() > 0.0 and told.std() > 0.0)
        correlation = abs(float(np.corrcoef(moved, told)[0, 1])) if both else 0.0
        found.append(Form(name, float(np.median(np.abs(moved))), correlation))
    return found


def _forms(policy: Policy) -> Iterator[tuple[str, Callable[[], Policy]]]:
    for name, dtype in FORMS.items():
        if dtype != policy.model.dtype:
            yield name, lambda dtype=dtype: in_dtype(policy, dtype, policy.head_dtype)
    yield "weights in int8, a scale for each row", lambda: _quantised(policy, _int8)
    yield "weights in fp8_e4m3, a scale for each row", lambda: _quantised(policy, _fp8)


def _int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / INT8
    return (weight / scale).round() * scale


def _fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


@torch.no_grad()
def _quantised(policy: Policy, change: Callable[[Tensor], Tensor]) -> Policy:
    """A copy of the policy with the matrices of its layers rounded; embeddings and head are left, as quantisers leave them."""
    model: Any = copy.deepcopy(policy.model)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        if parameter.dim() == 2 and id(parameter) not in ends:
            parameter.data = change(parameter.data)
    head = model.get_output_embeddings()
    return replace(policy, model=model, head=head.weight, head_bias=getattr(head, "bias", None))


def _unsaid(pair: Pair, sample: Sampled, gap: np.ndarray) -> Explanation | None:
    """An engine that does not say what it computes in."""
    tried = forms(pair, sample, gap)
    worth = ", ".join(f"{form.name.removeprefix('torch.')} {form.expected:.1e}" for form in tried)
    text = f"the engine does not say what it computes in; on the trainer alone are worth, in nats (median): {worth}"
    quantised = max((f for f in tried if f.name not in FORMS), key=lambda f: f.correlation)
    found = quantised if quantised.correlation >= QUANTISED_CORRELATION else None
    rounded = nearest([f for f in tried if f.name in FORMS], gap)
    if rounded is not None and (found is None or rounded.correlation >= found.correlation):
        found = rounded
    if found is None:
        return None
    size = float(np.median(np.abs(gap)))
    return Explanation("body_precision", f"{text}; the gap is {size:.1e}, as {found.name.removeprefix('torch.')} brings it")
