"""Variants of the trainer's model that are one number, or one choice, each (see ``variants.py``).

Each is a place where engines have differed from the checkpoint: a base or a scaling of the rotary embedding
that was not read, a norm's epsilon, the scale of the attention's scores (YaRN's factor,
``query_pre_attn_scalar``), a cap on the logits left out, a cache in a narrower dtype.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lockstep.policy import attention
from lockstep.policy.model import Policy
from lockstep.policy.packing import Block, Packed
from lockstep.policy.variants import holding_attributes


@dataclass(frozen=True)
class LogitsCapped:
    """Logits soft-capped."""

    cap: float

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        return _set(policy, [(policy, "softcap")], self.cap)


@dataclass(frozen=True)
class RotaryBase:
    """Another base of the rotary embedding."""

    base: float

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        module = rotary_of(policy.model)
        n = module.inv_freq.numel()
        before = module.inv_freq
        frequencies = self.base ** -(torch.arange(n, device=before.device, dtype=torch.float32) / n)
        return _set(policy, [(module, "inv_freq")], frequencies.to(before.dtype))


@dataclass(frozen=True)
class PositionsDivided:
    """Positions interpolated: the rotary frequencies divided by ``by``."""

    by: float

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        module = rotary_of(policy.model)
        return _set(policy, [(module, "inv_freq")], module.inv_freq / self.by)


@dataclass(frozen=True)
class NormEpsilon:
    """Another epsilon in every norm."""

    epsilon: float

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        return _set(policy, _epsilons(policy.model), self.epsilon)


@dataclass(frozen=True)
class AttentionScaled:
    """Attention scores multiplied by a constant."""

    scale: float

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        with attention.altered(scale=self.scale):
            yield policy


@dataclass(frozen=True)
class SlidingWindow:
    """Attention under a sliding window of so many tokens."""

    window: int

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        with attention.altered(window=self.window):
            yield policy


@dataclass(frozen=True)
class CacheKept:
    """Attention over keys and values as a cache of a narrower form kept them; :data:`CACHE_FORMS`."""

    form: str

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        with attention.altered(kept=CACHE_FORMS[self.form]):
            yield policy


@dataclass(frozen=True)
class DropoutLeftOn:
    """Dropout behind every feed-forward block, and the model in training mode."""

    probability: float

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        drop = nn.functional.dropout
        hooks = [
            module.register_forward_hook(lambda m, _, out: drop(out, self.probability, m.training))
            for name, module in policy.model.named_modules()
            if name.endswith(".mlp")
        ]
        policy.model.train()
        try:
            yield policy
        finally:
            policy.model.eval()
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class OneBlockRows:
    """Packed rows without their blocks: each sequence attends to all that lie before it in its row."""

    @contextmanager
    def held(self, policy: Policy) -> Iterator[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        other = copy.copy(policy)
        other.rows = lambda *args: [  # type: ignore[method-assign]
            _one_block(row)
            for row in policy.rows(*args)  # type: ignore[arg-type]
        ]
        yield other


def _one_block(row: Packed) -> Packed:
    return replace(row, blocks=(Block(0, len(row.token_ids), None),)) if len(row.completions) > 1 else row


@dataclass(frozen=True)
class Generating:
    """The checkpoint with a generation_config.json of these settings, as a server would read it."""

    settings: Mapping[str, Any]

    def held(self, policy: Policy) -> AbstractContextManager[Policy]:
        """See :class:`~lockstep.policy.variants.Variant`."""
        return _set(policy, [(policy.model, "generation_config")], GenerationConfig(**self.settings))


def base_of(frequencies: Tensor) -> float:
    """The base that rotary frequencies [n] are powers of."""
    dims = 2 * frequencies.numel()
    return float(frequencies[-1].double() ** (-dims / (dims - 2)))


def rotary_of(model: nn.Module) -> Any:
    """The module that holds the rotary frequencies, if of the default kind; None where there is none."""
    return next(
        (
            m
            for m in model.modules()
            if hasattr(m, "inv_freq") and getattr(m, "rope_type", "default") == "default"
        ),
        None,
    )


def epsilon_of(model: nn.Module) -> float:
    """The epsilon of the first norm; NaN where none is known by its name."""
    return next((getattr(module, name) for module, name in _epsilons(model)), float("nan"))


def _epsilons(model: nn.Module) -> list[tuple[nn.Module, str]]:
    names = ("variance_epsilon", "eps")
    return [(m, n) for m in model.modules() for n in names if isinstance(getattr(m, n, None), float)]


@contextmanager
def _set(policy: Policy, places: Sequence[tuple[Any, str]], value: Any) -> Iterator[Policy]:
    with holding_attributes(places, value):
        yield policy


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(t.dtype)


def _cut(t: Tensor) -> Tensor:
    """To fp8_e4m3 towards zero: three bits behind the leading one, subnormals below 2⁻⁶."""
    quantum = torch.exp2((torch.frexp(t.float())[1] - 1).clamp(min=-6).float() - 3)
    return ((t / quantum).trunc() * quantum).to(t.dtype)


CACHE_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8_e4m3": _through(torch.float8_e4m3fn),
    "fp8_e4m3, cut instead of rounded": _cut,  # vLLM 0.32.0 on a CPU
    "fp8_e5m2": _through(torch.float8_e5m2),
    "bfloat16": _through(torch.bfloat16),
    "float16": _through(torch.float16),
}
