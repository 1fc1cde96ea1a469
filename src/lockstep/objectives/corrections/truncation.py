"""Truncated importance weights: bias above a cap, for a bounded variance.

Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
"""

import torch

from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections.base import Correction, log_mismatch


def tis(inputs: LossInputs, low: float, high: float) -> Correction:
    """Each token's mismatch ratio, held in [low, high]."""
    ratio = torch.exp(log_mismatch(inputs))
    return Correction(ratio.clamp(low, high), ratio)


def sequence_tis(inputs: LossInputs, low: float, high: float) -> Correction:
    """The product of a sequence's mismatch ratios, held in [low, high], at every token of it."""
    ratio = torch.exp(inputs.sum_of_sequences(log_mismatch(inputs)))
    return Correction(ratio.clamp(low, high), ratio)
