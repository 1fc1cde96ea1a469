"""TOPR: what earned a good reward is learned in full, what earned a bad one by its ratio, at most 1.

Le Roux et al., "Tapered Off-Policy REINFORCE", 2025, arXiv:2503.14286, eq. 8 with the canonical bounds: a
bad sample that the policy no longer draws stops pushing, and so the loss is bounded below without a KL term.
Good and bad are told by the sign of the advantage (ROLL's tells them by the sign of the score).
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs, truncated


def topr(inputs: LossInputs, *, high: float) -> LossOutputs:
    """``−Σ w · A · now`` for A ≥ 0, ``−Σ w · sg(clip(r, 0, high)) · A · now`` for A < 0."""
    tapered = truncated(torch.exp(inputs.logprobs - inputs.old_logprobs), 0.0, high)
    weight = torch.where(inputs.advantages >= 0, torch.ones_like(tapered), tapered)
    loss = -inputs.mean(weight * inputs.advantages * inputs.logprobs)
    return LossOutputs(loss=loss, clipped=torch.zeros_like(inputs.loss_mask))
