"""What a correction gives."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Correction:
    """What a correction made of each token."""

    weights: Float[Tensor, "T"]
    """The factor; 0: masked."""
    uncut: Float[Tensor, "T"]
    """What it would be without bounds."""
