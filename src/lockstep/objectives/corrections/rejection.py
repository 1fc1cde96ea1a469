"""Masks: tokens, or whole sequences, whose mismatch ratio lies outside a range are left out of the loss."""

import torch
from torch import Tensor

from lockstep.objectives.base import LossInputs
from lockstep.objectives.corrections.base import Correction, log_mismatch


def masked_is(inputs: LossInputs, low: float, high: float) -> Correction:
    """Each token's mismatch ratio inside [low, high], 0 outside.

    Ling Team, "Every Step Evolves", 2025, arXiv:2510.18855 (IcePop).
    """
    ratio = torch.exp(log_mismatch(inputs))
    return Correction(ratio * _inside(ratio, low, high), ratio)


def geometric_rejection(inputs: LossInputs, low: float, high: float) -> Correction:
    """1 for sequences whose mismatch ratios have a geometric mean in [low, high], 0 for the others."""
    return _kept(torch.exp(inputs.mean_of_sequences(log_mismatch(inputs))), low, high)


def sequence_mask(inputs: LossInputs, low: float, high: float) -> Correction:
    """1 for sequences whose mismatch ratios have a product in [low, high], 0 for the others."""
    return _kept(torch.exp(inputs.sum_of_sequences(log_mismatch(inputs))), low, high)


def _kept(ratio: Tensor, low: float, high: float) -> Correction:
    return Correction(_inside(ratio, low, high), torch.ones_like(ratio))


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
