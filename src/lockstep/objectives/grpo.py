"""GRPO, and with it PPO's clipped surrogate: the policy ratio times an advantage, held near 1.

Shao et al., "DeepSeekMath", 2024, arXiv:2402.03300, eq. 3; Schulman et al., "Proximal Policy Optimization",
2017, arXiv:1707.06347, eq. 7. The published variants are keys of ``[objective]``:

    GRPO      advantage_scale = "std"   aggregation = "seq-mean-token-mean"
    Dr. GRPO  advantage_scale = "none"  aggregation = "seq-mean-token-sum-norm"    arXiv:2503.20783
    DAPO      clip_high = 0.28          aggregation = "token-mean"                 arXiv:2503.14476
    dual clip options.dual_clip = 3                                                arXiv:1912.09729
"""

import torch

from lockstep.objectives.base import LossInputs, LossOutputs


def grpo(inputs: LossInputs, *, clip_low: float, clip_high: float, dual_clip: float) -> LossOutputs:
    """``−Σ w · min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A)`` with r = exp(now − old).

    Args:
        dual_clip: for A < 0 the term is at most ``−dual_clip · A``, so that a token that has become far more
            likely cannot outweigh all others. ``inf``: no such bound.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    free = ratio * inputs.advantages
    held = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * inputs.advantages
    kept = torch.minimum(free, held)
    clipped = held < free  # there the clamped one is taken, which has no gradient
    if dual_clip != float("inf"):
        bound = dual_clip * inputs.advantages
        beyond = (inputs.advantages < 0) & (kept < bound)
        kept = torch.where(beyond, bound, kept)
        clipped = clipped | beyond
    return LossOutputs(loss=-inputs.mean(kept), clipped=clipped.detach())
