"""Layer 4: would the trainer agree with the engine if it computed as the engine may? Each hypothesis is tried on the trainer.

A precision is a hypothesis about the *size* of the gap: two roundings of one kind do not agree token by token. The engine's own
model configuration, another setting of the model (``fitted_settings.py``) or a scaled tensor must make the gap vanish.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.parity import attribution
from lockstep.parity.canary import Canary
from lockstep.parity.fitted_settings import settings_of
from lockstep.parity.fitting import fitted
from lockstep.parity.model_settings import departures, with_settings
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.tolerances import EXPLAINS, PRECISION_MULTIPLE
from lockstep.policy import attention
from lockstep.policy.model import Policy

WINDOWS = tuple(2**n for n in range(3, 13))
SETTING_ROWS = 4
"""At least, of the sample, on which settings are tried: dozens of passes, and one that is right leaves nothing anywhere."""
SCALED_TOKENS = 64
"""Of the sample, for the search for a scaled tensor."""


@dataclass(frozen=True)
class Explanation:
    """What explains a gap."""

    cause: str
    evidence: str


def explain(pair: Pair, sample: Sampled, gap: np.ndarray) -> Explanation:
    """The first hypothesis that explains a gap of the recipe's own sample.

    Args:
        gap: trainer − engine, float32 [T].
    """
    pair.say("numerics: the gap is too large; trying what may explain it, which can take minutes")
    found = _precision(pair, sample, gap)
    if found is None and np.median(np.abs(gap)) > pair.noise.p50:  # else there is nothing for a setting to take away
        found = _setting(pair, sample) or _scale(pair, sample)
    found = found or Explanation(
        "unexplained_numerics", "no difference of precision, setting or scale that was tried explains it"
    )
    if found.cause in ("unexplained_numerics", "tensor_scaled") and (engines := departures(pair)):
        return replace(found, evidence=f"{found.evidence}; suspected, not proven: {_told(engines)}")
    return found


def in_dtype(policy: Policy, dtype: torch.dtype, head_dtype: torch.dtype) -> Policy:
    """A copy of the policy that computes in another precision (score D in fp32)."""
    model: Any = copy.deepcopy(policy.model)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32 on every side
        parameter.data = parameter.data.to(dtype)
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return replace(policy, model=model, head=head.weight, head_bias=bias, head_dtype=head_dtype)


def _precision(pair: Pair, sample: Sampled, gap: np.ndarray) -> Explanation | None:
    """Dtypes read back from both sides differ, and a difference of that kind has the gap's size."""
    policy, ours = pair.policy, sample.scored(pair.policy)
    body, head = pair.engine_dtype, pair.engine_head_dtype
    size = float(np.median(np.abs(gap)))
    if body not in ("", str(policy.model.dtype)):
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


def _setting(pair: Pair, sample: Sampled) -> Explanation | None:
    """Another configuration of the model, or of its attention, under which the trainer agrees with the engine."""
    few = _first(sample, max(SETTING_ROWS, len(sample.prompts) // 4))
    engine = few.engine_logprobs

    def miss(context) -> float:
        with context:
            return float(np.median(np.abs(few.scored(pair.policy) - engine)))

    now = miss(nullcontext())
    enough = min(pair.noise.p50, EXPLAINS * now)
    engines = departures(pair)
    other = with_settings(pair.policy, {path: theirs for path, (_, theirs) in engines.items()}) if engines else None
    if other is not None:
        left = float(np.median(np.abs(few.scored(other) - engine)))
        if left <= enough:
            return Explanation("model_config_differs", f"{_told(engines)}; so configured the trainer agrees to {left:.1e} nats")
    for name, kept in CACHES.items() if pair.policy.share_prompts else ():
        left = miss(attention.altered(kept=kept))
        if left <= EXPLAINS * now:
            text = f"over keys and values kept in {name} the trainer is {left:.1e} nats off, else {now:.1e} (medians)"
            return Explanation("kv_cache_precision", text)
    for setting in settings_of(pair.policy):
        value, left = fitted(setting.grid, lambda v, setting=setting: miss(setting.under(v)), now)
        if left <= enough:
            text = f"with {setting.told.format(value)} the trainer agrees to {left:.1e} nats"
            return Explanation("model_config_differs", text)
    told = [theirs for path, (_, theirs) in engines.items() if path[-1] == "sliding_window" and theirs]
    longest = max(len(ids) for ids in few.sequences)  # a wider window is none
    for window in [w for w in (*told, *WINDOWS) if w < longest] if pair.policy.share_prompts else ():
        left = miss(attention.altered(window=window))
        if left <= enough:
            return Explanation("model_config_differs", f"with a sliding window of {window} the trainer agrees to {left:.1e} nats")
    return None


def _rounded(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(t.dtype)


def _cut(t: Tensor) -> Tensor:
    """To fp8_e4m3 towards zero: three bits behind the leading one, subnormals below 2⁻⁶."""
    quantum = torch.exp2((torch.frexp(t.float())[1] - 1).clamp(min=-6).float() - 3)
    return ((t / quantum).trunc() * quantum).to(t.dtype)


CACHES: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8_e4m3": _rounded(torch.float8_e4m3fn),
    "fp8_e4m3, cut instead of rounded": _cut,  # vLLM 0.32.0 on a CPU
    "fp8_e5m2": _rounded(torch.float8_e5m2),
    "bfloat16": _rounded(torch.bfloat16),
    "float16": _rounded(torch.float16),
}


def _told(engines: dict[tuple[str, ...], tuple[Any, Any]]) -> str:
    return ", ".join(f"{path[-1]} is {theirs} in the engine, {ours} in the trainer" for path, (ours, theirs) in engines.items())


def _first(sample: Sampled, n: int) -> Sampled:
    return Sampled(sample.prompts[:n], sample.completions[:n], sample.sampling)


def _scale(pair: Pair, sample: Sampled) -> Explanation | None:
    """A tensor, or a natural set of them, that the engine holds times a constant."""
    if pair.engine.ready.capabilities["rescore"].supported:
        canary = Canary.of(sample, SCALED_TOKENS)
        engine = canary.engine_scores(pair)
    else:
        rows = 1 + int(np.searchsorted(np.bincount(sample.owners).cumsum(), SCALED_TOKENS))
        few = _first(sample, rows)
        canary, engine = Canary(few.groups, few.temperature), few.engine_logprobs
    enough = min(pair.noise.p50, EXPLAINS * float(np.abs(engine - canary.trainer_scores(pair)).mean()))
    named = attribution.scaled(pair, canary, engine, enough)
    if named is None:
        return None
    others = f"; {' or '.join(named.alike[:3])} would look the same" if named.alike else ""
    text = f"with {named.label} times {named.factor:.4g} the trainer agrees to {named.miss:.1e} nats{others}"
    return Explanation("tensor_scaled", text)
