"""REINFORCE: log-probability times advantage, Williams, 1992; under RLOO's baseline, RLOO.

Ahmadian et al., "Back to Basics", 2024, arXiv:2402.14740: a whole completion is one action, and the baseline
is the mean reward of the group's others (``objectives/advantages.py``).

The weight is the policy ratio, held below ``high`` and without a gradient: at the first update of a step it
is 1, and at later ones it is what keeps the gradient that of the policy now. ``high`` = 0 leaves it out.
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs, truncated


def reinforce(inputs: LossInputs, *, high: float) -> LossOutputs:
    """``−Σ w · sg(min(r, high)) · A · now`` with r = exp(now − old); without r where ``high`` is 0."""
    surrogate = inputs.advantages * inputs.logprobs
    if high:
        surrogate = truncated(torch.exp(inputs.logprobs - inputs.old_logprobs), 0.0, high) * surrogate
    return LossOutputs(loss=-inputs.mean(surrogate), clipped=torch.zeros_like(inputs.loss_mask))
