"""Layer 4: settings of the model that are one number each, tried on the trainer and fitted.

``policy/variant_settings.py`` is where they are set.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.policy.variant_settings import (
    AttentionScaled,
    LogitsCapped,
    NormEpsilon,
    PositionsDivided,
    RotaryBase,
)
from lockstep.policy.variants import Variant
from lockstep.training.trainer import Trainer

ROTARY_BASES = np.geomspace(1e3, 1e7, 9).tolist()
INTERPOLATIONS = np.geomspace(1 / 8, 16, 8).tolist()
EPSILONS = np.geomspace(1e-12, 1e-1, 12).tolist()
SCALES = (0.125, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0, 4.0, 8.0)
"""Factors; closer together around 1. Had 1 lain far from both neighbours, a factor between them would miss as
much as none at either, and neither would be refined."""
CAPS = (5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 75.0, 100.0, 1e4)
"""Soft caps that the logits may have; under the last of them they are as good as uncapped."""


@dataclass(frozen=True)
class FittedSetting:
    """One number of the model."""

    told: str
    """The setting in words, with a place for the value."""
    grid: Sequence[float]
    variant: Callable[[float], Variant]
    """The trainer with another value."""
    of_head: bool = False
    """True when the body's pass is the same under every value."""


def settings_of(trainer: Trainer) -> Iterator[FittedSetting]:
    """The settings that this trainer can take."""
    yield FittedSetting("logits capped at {:.4g}", CAPS, LogitsCapped, of_head=True)
    if not math.isnan(trainer.rotary_base):
        yield FittedSetting("a rotary base of {:.4g}", ROTARY_BASES, RotaryBase)
        yield FittedSetting("positions divided by {:.4g}", INTERPOLATIONS, PositionsDivided)
    yield FittedSetting("a norm epsilon of {:.4g}", EPSILONS, NormEpsilon)
    if trainer.shares_prompts:
        yield FittedSetting("attention scores times {:.4g}", SCALES, AttentionScaled)
