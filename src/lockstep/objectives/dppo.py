"""DPPO-TV: a token leaves the gradient when its probability, not its ratio, has moved too far.

Qi et al., "Rethinking the Trust Region in LLM Reinforcement Learning", 2026, arXiv:2602.04879. A ratio of 1.5
is nothing at p = 1e-4 and a lot at p = .5; the total variation that one token brings is |p − p_old|. It is
masked only where the advantage pushes it farther out.
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs, truncated


def dppo_tv(inputs: LossInputs, *, low: float, high: float, ratio_high: float) -> LossOutputs:
    """``−Σ w · sg(min(r, ratio_high)) · keep · A · now`` with r = exp(now − old).

    ``keep``: p − p_old ≤ ``high`` where A > 0, ≥ −``low`` elsewhere.
    """
    now = inputs.logprobs.detach()
    old = inputs.old_logprobs
    moved = now.exp() - old.exp()
    keep = torch.where(inputs.advantages > 0, moved <= high, moved >= -low)
    weight = truncated(torch.exp(now - old), 0.0, ratio_high) * keep
    loss = -inputs.mean(weight * inputs.advantages * inputs.logprobs)
    return LossOutputs(loss=loss, clipped=~keep & (inputs.advantages != 0))
