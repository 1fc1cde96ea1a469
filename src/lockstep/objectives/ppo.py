"""PPO with a value head: the clipped surrogate on GAE's advantages, and the head's own loss.

Schulman et al., 2017, arXiv:1707.06347, eq. 7 and 9; value clipping as in its published code:
``½ · max((V − R)², (V_old + clip(V − V_old, ±value_clip) − R)²)``. Advantages and returns are made before the
step (``objectives/advantages.py``); the head learns by an optimizer group of its own and stays in the
trainer (``[value_head]``).
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs
from lockstep.objectives.grpo import grpo


def ppo(
    inputs: LossInputs, *, clip_low: float, clip_high: float, value_clip: float, value_coef: float
) -> LossOutputs:
    """GRPO's surrogate plus ``value_coef`` times the value loss."""
    assert inputs.values is not None
    assert inputs.old_values is not None
    assert inputs.returns is not None
    surrogate = grpo(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=float("inf"))
    moved = (inputs.values - inputs.old_values).clamp(-value_clip, value_clip)
    errors = (inputs.values - inputs.returns).square()
    held = (inputs.old_values + moved - inputs.returns).square()
    value_loss = 0.5 * inputs.uncorrected_mean(torch.maximum(errors, held))
    return LossOutputs(
        loss=surrogate.loss + value_coef * value_loss,
        clipped=surrogate.clipped,
        value_loss=value_loss.detach(),
    )
