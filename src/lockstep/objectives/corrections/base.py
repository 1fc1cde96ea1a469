"""What a correction is of, and what it gives."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lockstep.objectives.base import LossInputs

ROUNDING_NATS = 2e-4
"""|trainer − engine| of a token up to which both said the same number. The order of fp32 sums brought 1.3e-4
at most in runs of SmolLM2 on three vLLM versions (docs/concepts/in-flight.md), and 4.5e-4 to single tokens
behind random ids; a weight of 1.0002 would correct nothing."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What a correction made of each token."""

    weights: Float[Tensor, "T"]
    """The factor; 0: masked."""
    uncut: Float[Tensor, "T"]
    """What it would be without bounds."""


def log_mismatch(inputs: LossInputs) -> Float[Tensor, "T"]:
    """log w, nats: exactly 0 where the two sides differ by the rounding of fp32 alone."""
    whole = inputs.log_mismatch
    return torch.where(whole.abs() <= ROUNDING_NATS, torch.zeros_like(whole), whole)
