"""CISPO: every token keeps its gradient; the ratio is a weight on it, held in a range.

MiniMax, "MiniMax-M1", 2025, arXiv:2506.13585, eq. 4. The bounds are absolute, and the default is ScaleRL's
(Khatri et al., 2025, arXiv:2510.13786): nothing below, 5 above.

A bound below 1 scales every gradient, also at ratio 1. TRL reads ``epsilon_high`` as the absolute bound while
its default for it is the .2 of GRPO's range around 1: each token's weight is then at most .2, a fifth of the
learning rate and no clip at all. Here ``high`` < 1 is refused.
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs, truncated


def cispo(inputs: LossInputs, *, low: float, high: float) -> LossOutputs:
    """``−Σ w · sg(clip(r, low, high)) · A · now`` with r = exp(now − old)."""
    weight = truncated(torch.exp(inputs.logprobs - inputs.old_logprobs), low, high)
    loss = -inputs.mean(weight * inputs.advantages * inputs.logprobs)
    return LossOutputs(loss=loss, clipped=torch.zeros_like(inputs.loss_mask))
