"""Objective-level corrections for the mismatch between engine and trainer.

Pure functions; each is 1 on a proven backend.

They are locked until the ladder has passed: no training starts without that, with a correction or without
one. A correction is no mend. It trades bias for variance on what is left, and it never changes a figure by
which the backend is judged.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def truncated_importance_weights(
    trainer: Float[Tensor, "T"], engine: Float[Tensor, "T"], cap: float
) -> Float[Tensor, "T"]:
    """``min(exp(trainer − engine), cap)``: the mismatch ratio of each token, truncated. Carries no gradient.

    Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.

    Args:
        trainer: under the weights that sampled, nats.
        engine: as reported, nats.
    """
    return torch.exp(trainer.detach() - engine).clamp(max=cap)
