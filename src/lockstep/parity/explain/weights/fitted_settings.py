"""Layer 4: settings of the model that are one number each, tried on the trainer and fitted.

Each is a place where engines have differed from the checkpoint: a base or a scaling of the rotary embedding that was not read, a
norm's epsilon, the scale of the attention's scores (YaRN's factor, ``query_pre_attn_scalar``), a cap on the logits left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lockstep.policy import attention
from lockstep.policy.model import Policy

ROTARY_BASES = np.geomspace(1e3, 1e7, 9).tolist()
INTERPOLATIONS = np.geomspace(1 / 8, 16, 8).tolist()
EPSILONS = np.geomspace(1e-12, 1e-1, 12).tolist()
SCALES = (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0, 4.0, 8.0)
"""Closer where they are close to none: of two that miss as far as 1 does, neither would be refined."""
CAPS = (5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 75.0, 100.0, 1e4)
"""Of the logits; the last is none."""


@dataclass(frozen=True)
class Setting:
    """One number of the model."""

    told: str
    """For people, with a place for the value."""
    grid: Sequence[float]
    under: Callable[[float], AbstractContextManager[None]]
    """The trainer with another value."""
    of_head: bool = False
    """True when the body's pass is the same under every value."""


def settings_of(policy: Policy) -> Iterator[Setting]:
    """Those that this trainer can take."""
    yield Setting("logits capped at {:.4g}", CAPS, lambda cap: _holding([(policy, "softcap")], cap), of_head=True)
    module = _rotary(policy.model)
    if module is not None:
        yield Setting("a rotary base of {:.4g}", ROTARY_BASES, lambda base: rotary_base(module, base))
        yield Setting(
            "positions divided by {:.4g}", INTERPOLATIONS, lambda by: _holding([(module, "inv_freq")], module.inv_freq / by)
        )
    yield Setting("a norm epsilon of {:.4g}", EPSILONS, lambda epsilon: norm_epsilon(policy.model, epsilon))
    if policy.share_prompts:
        yield Setting("attention scores times {:.4g}", SCALES, lambda scale: attention.altered(scale=scale))


def _rotary(model: nn.Module) -> Any:
    """The module that holds the rotary frequencies, where it is of the default kind."""
    return next((m for m in model.modules() if hasattr(m, "inv_freq") and getattr(m, "rope_type", "default") == "default"), None)


def rotary_base(module: Any, base: float) -> AbstractContextManager[None]:
    """The trainer's rotary embedding with another base."""
    before = module.inv_freq
    n = before.numel()
    frequencies = base ** -(torch.arange(n, device=before.device, dtype=torch.float32) / n)
    return _holding([(module, "inv_freq")], frequencies.to(before.dtype))


def norm_epsilon(model: nn.Module, epsilon: float) -> AbstractContextManager[None]:
    """The trainer's norms with another epsilon."""
    names = ("variance_epsilon", "eps")
    return _holding([(m, n) for m in model.modules() for n in names if isinstance(getattr(m, n, None), float)], epsilon)


@contextmanager
def _holding(places: Sequence[tuple[Any, str]], value: Any) -> Iterator[None]:
    """Attributes with another value, all with the same."""
    before = [getattr(holder, name) for holder, name in places]
    for holder, name in places:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for (holder, name), old in zip(places, before, strict=True):
            setattr(holder, name, old)
