"""Decoupled PPO: two ratios, each with a job of its own, for data that older weights drew.

Hilton et al., "Batch size-invariance for policy optimization", 2021, arXiv:2110.00641, eq. 4; as used for
asynchronous RL in AReaL (Fu et al., 2025, arXiv:2505.24298, eq. 5).

    behaviour (old) ──── how stale is the data? a weight ────► step began ──── trust region: clipped ────► now

PPO's one ratio clips stale tokens before the step has moved anything. Here the clip is around the weights
that the step began with, and staleness is a weight, held below ``cap``. At lag 0 the weight is 1 and this is
GRPO's loss.
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs, truncated


def decoupled_ppo(inputs: LossInputs, *, clip_low: float, clip_high: float, cap: float) -> LossOutputs:
    """``−Σ w · sg(min(exp(step − old), cap)) · min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A)``.

    r = exp(now − step).
    """
    staleness = truncated(torch.exp(inputs.step_logprobs - inputs.old_logprobs), 0.0, cap)
    ratio = torch.exp(inputs.logprobs - inputs.step_logprobs)
    free = ratio * inputs.advantages
    held = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * inputs.advantages
    loss = -inputs.mean(staleness * torch.minimum(free, held))
    return LossOutputs(loss=loss, clipped=(held < free).detach())
